"""A preparation in a process of its own, which tests can hold in the middle."""

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from typing import Any

from data_service.config import DataConfig
from data_service.errors import StormjibError
from data_service.encode import encode_chunk
from data_service.mapping import ItemT, ResultT
from data_service.prepare import prepare

DEADLINE_S = 60.0
_SPAWN = multiprocessing.get_context("spawn")


class _SetOnWait(logging.Handler):
    """Sets an event once the process says that it waits for another."""

    def __init__(self, event: Event) -> None:
        super().__init__()
        self._event = event

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("waiting for another process"):
            self._event.set()


@dataclass
class PrepareProcess:
    """One `prepare` in a child process."""

    config: DataConfig
    dataset: str
    held: bool = False
    """Whether it stops before it encodes, until `go_on` is set."""
    in_the_middle: Event = field(default_factory=_SPAWN.Event)
    go_on: Event = field(default_factory=_SPAWN.Event)
    waits: Event = field(default_factory=_SPAWN.Event)

    def start(self) -> "PrepareProcess":
        """Begin."""
        if not self.held:
            self.go_on.set()
        self._answers, answer = _SPAWN.Pipe(duplex=False)
        events = (self.in_the_middle, self.go_on, self.waits)
        self.process = _SPAWN.Process(target=_run, args=(self.config, self.dataset, *events, answer))
        self.process.start()
        answer.close()
        return self

    def result(self) -> tuple[str, str]:
        """("manifest", its JSON), or the kind and message of the error."""
        assert self._answers.poll(DEADLINE_S), "the preparation does not end"
        kind, text = self._answers.recv()
        self.process.join(DEADLINE_S)
        return kind, text

    def stop(self) -> None:
        """Kill it, if it still runs."""
        self.process.kill()
        self.process.join(DEADLINE_S)


def _run(config: DataConfig, dataset: str, in_the_middle: Event, go_on: Event, waits: Event, answer: Any) -> None:
    logging.getLogger("data_service").addHandler(_SetOnWait(waits))

    def mapper(function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
        if function is encode_chunk:
            in_the_middle.set()
            assert go_on.wait(DEADLINE_S)
        return map(function, items)

    try:
        answer.send(("manifest", prepare(config, dataset, mapper=mapper).to_json()))
    except (StormjibError, OSError) as error:
        answer.send((type(error).__name__, str(error)))
