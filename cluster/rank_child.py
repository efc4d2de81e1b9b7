"""One rank process as its agent holds it: start, commands, messages, exit, last words. No Ray, no torch.

Two threads follow each process: one reads its messages, one waits for its end, so that an exit is known within
milliseconds, and always after the last message.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

__all__ = ["RankChild"]

_log = logging.getLogger(__name__)

_PACKAGE_ROOT = str(Path(__file__).resolve().parent.parent)
_TAIL_LINES = 30
_TAIL_BYTES = 32 * 2**10
_DRAIN_S = 2.0
"""How long the last messages of a process that has ended may take to be read."""


class RankChild:
    """A process of `cluster.rank_process`. Created and used by one thread: the process dies when that thread ends."""

    def __init__(
        self,
        device: Literal["cpu", "cuda"],
        threads: int,
        *,
        on_message: Callable[["RankChild", dict[str, Any]], None],
        on_exit: Callable[["RankChild", int], None],
    ) -> None:
        """Start it as a standby.

        Args:
            device: what it will run on.
            threads: CPU threads of its libraries.
            on_message: called with each message, from a thread of this object.
            on_exit: called once, after the last message, with the exit status (negative: a signal), from a thread.
        """
        self.device: Literal["cpu", "cuda"] = device
        self.threads = threads
        self.attempt = 0
        """0 while it is a standby."""
        self.rank = -1
        self.error: dict[str, Any] | None = None
        """What the rank said of its failure."""
        self.killed = False
        """Whether `kill` was called."""
        self._on_message, self._on_exit = on_message, on_exit
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (has no name: nothing to remove)
        self._log_path: Path | None = None
        reading, writing = os.pipe()
        command = (
            *(sys.executable, "-m", "cluster.rank_process"),
            *(f"--reports={writing}", f"--parent={os.getpid()}", f"--device={device}"),
        )
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(writing,),
                env=_environment(threads),
            )
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self._reader = threading.Thread(target=self._read, args=(reading,), name="rank-messages", daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, name="rank-exit", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def start(self, attempt: int, rank: int, spec_json: str, log: Path | None) -> None:
        """Make the standby a rank; its output goes to `log`, or stays here when that is None."""
        self.attempt, self.rank, self._log_path = attempt, rank, log
        self._send({"command": "start", "spec": spec_json, "log": None if log is None else str(log)})

    def stop_after(self, step: int) -> None:
        """Pass `StopAfter(step)` on."""
        self._send({"command": "stop_after", "step": step})

    def kill(self) -> None:
        """SIGKILL; `on_exit` follows."""
        self.killed = True
        self._process.kill()

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

    def _send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None, "standard input is a pipe"
        # A process that is gone cannot take a command; its exit is reported by itself.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()

    def _read(self, descriptor: int) -> None:
        with open(descriptor, "rb") as messages:
            for line in messages:
                try:
                    message = json.loads(line)
                except ValueError:
                    _log.warning("rank process %d was cut off in the middle of a message", self.pid)
                    continue
                if message["is"] == "error":
                    self.error = message
                self._on_message(self, message)

    def _wait(self) -> None:
        code = self._process.wait()
        self._reader.join(timeout=_DRAIN_S)
        self._on_exit(self, code)
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()


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
