"""An ordered map over Ray tasks, for the preparation of datasets."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from data_service.errors import StormjibError
from data_service.mapping import ItemT, Mapper, ResultT, serial

__all__ = ["ray_mapper"]

_MOST_TASKS = 256
"""Tasks in flight at most, so that results waiting their turn stay few."""


def ray_mapper(parallel: int | None = None) -> Mapper:
    """A mapper that runs each item as a Ray task and yields the results in the order of the items.

    Tasks are spread over the nodes, with at most `parallel` in flight, and run again when their node dies. They ask Ray
    for no CPU: the run's agents hold those already, and no rank computes while data are prepared. A single item is
    worked on in this process: the start of a worker process costs more than a megabyte of text. Each encodes on one
    thread.

    Args:
        parallel: tasks in flight; None takes the cluster's CPUs, counting this machine's once however many local nodes
            it carries.

    Raises:
        StormjibError: what the function raised, as it was raised there.
    """

    def apply(function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
        if len(items) <= 1:
            return serial(function, items)
        return _map(function, items, min(_MOST_TASKS, parallel if parallel is not None else _num_cpus()))

    return apply


def _map(function: Callable[[ItemT], ResultT], items: Sequence[ItemT], parallel: int) -> Iterator[ResultT]:
    task: Any = ray.remote(num_cpus=0, scheduling_strategy="SPREAD", max_retries=3)(_call)
    handed_over = ray.put(function)
    waiting: deque[Any] = deque()
    todo = iter(items)
    try:
        while True:
            while len(waiting) < max(1, parallel):
                try:
                    waiting.append(task.remote(handed_over, next(todo)))
                except StopIteration:
                    break
            if not waiting:
                return
            yield _result(waiting.popleft())
    finally:
        for ref in waiting:
            ray.cancel(ref)


def _call(function: Callable[[ItemT], ResultT], item: ItemT) -> ResultT:
    # As many tasks run as there are CPUs; more threads in each would only stand in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return function(item)


def _result(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, StormjibError):
            raise error.cause from None
        raise


def _num_cpus() -> int:
    total = 0
    has_local = False
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"] and node["NodeManagerAddress"].startswith("127."):
            has_local = True
        elif node["Alive"]:
            total += int(node["Resources"].get("CPU", 0))
    return max(1, total + (os.cpu_count() or 1) * has_local)
