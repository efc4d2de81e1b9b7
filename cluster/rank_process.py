"""The process of one rank, from warm standby to exit.

    python -m cluster.rank_process --reports FD --parent PID --device cpu

It loads what a rank needs (torch, DeepSpeed, the trainer), then waits for its specification; a standby is the same
process started early. Commands come in as JSON lines on standard input, one object each:

    {"command": "start", "spec": "<JSON of a WorkerSpec>", "log": "<path>" | null}
    {"command": "stop_after", "step": 400}

and messages go out as JSON lines on the descriptor of `--reports`: `{"is": "warm", "seconds": 3.1}`,
`{"is": "report", "payload": "<JSON of a Report>"}`, `{"is": "error", "type": ..., "message": ..., "retryable": ...}`.
Standard output and error go to the rank's log as soon as its path is known.

It must not outlive its agent: it dies with SIGKILL when the agent does (Linux tells it), and when standard input
closes. It exits without Python's shutdown, which can hang in a communication library whose peers are gone.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, Literal

from data_service.errors import StormjibError
from trainer.protocol import NoHooks, Report, StopAfter, WorkerSpec, report_to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
_LONGEST_MESSAGE = 8000


class _Channel:
    """Messages to the agent."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._descriptor, data) :]


class _Hooks(NoHooks):
    """The rank's side of the rank protocol; snapshots are not taken."""

    def __init__(self, channel: _Channel) -> None:
        self.channel = channel
        self.stop_after: StopAfter | None = None

    def report(self, report: Report) -> None:
        self.channel.send({"is": "report", "payload": report_to_json(report)})

    def control(self) -> StopAfter | None:
        return self.stop_after


def _die_with_parent(parent: int) -> None:
    """Linux: SIGKILL when the thread that started this process ends; elsewhere standard input alone tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _listen(hooks: _Hooks, starts: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Read commands for ever; the end of standard input is the end of this process."""
    with open(0, "rb", closefd=False) as commands:
        for line in commands:
            command = json.loads(line)
            if command["command"] == "start":
                starts.put(command)
            elif command["command"] == "stop_after":
                hooks.stop_after = StopAfter(int(command["step"]))
    os.kill(os.getpid(), signal.SIGKILL)


def _log_to(path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _live(device: Literal["cpu", "cuda"], starts: "queue.SimpleQueue[dict[str, Any]]", hooks: _Hooks) -> None:
    """Load, wait for the specification, be the rank."""
    from trainer import worker

    began = time.monotonic()
    worker.preload(device)
    hooks.channel.send({"is": "warm", "seconds": time.monotonic() - began})
    start = starts.get()
    if start["log"] is not None:
        _log_to(start["log"])
    worker.run(WorkerSpec.from_json(start["spec"]), hooks)


def _tell(error: BaseException, channel: _Channel) -> int:
    """Write an error to the log and to the agent; returns the exit status."""
    traceback.print_exception(error)
    ours = error if isinstance(error, StormjibError) else None
    message = {
        "is": "error",
        "type": type(error).__name__,
        "message": (str(error) if ours else f"{type(error).__name__}: {error}")[:_LONGEST_MESSAGE],
        "retryable": ours.retryable if ours else False,
    }
    channel.send(message)
    return ours.exit_code if ours else 1


def main(arguments: "Sequence[str]") -> int:
    """Be a rank; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--reports", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    options = parser.parse_args(arguments)
    _die_with_parent(options.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    hooks = _Hooks(_Channel(options.reports))
    starts: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(hooks, starts), name="agent-commands", daemon=True).start()
    try:
        _live(options.device, starts, hooks)
    except BaseException as error:
        return _tell(error, hooks.channel)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    logging.shutdown()
    os._exit(status)
