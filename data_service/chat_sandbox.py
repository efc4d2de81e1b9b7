"""Where chat templates run: Jinja's immutable sandbox with the names that templates find in transformers.

{% generation %} blocks leave marks around what they write. Owns this environment and nothing else.
"""

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

__all__ = ["BLOCK_CLOSE", "BLOCK_OPEN", "template_environment"]

BLOCK_OPEN = "\ufdd0"
"""A noncharacter in front of what a {% generation %} block writes; no text may hold it."""
BLOCK_CLOSE = "\ufdd1"
"""The one behind it."""
_TODAY = datetime(2024, 7, 26)
"""What `strftime_now` tells. Llama 3's template falls back to this day where it is told none."""


class _Generation(jinja2.ext.Extension):
    """The block {% generation %} … {% endgeneration %}: what is in it was said by the assistant."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{BLOCK_OPEN}{caller()}{BLOCK_CLOSE}"


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def template_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The names and settings that templates find in transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["namespace"] = _Namespace
    environment.globals["strftime_now"] = _TODAY.strftime
    return environment
