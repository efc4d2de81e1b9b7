"""Turns pydantic's findings into one line each: where, which key, what is wrong, what to change."""

import difflib
import types
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cluster.yaml_source import KeyPath, YamlSource


def describe(error: ValidationError, root: type[BaseModel], source: YamlSource) -> str:
    """The whole message for a file that does not validate: a heading and a line for each finding."""
    seen: set[str] = set()
    lines = []
    for finding in error.errors(include_url=False, include_context=False):
        keys = _keys_of(finding["loc"], source.tree)
        line = f"  {source.where(keys)}: {_sentence(finding, keys, root)}"
        if line not in seen:
            seen.add(line)
            lines.append(line)
    heading = f"{source.path}: {len(lines)} {'problem' if len(lines) == 1 else 'problems'} in the run file"
    return "\n".join([heading, *lines])


def _keys_of(loc: tuple[int | str, ...], tree: Any) -> KeyPath:
    """Pydantic's location without the union branches it inserts (they are no keys of the file)."""
    keys: list[int | str] = []
    holder: Any = tree
    for position, part in enumerate(loc):
        if isinstance(holder, dict) and (part in holder or position == len(loc) - 1):
            keys.append(part)
            holder = holder.get(part)
        elif isinstance(holder, list) and isinstance(part, int) and part < len(holder):
            keys.append(part)
            holder = holder[part]
        else:
            break
    return tuple(keys)


def _sentence(finding: Any, keys: KeyPath, root: type[BaseModel]) -> str:
    dotted = ".".join(map(str, keys))
    if finding["type"] == "extra_forbidden":
        section = _section_at(root, keys[:-1])
        valid = sorted(_key_names(section)) if section else []
        near = difflib.get_close_matches(str(keys[-1]), valid, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Valid here: {', '.join(valid)}."
        return f"{dotted}: unknown key. {hint}"
    if finding["type"] == "missing":
        return f"{dotted}: required and not set. Add it."
    message = finding["msg"].removeprefix("Value error, ")
    if finding["type"] == "value_error":
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted}={finding['input']!r}: {message}."


def _key_names(section: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in section.model_fields.items()]


def _section_at(root: type[BaseModel], keys: KeyPath) -> type[BaseModel] | None:
    current: Any = root
    for key in keys:
        if isinstance(key, int):
            continue
        fields = {info.alias or name: info for name, info in current.model_fields.items()}
        if key not in fields:
            return None
        current = _section_in(fields[key].annotation)
        if current is None:
            return None
    return current if isinstance(current, type) else None


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, list):
        for item in get_args(annotation):
            found = _section_in(item)
            if found is not None:
                return found
    return None
