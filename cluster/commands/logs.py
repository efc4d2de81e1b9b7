"""`stormjib logs FILE`: the logs of a run's ranks."""

import argparse

from cluster.commands.arguments import add_run_file, config_of
from cluster.run_store import RunFolder
from data_service import storage
from data_service.errors import ConfigError

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, overrides, which rank of which attempt, and how much."""
    add_run_file(parser)
    parser.add_argument("--rank", type=int, help="only this rank")
    parser.add_argument("--attempt", type=int, help="only this attempt; by default the newest")
    parser.add_argument("--lines", type=int, default=50, metavar="N", help="the last N lines of each log (50)")


def execute(arguments: argparse.Namespace) -> int:
    """Print the ends of the logs."""
    folder = RunFolder(config_of(arguments).root)
    attempts = sorted(storage.list_names(folder.logs_uri), key=lambda name: int(name.rpartition("_")[2]))
    if not attempts:
        raise ConfigError(f"{folder.logs_uri}: no logs. Has the run started its ranks?")
    wanted = attempts[-1] if arguments.attempt is None else f"attempt_{arguments.attempt}"
    names = [
        name
        for name in storage.list_names(f"{folder.logs_uri}/{wanted}")
        if arguments.rank is None or name == f"rank_{arguments.rank:05d}.log"
    ]
    if not names:
        raise ConfigError(f"{folder.logs_uri}/{wanted}: no such log. There are: {', '.join(attempts)}.")
    for name in names:
        text = storage.read_bytes(f"{folder.logs_uri}/{wanted}/{name}").decode(errors="replace")
        print(f"==> {wanted}/{name} <==")
        print("\n".join(text.splitlines()[-arguments.lines :]))
    return 0
