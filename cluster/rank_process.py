"""The nursery of a node's ranks, and the ranks that it forks.

    python -m cluster.rank_process --socket FD --parent PID --device cpu

A nursery loads what every rank needs (torch, DeepSpeed, the trainer: some 3 CPU seconds and 400 MB) once, then forks a
rank whenever its agent asks: a rank starts in milliseconds, before and after a loss, and shares that memory. It runs
one thread and nothing but imports before it forks, which is what makes forking sound. For `cuda` ranks load for
themselves after the fork: an import that touches the driver would spoil it for every child.

The agent speaks through a socket pair, JSON objects in packets. `{"is": "fork", "id": 3, "name": "rank-0"}` carries
three descriptors: commands, messages, output. The nursery answers `{"is": "forked", "id": 3, "pid": 4711}`, later
`{"is": "exit", "id": 3, "code": -9}`; of itself it tells `{"is": "loaded", "seconds": 3.1}`, or why it could not.

A rank reads commands as JSON lines, and writes messages as JSON lines:

    {"command": "start", "spec": "<JSON of a WorkerSpec>", "log": "<path>" | null}
    {"command": "stop_after", "step": 400}
    {"command": "profile", "number": 1, "steps": 3, "uri": "<folder for the traces>"}
    {"is": "report", "payload": "<JSON of a Report>"}
    {"is": "error", "type": ..., "message": ..., "retryable": ...}

None may outlive its parent: Linux kills a rank with its nursery and a nursery with its agent (SIGKILL), and a rank also
ends when its commands end. Ranks exit without Python's shutdown, which can hang in a communication library whose peers
are gone.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from data_service.errors import StormjibError
from trainer.protocol import NoHooks, ProfileSteps, Report, StopAfter, WorkerSpec, report_to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LONGEST_PACKET", "main"]

LONGEST_PACKET = 65536
"""Bytes of a packet between agent and nursery."""

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_LONGEST_MESSAGE = 8000


class _Channel:
    """A rank's messages to its agent."""

    def __init__(self, descriptor: int) -> None:
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
        self._channel = channel
        self.stop_after: StopAfter | None = None
        self.profile_steps: ProfileSteps | None = None

    def report(self, report: Report) -> None:
        self._channel.send({"is": "report", "payload": report_to_json(report)})

    def control(self) -> StopAfter | None:
        return self.stop_after

    def profile(self) -> ProfileSteps | None:
        return self.profile_steps


def _die_with_parent(parent: int) -> None:
    """Linux sends SIGKILL when the thread that started this process ends."""
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0 or os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _listen(descriptor: int, hooks: _Hooks, starts: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Read commands for ever; their end is the end of this process."""
    with open(descriptor, "rb") as commands:
        for line in commands:
            command = json.loads(line)
            if command["command"] == "start":
                starts.put(command)
            elif command["command"] == "stop_after":
                hooks.stop_after = StopAfter(int(command["step"]))
            elif command["command"] == "profile":
                hooks.profile_steps = ProfileSteps(int(command["number"]), int(command["steps"]), command["uri"])
    os.kill(os.getpid(), signal.SIGKILL)


def _log_to(path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    _redirect(descriptor)


def _redirect(descriptor: int) -> None:
    """Standard output and error go to `descriptor`, which is closed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _describe(error: BaseException) -> dict[str, Any]:
    """An error as a message for the agent; also written to the log."""
    traceback.print_exception(error)
    ours = error if isinstance(error, StormjibError) else None
    message = str(error) if ours else f"{type(error).__name__}: {error}"
    return {
        "is": "error",
        "type": type(error).__name__,
        "message": message[:_LONGEST_MESSAGE],
        "retryable": ours.retryable if ours else False,
    }


def _be_rank(parent: int, name: str, commands: int, messages: int, output: int) -> NoReturn:
    """What a forked process does for the rest of its life."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15])
    _die_with_parent(parent)
    for descriptor in (commands, messages):
        os.set_inheritable(descriptor, False)
    _redirect(output)
    channel = _Channel(messages)
    status = 0
    try:
        hooks = _Hooks(channel)
        starts: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(commands, hooks, starts), name="agent-commands", daemon=True).start()
        start = starts.get()
        if start["log"] is not None:
            _log_to(start["log"])
        from trainer import worker

        worker.run(WorkerSpec.from_json(start["spec"]), hooks)
    except BaseException as error:
        channel.send(_describe(error))
        status = error.exit_code if isinstance(error, StormjibError) else 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


class _Nursery:
    """Forks ranks and tells how they end."""

    def __init__(self, agent: socket.socket) -> None:
        self._agent = agent
        self._ids: dict[int, int] = {}
        wakeup, self._wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = wakeup
        signal.set_wakeup_fd(self._wakeup_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def tell(self, message: dict[str, Any]) -> None:
        self._agent.sendall(json.dumps(message).encode())

    def serve(self) -> None:
        """Fork and reap until the agent is gone."""
        sources: list[Any] = [self._agent, self._wakeup]
        while True:
            readable, _, _ = select.select(sources, [], [])
            if self._wakeup in readable:
                os.read(self._wakeup, 4096)
                self._reap()
            if self._agent in readable:
                packet, descriptors, _, _ = socket.recv_fds(self._agent, LONGEST_PACKET, 3)
                if not packet:
                    return
                self._fork(json.loads(packet), descriptors)

    def _fork(self, request: dict[str, Any], descriptors: list[int]) -> None:
        nursery = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in (self._agent.detach(), self._wakeup, self._wakeup_write):
                os.close(descriptor)
            _be_rank(nursery, request["name"], *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self._ids[pid] = request["id"]
        self.tell({"is": "forked", "id": request["id"], "pid": pid})

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid in self._ids:
                    self.tell({"is": "exit", "id": self._ids.pop(pid), "code": os.waitstatus_to_exitcode(status)})


def _load(device: Literal["cpu", "cuda"]) -> float:
    """Load what a rank needs, where that is safe before a fork; returns seconds."""
    began = time.monotonic()
    if device == "cpu":
        from trainer import worker

        worker.preload(device)
    return time.monotonic() - began


def main(arguments: "Sequence[str]") -> int:
    """Be a nursery; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    options = parser.parse_args(arguments)
    _die_with_parent(options.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    agent = socket.socket(fileno=options.socket)
    agent.set_inheritable(False)
    nursery = _Nursery(agent)
    try:
        nursery.tell({"is": "loaded", "seconds": _load(options.device)})
        nursery.serve()
    except (BrokenPipeError, ConnectionResetError):
        return 0
    except BaseException as error:
        with contextlib.suppress(OSError):
            nursery.tell(_describe(error))
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
