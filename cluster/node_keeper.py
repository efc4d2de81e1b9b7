"""Keeps one local Ray node: starts it, reaps it, and ends all of it when asked or when the one who asked is gone.

Run as a script with the standard library alone (`python -I -S node_keeper.py`), so that it costs some milliseconds and
megabytes. As a child subreaper (Linux) it becomes the parent of every orphan of the node, so that a walk over its
descendants finds the whole node, whatever process groups Ray makes. It ends the node when its standard input closes,
when its parent dies, when the node's first process exits, or on SIGTERM. Refuses to know anything of Ray.

Usage: node_keeper.py FOLDER -- COMMAND...; FOLDER is removed at the end. It lies in the cluster's folder, which
goes too when the owner of the cluster is gone.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time

__all__ = ["descendants", "main"]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.25
_KILL_S = 20.0
"""Processes that a SIGKILL has not ended after this long hang in the kernel; the keeper gives up on them."""


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) was refused")


def descendants(root: int) -> list[int]:
    """Live processes below `root`, parents before children; zombies are left out."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if fields[0] not in (b"Z", b"X"):
            children.setdefault(int(fields[1]), []).append(int(name))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(0), [])
        found.extend(below)
        queue.extend(below)
    return found


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _kill_all() -> None:
    """SIGKILL everything below this process until nothing is left; newcomers included."""
    deadline = time.monotonic() + _KILL_S
    while time.monotonic() < deadline:
        left = descendants(os.getpid())
        if not left:
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        _reap()
    _reap()


def _wait(first: int, parent: int, wakeup: int) -> None:
    """Return when the node is to end."""
    while True:
        readable, _, _ = select.select([0, wakeup], [], [], _POLL_S)
        if 0 in readable and not os.read(0, 4096):
            return
        if wakeup in readable and signal.SIGTERM in os.read(wakeup, 4096):
            return
        if os.getppid() != parent:
            return
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, _ = os.waitpid(-1, os.WNOHANG)
                if pid == first:
                    return
                if pid == 0:
                    break


def _remove(folder: str, *, orphaned: bool) -> None:
    """Remove the node's folder; the last keeper of a cluster whose owner is gone removes the cluster's folder too."""
    shutil.rmtree(folder, ignore_errors=True)
    root = os.path.dirname(folder)
    with contextlib.suppress(OSError):
        if orphaned and not any(entry.is_dir() for entry in os.scandir(root)):
            shutil.rmtree(root)


def main(arguments: list[str]) -> int:
    """Keep the node of `COMMAND` until it is to end; returns an exit status."""
    folder, separator, *command = arguments
    if separator != "--" or not command:
        return 2
    parent = os.getppid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wakeup, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.set_wakeup_fd(wakeup_write)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    try:
        _wait(first.pid, parent, wakeup)
    finally:
        _kill_all()
        _remove(folder, orphaned=os.getppid() != parent)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
