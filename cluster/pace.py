"""How long work will still take, from how fast it lately was.

Owns this estimate. Reads no clock.
"""

from collections import deque

__all__ = ["Pace", "shown_seconds"]

_WINDOW_S = 60.0


class Pace:
    """The pace of one stage: amounts done at times told."""

    def __init__(self) -> None:
        self._stage = ""
        self._told: deque[tuple[float, int]] = deque()

    def left_s(self, stage: str, done: int, total: int, now: float) -> float | None:
        """Seconds that the rest of a stage takes at the pace of the last minute; None before anything was done.

        Args:
            stage: its name; another one begins anew.
            done: amount done, of `total`.
            total: amount of the stage.
            now: seconds on any clock that does not go back.
        """
        if stage != self._stage:
            self._stage = stage
            self._told.clear()
        self._told.append((now, done))
        # One entry older than the window stays, so that rare reports are measured as well.
        while len(self._told) > 2 and now - self._told[1][0] >= _WINDOW_S:
            self._told.popleft()
        began, at_first = self._told[0]
        if done <= at_first or now <= began:
            return None
        return (total - done) * (now - began) / (done - at_first)


def shown_seconds(seconds: float) -> str:
    """A length of time for people, such as `40 s`, `12 min` or `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
