"""Wall time and processor time of this process, its children that ended included."""

import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

__all__ = ["Reading", "cpu_s", "measure", "report"]


@dataclass(frozen=True)
class Reading:
    """Tokens that came, and what they took."""

    setting: str
    tokens: int
    wall_s: float
    cpu_s: float
    """Of the reading process: its trainer's share."""

    @property
    def tokens_per_s(self) -> float:
        """Per second of wall time."""
        return self.tokens / self.wall_s

    @property
    def tokens_per_cpu_s(self) -> float:
        """Per second of the reader's processor time."""
        return self.tokens / self.cpu_s


def cpu_s() -> float:
    """User and system time of this process and of its children that ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def measure(setting: str, sizes: Iterator[int]) -> Reading:
    """Drain an iterator of token counts, from before its first item on: what is read ahead is measured too."""
    wall, cpu = time.perf_counter(), cpu_s()
    tokens = sum(sizes)
    return Reading(setting, tokens, time.perf_counter() - wall, cpu_s() - cpu)


def report(readings: list[Reading]) -> None:
    """Print what was measured, for the process that started this one."""
    sys.stdout.write(json.dumps([asdict(one) for one in readings]) + "\n")
    sys.stdout.flush()
