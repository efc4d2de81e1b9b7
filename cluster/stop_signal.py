"""Ctrl-C, SIGTERM and `stormjib stop`: one answer to "shall the run end at the next step boundary?"."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

__all__ = ["StopSignal"]

_LOOK_EVERY_S = 1.0


class StopSignal:
    """Collects requests to stop while it is entered.

    Where the run can save something (`deferred`), the first SIGINT or SIGTERM asks for a checkpoint and an orderly end,
    and the second interrupts at once. Elsewhere the first interrupts. `interrupted` tells whether a signal asked,
    rather than `stormjib stop`.
    """

    def __init__(self, requested_outside: Callable[[], bool], announce: Callable[[str], None]) -> None:
        self._requested_outside = requested_outside
        self._announce = announce
        self._asked = False
        self._deferring = False
        self.interrupted = False
        self._looked = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        """Take over the signals; in a thread that is not the main one only requests from outside count."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __call__(self) -> bool:
        """Whether somebody asked; looks at the run's folder at most once a second."""
        if not self._asked and time.monotonic() - self._looked >= _LOOK_EVERY_S:
            self._looked = time.monotonic()
            if self._requested_outside():
                self._asked = True
                self._announce("asked to stop: the run writes a checkpoint and ends at the next step")
        return self._asked

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """As long as the block runs, a first signal is kept for `__call__` to tell."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        again, self.interrupted = self.interrupted, True
        if again or not self._deferring:
            raise KeyboardInterrupt
        self._asked = True
        self._announce(
            f"{signal.Signals(number).name}: the run ends after a checkpoint at the next step; once more ends it now"
        )
