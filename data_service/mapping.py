"""Applying a function to work items in order: here, or in processes of this machine.

Owns the `Mapper` protocol, the serial mapper and the pool of processes. The mapper over Ray tasks is `cluster.ray_map`.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Protocol, Self, TypeVar

from data_service.errors import DataError

__all__ = ["ItemT", "Mapper", "ProcessMapper", "ResultT", "num_cpus", "serial"]

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_AHEAD = 2
"""Items waiting or running for each process, so that results waiting their turn stay few."""


class Mapper(Protocol):
    """Applies a function to items, possibly elsewhere and several at once, and yields the results in order."""

    def __call__(self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
        """Yield `function(item)` for each item, in order. Function, items and results can be pickled."""


def serial(function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
    """The mapper that does everything here, one after the other."""
    return map(function, items)


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProcessMapper:
    """A mapper over processes of this machine, which start with the first call that has several items.

    Each encodes on one thread. They end with the process that made them, however that ends.
    """

    def __init__(self, processes: int | None = None) -> None:
        """Set up.

        Args:
            processes: how many; None takes one for each CPU. With 1 everything is done here.
        """
        self._processes = num_cpus() if processes is None else processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __call__(self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
        """Yield `function(item)` for each item, in order.

        Raises:
            DataError: when a process was killed, for example for want of memory.
        """
        if self._processes == 1 or len(items) <= 1:
            return serial(function, items)
        return self._apply(function, items)

    def _apply(self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
        if self._pool is None:
            # Spawned, not forked: threads of the tokenizer and of s3fs do not survive a fork.
            self._pool = ProcessPoolExecutor(
                self._processes, mp_context=multiprocessing.get_context("spawn"), initializer=_start_process
            )
        pending: deque[Future[ResultT]] = deque()
        todo = iter(items)
        try:
            while True:
                while len(pending) < _AHEAD * self._processes:
                    try:
                        pending.append(self._pool.submit(function, next(todo)))
                    except StopIteration:
                        break
                if not pending:
                    return
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            self._pool = None
            raise DataError(
                f"{self._processes} processes were preparing the data, one of them was killed, perhaps for want of "
                "memory. What was finished is kept: prepare again, with fewer --processes where memory is short."
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _start_process() -> None:
    """Set up a process of the pool: one thread in the tokenizer, and an end when its parent has ended."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
