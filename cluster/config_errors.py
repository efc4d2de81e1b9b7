"""Turns pydantic's findings into one line each: where, which key, what is wrong, what to change."""

import difflib
import re
import types
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cluster.yaml_source import KeyPath, YamlSource

__all__ = ["describe"]

_NAMED_KEY = re.compile(r"(?<![\w.])([a-z_]\w*(?:\.\w+)*)=")
_REWORDED = {
    "model_type": "should be a section, that is a mapping of keys",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping",
}


def describe(error: ValidationError, root: type[BaseModel], source: YamlSource) -> str:
    """The whole message for a file that does not validate: a heading and a line for each finding."""
    findings: dict[KeyPath, list[Any]] = {}
    for finding in error.errors(include_url=False, include_context=False):
        findings.setdefault(_keys_of(finding["loc"], source.tree), []).append(finding)
    lines = []
    for keys, group in findings.items():
        group = [each for each in group if not _echoes(each, keys, findings)]
        if len(group) > 1 and all(len(each["loc"]) > len(keys) and each["type"] != "missing" for each in group):
            wanted = " or ".join(_wish(each) for each in group)
            lines.append(f"  {source.where(keys)}: {_dotted(keys)}={group[0]['input']!r}: should be {wanted}.")
            continue
        for finding in group:
            lines.append(f"  {_where(finding, keys, source)}: {_sentence(finding, keys, root)}")
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


def _echoes(finding: Any, keys: KeyPath, findings: dict[KeyPath, list[Any]]) -> bool:
    """A list is also found too short when its items were refused; their own findings say it better."""
    below = any(len(other) > len(keys) and other[: len(keys)] == keys for other in findings)
    return bool(finding["type"] == "too_short" and below)


def _wish(finding: Any) -> str:
    """What one branch of a union would have taken, such as `'auto'` or `a valid integer`."""
    return str(finding["msg"]).removeprefix("Input should be ").partition(",")[0]


def _where(finding: Any, keys: KeyPath, source: YamlSource) -> str:
    """The line of the finding; of a check that names several keys, the first that the file or an override sets."""
    if finding["type"] == "value_error":
        named = [(*keys, *_parts(match)) for match in _NAMED_KEY.findall(finding["msg"])]
        for candidates in (source.overridden, source.lines):
            for candidate in named:
                if candidate in candidates:
                    return source.where(candidate)
    return source.where(keys)


def _sentence(finding: Any, keys: KeyPath, root: type[BaseModel]) -> str:
    dotted = _dotted(keys)
    if finding["type"] == "extra_forbidden":
        section = _section_at(root, keys[:-1])
        valid = sorted(_key_names(section)) if section else []
        near = difflib.get_close_matches(str(keys[-1]), valid, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Valid here: {', '.join(valid)}."
        return f"{dotted}: unknown key. {hint}"
    if finding["type"] == "missing" and len(finding["loc"]) > len(keys):
        return f"{dotted}={finding['input']!r}: too few items; number {finding['loc'][len(keys)]} is missing. Add it."
    if finding["type"] == "missing":
        return f"{dotted}: required and not set. Add it."
    message = finding["msg"].removeprefix("Value error, ")
    if finding["type"] == "value_error":
        return f"{dotted}: {message}" if dotted else message
    message = _REWORDED.get(finding["type"], message.removeprefix("Input ").removeprefix("Tuple "))
    return f"{dotted}={finding['input']!r}: {message}."


def _dotted(keys: KeyPath) -> str:
    return ".".join(map(str, keys))


def _parts(dotted: str) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))


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
