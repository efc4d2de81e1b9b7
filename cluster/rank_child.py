"""Rank processes as their agent holds them: start, commands, messages, exit, last words. No Ray, no torch.

A `Nursery` is the process that forks ranks (`cluster.rank_process`), a `RankChild` one rank. A thread follows each, so
that an exit is known within milliseconds, and always after the rank's last message.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Literal

from cluster.rank_process import LONGEST_PACKET
from trainer.protocol import ProfileSteps

__all__ = ["Nursery", "RankChild"]

_log = logging.getLogger(__name__)

_PACKAGE_ROOT = str(Path(__file__).resolve().parent.parent)
_TAIL_LINES = 30
_TAIL_BYTES = 32 * 2**10
_DRAIN_S = 2.0
"""How long the last messages of a process that has ended may take to be read."""

Message = dict[str, Any]


class RankChild:
    """One rank process, made by `Nursery.fork`."""

    def __init__(
        self,
        attempt: int,
        rank: int,
        on_message: Callable[["RankChild", Message], None],
        on_exit: Callable[["RankChild", int], None],
    ) -> None:
        """Make the pipes; the process comes later."""
        self.attempt = attempt
        self.rank = rank
        self.pid: int | None = None
        """Process id, once it was forked."""
        self.error: Message | None = None
        """What the rank said of its failure, or its nursery of its own."""
        self.killed = False
        """Whether `kill` was called."""
        self._on_message, self._on_exit = on_message, on_exit
        self._lock = threading.Lock()
        self._ended = False
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (has no name: nothing to remove)
        self._log_path: Path | None = None
        self._commands_read, self._commands = os.pipe()
        messages, self._messages_write = os.pipe()
        self._reader = threading.Thread(target=self._read, args=(messages,), name="rank-messages", daemon=True)

    def start(self, spec_json: str, log: Path | None) -> None:
        """Tell it what to be; its output goes to `log`, or stays here when that is None."""
        self._log_path = log
        self._send({"command": "start", "spec": spec_json, "log": None if log is None else str(log)})

    def stop_after(self, step: int) -> None:
        """Pass `StopAfter(step)` on."""
        self._send({"command": "stop_after", "step": step})

    def profile(self, request: ProfileSteps) -> None:
        """Pass a request for a trace on."""
        self._send({"command": "profile", **asdict(request)})

    def kill(self) -> None:
        """SIGKILL; `on_exit` follows. One that was not forked yet counts as ended, and ends when it is."""
        with self._lock:
            self.killed = True
            pid = self.pid
            if pid is not None and not self._ended:
                _kill(pid)
        if pid is None:
            self.end(-signal.SIGKILL)

    def output(self, limit: int = _TAIL_BYTES) -> bytes:
        """The last bytes of its output."""
        parts = [_tail(self._output.fileno(), limit)]
        if self._log_path is not None:
            with contextlib.suppress(FileNotFoundError), self._log_path.open("rb") as file:
                parts.append(_tail(file.fileno(), limit))
        return b"".join(parts)[-limit:]

    def log_tail(self) -> tuple[str, ...]:
        """The last lines of its output, at most 30."""
        return tuple(self.output().decode(errors="replace").splitlines()[-_TAIL_LINES:])

    def hand_over(self) -> tuple[int, int, int]:
        """Descriptors for the process: commands, messages, output."""
        self._reader.start()
        return self._commands_read, self._messages_write, self._output.fileno()

    def close_handed_over(self) -> None:
        """Close this side's copies, so that the ends of the pipes are the process's alone."""
        os.close(self._commands_read)
        os.close(self._messages_write)

    def forked(self, pid: int) -> None:
        """The nursery made the process."""
        with self._lock:
            self.pid = pid
            if self.killed:
                _kill(pid)

    def orphaned(self, error: Message) -> None:
        """The nursery is gone, and the process with it, if it ever was."""
        with self._lock:
            self.error = self.error or error
            if self.pid is not None and not self._ended:
                _kill(self.pid)
        self.end(1 if self.pid is None else -signal.SIGKILL)

    def end(self, code: int) -> None:
        """The process has ended, or will before it does anything; the first call counts."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            os.close(self._commands)
        if self.pid is not None:
            self._reader.join(timeout=_DRAIN_S)
        self._on_exit(self, code)

    def _send(self, command: Message) -> None:
        data = json.dumps(command).encode() + b"\n"
        # A process that is gone cannot take a command; its exit is reported by itself.
        with self._lock, contextlib.suppress(BrokenPipeError):
            while data and not self._ended:
                data = data[os.write(self._commands, data) :]

    def _read(self, descriptor: int) -> None:
        with open(descriptor, "rb") as messages:
            for line in messages:
                try:
                    message = json.loads(line)
                except ValueError:
                    _log.warning("rank %d was cut off in the middle of a message", self.rank)
                    continue
                if message["is"] == "error":
                    self.error = message
                self._on_message(self, message)


class Nursery:
    """The process that forks ranks. Created by a thread that stays: the process dies when that thread ends."""

    def __init__(self, device: Literal["cpu", "cuda"], threads: int) -> None:
        """Start loading.

        Args:
            device: what its ranks will run on.
            threads: CPU threads of their libraries.
        """
        self.loaded = False
        """Whether ranks can start at once."""
        self.gone = False
        """Whether its process has ended; it forks no more ranks then."""
        self._error: Message | None = None
        self._children: dict[int, RankChild] = {}
        self._lock = threading.Lock()
        self._next_id = 1
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (has no name: nothing to remove)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = (
            *(sys.executable, "-m", "cluster.rank_process"),
            *(f"--socket={theirs.fileno()}", f"--parent={os.getpid()}", f"--device={device}"),
        )
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(theirs.fileno(),),
                env=_environment(threads),
            )
        threading.Thread(target=self._follow, name="rank-nursery", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def fork(
        self,
        attempt: int,
        rank: int,
        *,
        on_message: Callable[[RankChild, Message], None],
        on_exit: Callable[[RankChild, int], None],
    ) -> RankChild:
        """A new rank process, as soon as everything is loaded; it waits for `RankChild.start`.

        Args:
            attempt: kept with the child.
            rank: kept with the child, and part of the process's name.
            on_message: called with each message, from a thread.
            on_exit: called once, after the last message, with the exit status (negative: a signal), from a thread.
        """
        child = RankChild(attempt, rank, on_message, on_exit)
        with self._lock:
            number, self._next_id = self._next_id, self._next_id + 1
            self._children[number] = child
        request = json.dumps({"is": "fork", "id": number, "name": f"rank-{rank}"}).encode()
        try:
            socket.send_fds(self._socket, [request], list(child.hand_over()))
        except OSError:
            _log.warning("the nursery of ranks ended before rank %d was forked", rank)
            with self._lock:
                self._children.pop(number, None)
            child.orphaned(self._error or _ended_early())
        finally:
            child.close_handed_over()
        return child

    def kill(self) -> None:
        """SIGKILL; its ranks die with it."""
        self._process.kill()

    def _follow(self) -> None:
        with contextlib.suppress(ConnectionResetError):
            while packet := self._socket.recv(LONGEST_PACKET):
                self._take(json.loads(packet))
        self.gone = True
        code = self._process.wait()
        tail = _tail(self._output.fileno(), _TAIL_BYTES).decode(errors="replace")
        if code != 0:
            _log.warning("the nursery of ranks ended with %d:\n%s", code, tail)
        if self._error is None:
            message = f"The process that starts ranks ended with {code}.\n{tail}"
            self._error = {"is": "error", "type": None, "message": message, "retryable": code < 0}
        with self._lock:
            left, self._children = list(self._children.values()), {}
        for child in left:
            child.orphaned(self._error)

    def _take(self, message: Message) -> None:
        if message["is"] == "loaded":
            self.loaded = True
            _log.info("ranks can start: libraries were loaded in %.1f s", message["seconds"])
        elif message["is"] == "error":
            self._error = message
        elif message["is"] == "forked":
            with self._lock:
                forked = self._children[message["id"]]
            forked.forked(message["pid"])
        elif message["is"] == "exit":
            with self._lock:
                ended = self._children.pop(message["id"])
            ended.end(message["code"])


def _ended_early() -> Message:
    message = "The process that starts ranks ended before this one was started."
    return {"is": "error", "type": None, "message": message, "retryable": True}


def _kill(pid: int) -> None:
    """SIGKILL a process whose end may be on its way to us."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _tail(descriptor: int, limit: int) -> bytes:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, limit, max(0, size - limit))


def _environment(threads: int) -> dict[str, str]:
    """What a rank inherits: no Ray, our packages importable, few threads."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    paths = [_PACKAGE_ROOT, *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
