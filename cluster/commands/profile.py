"""`stormjib profile FILE --steps N`: ask a run in progress for a trace of its next steps."""

import argparse
import time

from cluster.commands.arguments import add_run_file, config_of
from cluster.commands.status import CONTROLLER_GONE, controller_of
from cluster.run_store import RunFolder
from cluster.states import RunState
from data_service import storage
from data_service.errors import ConfigError

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, overrides, --steps and --wait."""
    add_run_file(parser)
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="optimizer steps to trace (default 3)")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="wait so long for the traces")


def execute(arguments: argparse.Namespace) -> int:
    """Leave the request in the run's folder; exit 1 when nobody reads it, or no trace comes in time."""
    if arguments.steps < 1:
        raise ConfigError(f"--steps {arguments.steps}: a trace holds at least one step. Ask for 1 or more.")
    folder = RunFolder(config_of(arguments).root)
    events = folder.events()
    if not events or RunState(events[-1]["state"]).is_terminal:
        raise ConfigError(f"{folder.root}: no run is in progress here, so there is none to trace.")
    if controller_of(folder) == "gone":
        print(f"{folder.root}: {CONTROLLER_GONE}; there is nothing to trace")
        return 1
    uri = folder.request_profile(arguments.steps)
    print(f"{folder.root}: asked for a trace of {arguments.steps} steps; each rank writes to {uri}")
    deadline = time.monotonic() + arguments.wait
    while time.monotonic() < deadline:
        names = storage.list_names(uri)
        if names:
            print(f"{uri}: {', '.join(sorted(names))}; open them in https://ui.perfetto.dev or chrome://tracing")
            return 0
        time.sleep(0.2)
    return 1 if arguments.wait else 0
