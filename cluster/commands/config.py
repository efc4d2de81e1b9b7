"""`stormjib config FILE`: check a run file, or show every key with its value or its meaning."""

import argparse
import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from cluster.commands.arguments import config_of
from cluster.config import RunConfig, dump_yaml

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE is optional: without it the keys are explained."""
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="the run's YAML file; without it, all keys are explained"
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="dotted overrides")
    parser.add_argument("--resolved", action="store_true", help="print every key with its value")


def execute(arguments: argparse.Namespace) -> int:
    """Print what was asked for."""
    if arguments.file is None:
        for line in _explained(RunConfig, ""):
            print(line)
        return 0
    config = config_of(arguments)
    if arguments.resolved:
        print(dump_yaml(config), end="")
    else:
        print(f"{arguments.file}: valid; the run's folder is {config.root}")
    return 0


def _explained(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in section.model_fields.items():
        key = f"{prefix}{info.alias or name}"
        inner = _section_of(info.annotation)
        if inner is not None:
            yield f"{key}: {info.description}"
            yield from _explained(inner, f"{key}.0." if get_origin(info.annotation) is tuple else f"{key}.")
        else:
            default = "(required)" if info.is_required() else repr(info.get_default(call_default_factory=True))
            description = " ".join((info.description or "").split())
            yield f"{key} = {default}: {description}"


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return next((found for item in get_args(annotation) if (found := _section_of(item))), None)
    return None
