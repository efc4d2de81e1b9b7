"""Ctrl-C, SIGTERM and `stormjib stop`: one answer to "shall the run end at the next step boundary?"."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Self

__all__ = ["StopSignal"]

_LOOK_EVERY_S = 1.0


class StopSignal:
    """Collects requests to stop while it is entered.

    The first SIGINT or SIGTERM asks for a checkpoint and an orderly end; the second interrupts at once.
    """

    def __init__(self, requested_outside: Callable[[], bool], announce: Callable[[str], None]) -> None:
        self._requested_outside = requested_outside
        self._announce = announce
        self._asked = False
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

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = self.interrupted = True
        self._announce(
            f"{signal.Signals(number).name}: the run ends after a checkpoint at the next step; once more ends it now"
        )
