"""The engine beside an event loop.

Owns the thread that runs passes and the way of the deltas to their requests. One or two consumers get every token as it
comes. With more of them deltas are gathered: each gets the first at once and later ones at most every `interval_s`,
merged per completion, so that a busy engine does not spend itself on messages. An abandoned request is aborted before
the next pass.
"""

import asyncio
import functools
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serve.engine.messages import Delta, EngineRequest, EngineStats
from serve.errors import EngineFailedError, ServeError

if TYPE_CHECKING:
    from serve.engine.core import EngineCore  # loads torch, which the ingress and the command line do without

__all__ = ["EngineDriver"]

_LOG = logging.getLogger(__name__)
_CONSUMERS_BY_TOKEN = 2
_CONSUMERS_AT_FULL_RATE = 4
_LONGEST_INTERVAL_S = 0.1


@dataclass
class _Mailbox:
    """Deltas on their way to one consumer; touched by the event loop's thread only."""

    open_completions: int
    interval_s: float | None
    """None: only a completion's end wakes the consumer."""
    pending: dict[int, Delta] = field(default_factory=dict)
    error: ServeError | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    last_sent_s: float | None = None
    """Loop time at which the consumer was last woken."""
    timer: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """Let the consumer take what is pending."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.last_sent_s = asyncio.get_running_loop().time()
        self.ready.set()

    def wake_in_time(self, num_consumers: int) -> None:
        """Wake the consumer now, or once the interval since the last time is over.

        Few consumers do not wait; with many the interval grows, so that their messages together stay about as many.
        """
        if self.interval_s is None:
            return
        loop = asyncio.get_running_loop()
        interval_s = min(self.interval_s * max(1.0, num_consumers / _CONSUMERS_AT_FULL_RATE), _LONGEST_INTERVAL_S)
        due_s = loop.time()
        if self.last_sent_s is not None and num_consumers > _CONSUMERS_BY_TOKEN:
            due_s = self.last_sent_s + interval_s
        if due_s <= loop.time():
            self.wake()
        elif self.timer is None:
            self.timer = loop.call_at(due_s, self.wake)


class EngineDriver:
    """Runs an `EngineCore` in a thread of its own."""

    def __init__(self, core: "EngineCore") -> None:
        """Start the thread; call inside the event loop that will consume.

        Args:
            core: handed over: only the thread touches it from now on.
        """
        self._core = core
        self._loop = asyncio.get_running_loop()
        self._mailboxes: dict[str, _Mailbox] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stats(self) -> EngineStats:
        """Load at this moment."""
        return self._core.stats()

    async def generate(self, request: EngineRequest, interval_s: float | None = 0.02) -> AsyncGenerator[list[Delta]]:
        """Complete a request; each item holds one delta of each completion that gained something.

        Closing the iterator early, or cancelling the task, aborts the request.

        Args:
            request: with an id that no other request under way has.
            interval_s: least time between two items with more than 2 requests under way, unless a completion ends;
                None: items only then. Grows, up to 0.1 s, with more than 4: a message through Ray Serve costs over a
                millisecond of CPU.

        Raises:
            ServeError: the request was refused, or the engine failed.
        """
        box = _Mailbox(len(request.prompts) * request.num_completions, interval_s)
        self._mailboxes[request.request_id] = box
        self._command(lambda: self._add(request))
        try:
            while box.open_completions:
                await box.ready.wait()
                box.ready.clear()
                if box.error is not None:
                    raise box.error
                deltas, box.pending = list(box.pending.values()), {}
                box.open_completions -= sum(delta.finish_reason is not None for delta in deltas)
                if deltas:  # a timer may go off after its deltas left with an earlier item
                    yield deltas
        finally:
            if box.timer is not None:
                box.timer.cancel()
            del self._mailboxes[request.request_id]
            if box.open_completions:
                self._command(lambda: self._core.abort(request.request_id))

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread; what is under way fails."""
        self._stopping = True
        self._command(lambda: None)
        self._thread.join(timeout_s)

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _add(self, request: EngineRequest) -> None:
        try:
            self._core.add(request)
        except ServeError as error:
            self._post(functools.partial(self._fail, request.request_id, error))

    def _post(self, callback: Callable[[], None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)

    def _run(self) -> None:
        while not self._stopping:
            with self._wake:
                while not self._commands and not self._core.has_work:
                    self._wake.wait()
                commands = list(self._commands)
                self._commands.clear()
            for command in commands:
                command()
            if self._stopping or not self._core.has_work:
                continue
            try:
                deltas = self._core.step()
            except Exception as cause:  # whatever a pass raises ends its requests, never the thread
                _LOG.exception("a pass of the engine failed")
                error = EngineFailedError(
                    f"a pass of the engine failed: {type(cause).__name__}. See the replica's log."
                )
                error.__cause__ = cause
                for request_id in self._core.abort_all():
                    self._post(functools.partial(self._fail, request_id, error))
                continue
            if deltas:
                self._post(functools.partial(self._deliver, deltas))

    def _deliver(self, deltas: list[tuple[str, Delta]]) -> None:
        for request_id, delta in deltas:
            box = self._mailboxes.get(request_id)
            if box is None:
                continue
            box.error = box.error or delta.error
            if delta.index in box.pending:
                box.pending[delta.index].absorb(delta)
            else:
                box.pending[delta.index] = delta
            if delta.finish_reason is not None:
                box.wake()
            else:
                box.wake_in_time(len(self._mailboxes))

    def _fail(self, request_id: str, error: ServeError) -> None:
        box = self._mailboxes.get(request_id)
        if box is not None:
            box.error = error
            box.wake()
