"""A preparation in a process of its own, which tests can hold in the middle."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from data_service import prepare as prepare_module
from data_service.config import DataConfig
from data_service.encode import encode_chunk
from data_service.errors import StormjibError
from data_service.mapping import ItemT, ProcessMapper, ResultT
from data_service.prepare import prepare
from data_service.stages import Sizes

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


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["data_service.prepare"])


def prepare_until_killed(
    config: DataConfig,
    dataset: str,
    *,
    sizes: Sizes,
    kill_at_rename: int | None = None,
    kill_after_s: float | None = None,
    processes: int = 1,
) -> bool:
    """Prepare in a process of its own, which gets SIGKILL in the middle; returns whether it ended before.

    Args:
        config: the `data` section.
        dataset: a folder.
        sizes: of the work items.
        kill_at_rename: the number of the rename (a file that becomes visible under its name) at which it kills itself;
            odd ones just before it, even ones just behind it.
        kill_after_s: seconds from its start to the kill.
        processes: of its mapper.
    """
    process = _FORKS.Process(target=_prepare_and_die, args=(config, dataset, sizes, kill_at_rename, processes))
    process.start()
    process.join(DEADLINE_S if kill_after_s is None else kill_after_s)
    if process.is_alive():
        assert kill_after_s is not None, "the preparation does not end"
        process.kill()
        process.join(DEADLINE_S)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == 0


def _prepare_and_die(config: DataConfig, dataset: str, sizes: Sizes, kill_at: int | None, processes: int) -> None:
    prepare_module._SIZES = sizes
    renames = 0
    rename = Path.replace

    def counted(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == kill_at and renames % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        moved = rename(self, target)
        if renames == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return moved

    Path.replace = counted  # type: ignore[method-assign]
    with ProcessMapper(processes) as mapper:
        prepare(config, dataset, mapper=mapper)
