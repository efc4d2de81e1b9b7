"""`stormjib run FILE`."""

import argparse

from cluster.commands.arguments import add_run_file, config_of

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE and overrides."""
    add_run_file(parser)
    parser.add_argument("--no-serve", action="store_true", help="end after the export")


def execute(arguments: argparse.Namespace) -> int:
    """Prepare, train, export and serve."""
    config = config_of(arguments)
    from cluster.console import RunConsole
    from cluster.run_flow import run_all, train_and_export

    console = RunConsole(total_steps=config.train.steps)
    return train_and_export(config, console) if arguments.no_serve else run_all(config, console)
