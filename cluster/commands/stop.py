"""`stormjib stop FILE`: ask the run's controller to write a checkpoint and to end."""

import argparse
import time

from cluster.commands.arguments import add_run_file, config_of
from cluster.commands.status import CONTROLLER_GONE, controller_of
from cluster.run_store import RunFolder
from cluster.states import RunState
from data_service.errors import ConfigError

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, overrides and --wait."""
    add_run_file(parser)
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="wait so long for the run to end")


def execute(arguments: argparse.Namespace) -> int:
    """Leave the request in the run's folder; exit 1 when nobody reads it, or the run does not end in time."""
    folder = RunFolder(config_of(arguments).root)
    events = folder.events()
    if not events:
        raise ConfigError(f"{folder.root}: no run was started here, so there is none to stop.")
    if RunState(events[-1]["state"]).is_terminal:
        print(f"{folder.root}: the run has ended already ({events[-1]['state']})")
        return 0
    if controller_of(folder) == "gone":
        print(f"{folder.root}: {CONTROLLER_GONE}; there is nothing to stop")
        return 1
    folder.request_stop()
    print(f"{folder.root}: asked to write a checkpoint and end")
    deadline = time.monotonic() + arguments.wait
    while time.monotonic() < deadline:
        state = RunState(folder.events()[-1]["state"])
        if state.is_terminal:
            print(f"{folder.root}: {state}")
            return 0
        if controller_of(folder) == "gone" and not RunState(folder.events()[-1]["state"]).is_terminal:
            print(f"{folder.root}: {CONTROLLER_GONE}")
            return 1
        time.sleep(0.2)
    return 1 if arguments.wait else 0
