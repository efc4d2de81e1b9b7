"""`stormjib serve FILE`: serve the newest export of a run until Ctrl-C."""

import argparse

from cluster.commands.arguments import add_run_file, config_of

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE and overrides."""
    add_run_file(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Serve."""
    config = config_of(arguments)
    from cluster.console import RunConsole
    from cluster.run_flow import serve_export

    return serve_export(config, RunConsole(total_steps=config.train.steps))
