"""The base of every configuration section: frozen, strict, documented.

It lives in the lowest folder because every section, in every folder, derives from it.
"""

from pydantic import BaseModel, ConfigDict

__all__ = ["Section"]


class Section(BaseModel):
    """A frozen configuration section that rejects unknown keys.

    Attribute docstrings become field descriptions; `stormjib config` prints them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True)
