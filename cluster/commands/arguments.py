"""Arguments that several commands share."""

import argparse

from cluster.config import RunConfig, load_config

__all__ = ["add_run_file", "config_of"]


def add_run_file(parser: argparse.ArgumentParser) -> None:
    """FILE and the dotted overrides after it."""
    parser.add_argument("file", metavar="FILE", help="the run's YAML file")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="dotted overrides, for example train.parallel.pp=2",
    )


def config_of(arguments: argparse.Namespace) -> RunConfig:
    """The checked configuration that FILE and the overrides describe."""
    return load_config(arguments.file, arguments.overrides)
