"""`stormjib train FILE`."""

import argparse

from cluster.commands.arguments import add_run_file, config_of

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE and overrides."""
    add_run_file(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Prepare, train and export."""
    config = config_of(arguments)
    from cluster.console import RunConsole
    from cluster.run_flow import train_and_export

    return train_and_export(config, RunConsole(total_steps=config.train.steps))
