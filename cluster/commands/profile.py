"""`stormjib profile FILE --steps N`: ask a run in progress for a trace of its next steps."""

import argparse
import re
import time

from cluster.commands.arguments import add_run_file, config_of
from cluster.commands.status import CONTROLLER_GONE, controller_of
from cluster.events import Event
from cluster.run_store import RunFolder
from cluster.states import RunState
from data_service import storage
from data_service.errors import ConfigError

__all__ = ["add_arguments", "execute"]

_TRACE = re.compile(r"rank_\d+\.json\.gz")
"""As `trainer.tracing` names them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, overrides, --steps and --wait."""
    add_run_file(parser)
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="optimizer steps to trace (default 3)")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="wait so long for all ranks' traces")


def execute(arguments: argparse.Namespace) -> int:
    """Leave the request in the run's folder; exit 1 when nobody reads it, or a rank's trace does not come in time."""
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
    return _wait(folder, uri, arguments.wait) if arguments.wait else 0


def _wait(folder: RunFolder, uri: str, seconds: float) -> int:
    """Wait for a file of every rank; the exit code."""
    deadline, names = time.monotonic() + seconds, list[str]()
    while time.monotonic() < deadline:
        names = sorted(filter(_TRACE.fullmatch, storage.list_names(uri)))
        if names and len(names) >= _num_ranks(folder):
            print(f"{uri}: {', '.join(names)}; open them in https://ui.perfetto.dev or chrome://tracing")
            return 0
        time.sleep(0.2)
    there = ", ".join(names) or "none"
    print(f"{uri}: traces of {_num_ranks(folder)} ranks did not come within {seconds:g} s; there are: {there}")
    return 1


def _num_ranks(folder: RunFolder) -> int:
    """Ranks of the newest attempt; at least 1."""
    attempts = [event for event in folder.events() if event["event"] == Event.ATTEMPT_STARTED.value]
    return int(attempts[-1]["dp"]) * int(attempts[-1]["pp"]) if attempts else 1
