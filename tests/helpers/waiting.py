"""Waiting for what another process does, with a deadline."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

ValueT = TypeVar("ValueT")


def until(what: Callable[[], ValueT], why: str, deadline_s: float = 30.0) -> ValueT:
    """Ask until the answer is true, and return it."""
    end = time.monotonic() + deadline_s
    while not (answer := what()):
        assert time.monotonic() < end, f"not within {deadline_s} s: {why}"
        time.sleep(0.01)
    return answer


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
