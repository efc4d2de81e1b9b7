"""A lease: the right to go on that runs out unless its holder hears from the one who granted it.

Pure but for the clock, which is passed in.
"""

import time
from collections.abc import Callable

__all__ = ["Lease"]


class Lease:
    """Runs out `seconds` after the last renewal.

    A machine that slept wakes up with its lease run out: the clock goes on while nobody renews.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Grant it now.

        Args:
            seconds: how long it holds without renewal; positive.
            clock: monotonic seconds.
        """
        if seconds <= 0:
            raise ValueError(f"A lease of {seconds} s never holds. Give a positive time.")
        self._seconds = seconds
        self._clock = clock
        self._renewed = clock()

    @property
    def seconds(self) -> float:
        """How long it holds without renewal."""
        return self._seconds

    def renew(self) -> None:
        """Hold it for another `seconds` from now; one that has run out comes back to life."""
        self._renewed = self._clock()

    def remaining_s(self) -> float:
        """Seconds until it runs out; 0 when it has."""
        return max(0.0, self._renewed + self._seconds - self._clock())

    @property
    def expired(self) -> bool:
        """Whether it has run out."""
        return self.remaining_s() <= 0.0
