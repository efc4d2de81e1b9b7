"""How far a preparation is, for whoever shows it.

Owns `PrepareProgress`. Refuses to print.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["PrepareProgress", "PrepareStage", "Report"]

PrepareStage = Literal["look", "read", "deduplicate", "tokenizer", "encode", "write"]


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is."""

    stage: PrepareStage
    """Stages come in this order; `look` where files are new here. `read` and `encode` take most of the time."""
    done: int
    """Bytes of the stage's input that are worked off."""
    total: int
    num_records: int
    """Records that were read so far."""
    num_rejects: int
    """Those that were left out."""


Report = Callable[[PrepareProgress], None]
