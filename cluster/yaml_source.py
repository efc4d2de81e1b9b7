"""A YAML file with the line of every key, and overrides on top."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_service.errors import ConfigError

__all__ = ["KeyPath", "YamlSource"]

KeyPath = tuple[str | int, ...]


@dataclass
class YamlSource:
    """The parsed tree of a file, where each key stands, and which keys an override set."""

    path: Path
    tree: dict[str, Any]
    lines: dict[KeyPath, int]
    overridden: dict[KeyPath, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Relative paths in the file start here."""
        return self.path.resolve().parent

    @classmethod
    def read(cls, path: Path) -> "YamlSource":
        """Parse the file. Raises ConfigError when it is missing, not YAML, not a mapping, or repeats a key."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as cause:
            raise ConfigError(f"{path}: cannot read the run file ({cause.strerror}). Check the path.") from cause
        except UnicodeDecodeError as cause:
            raise ConfigError(f"{path}: not UTF-8 (byte {cause.start}). Save the file as UTF-8.") from cause
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            tree = yaml.safe_load(text)
        except yaml.YAMLError as cause:
            mark = getattr(cause, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise ConfigError(f"{path}{line}: not valid YAML: {getattr(cause, 'problem', cause)}.") from cause
        if not isinstance(tree, dict) or node is None:
            raise ConfigError(f"{path}: a run file is a mapping of sections (run, cluster, data, model, train, serve).")
        lines: dict[KeyPath, int] = {}
        _collect(node, (), lines, path, ())
        return cls(path, tree, lines)

    def override(self, text: str) -> None:
        """Apply one `dotted.key=value`; the value is YAML. Raises ConfigError when it is not of that form."""
        dotted, equals, value = text.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"override {text!r}: write it as dotted.key=value, for example train.parallel.pp=2.")
        try:
            parsed = yaml.safe_load(value) if value else None
        except yaml.YAMLError as cause:
            raise ConfigError(f"override {text!r}: the value is not valid YAML.") from cause
        keys: KeyPath = tuple(int(part) if part.isdigit() else part for part in dotted.split("."))
        holder: Any = self.tree
        for depth, key in enumerate(keys):
            last = depth == len(keys) - 1
            if isinstance(holder, list):
                if not isinstance(key, int) or key >= len(holder):
                    raise ConfigError(
                        f"override {text!r}: {'.'.join(map(str, keys[:depth]))} is a list of {len(holder)}; "
                        f"{key!r} is not one of its positions."
                    )
            elif not isinstance(holder, dict):
                raise ConfigError(f"override {text!r}: {'.'.join(map(str, keys[:depth]))} has no keys below it.")
            if last:
                holder[key] = parsed
            else:
                if isinstance(holder, dict) and holder.get(key) is None:
                    holder[key] = {}
                holder = holder[key]
        replaced = [held for held in self.lines if held[: len(keys)] == keys]
        for held in replaced:
            del self.lines[held]
        self.overridden[keys] = text

    def where(self, keys: KeyPath) -> str:
        """`FILE:LINE` of the nearest key that the file holds, or the override that set it."""
        for end in range(len(keys), 0, -1):
            if keys[:end] in self.overridden:
                return f"override {self.overridden[keys[:end]]!r}"
            if keys[:end] in self.lines:
                return f"{self.path}:{self.lines[keys[:end]]}"
        return str(self.path)


def _collect(
    node: yaml.Node, prefix: KeyPath, lines: dict[KeyPath, int], path: Path, above: tuple[yaml.Node, ...]
) -> None:
    if node in above:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: an alias stands inside what it names. Remove it.")
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            keys = (*prefix, str(key_node.value))
            if keys in lines:
                raise ConfigError(
                    f"{path}:{key_node.start_mark.line + 1}: {'.'.join(map(str, keys))} appears twice "
                    f"(first on line {lines[keys]}). Remove one."
                )
            lines[keys] = key_node.start_mark.line + 1
            _collect(value_node, keys, lines, path, above)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*prefix, index)] = item.start_mark.line + 1
            _collect(item, (*prefix, index), lines, path, above)
