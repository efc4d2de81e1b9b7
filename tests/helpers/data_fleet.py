"""A data service of processes that tests kill, stop and start, and readers that measure what they wait."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_service.access import DataAccess
from data_service.client import DataClient
from data_service.plan import OrderSpec
from data_service.schema import BatchSlice
from tests.helpers.data_runs import TOKEN, control_process, worker_process
from tests.helpers.written_datasets import WrittenDataset

Process = subprocess.Popen[str]


class Fleet:
    """A control plane and data workers, each a process."""

    def __init__(self, dataset: WrittenDataset) -> None:
        self.dataset = dataset
        self._stack = contextlib.ExitStack()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port = listener.getsockname()[1]
        self.control_address = f"127.0.0.1:{self._port}"
        self.control = self.start_control()
        self.workers: list[Process] = []

    def start_control(self) -> Process:
        self.control, address = self._stack.enter_context(control_process(self.dataset.uri, self._port))
        assert address == self.control_address, "the control plane did not start"
        return self.control

    def start_worker(self) -> Process:
        worker, address = self._stack.enter_context(worker_process(self.dataset.uri, self.control_address))
        assert address, "the worker did not start"
        self.workers.append(worker)
        return worker

    def start_workers(self, count: int) -> None:
        """Start several at the same time."""
        threads = [threading.Thread(target=self.start_worker) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def kill_worker(self, worker: Process) -> None:
        self.workers.remove(worker)
        kill(worker)

    def access(self, order: OrderSpec, **bounds: float) -> DataAccess:
        return DataAccess((self.control_address,), TOKEN, order, self.dataset.manifest.digest, **bounds)  # type: ignore[arg-type]

    def close(self) -> None:
        for process in (*self.workers, self.control):
            process.kill()
        self._stack.close()


@contextlib.contextmanager
def fleet(dataset: WrittenDataset, num_workers: int) -> Iterator[Fleet]:
    """A service with so many workers."""
    found = Fleet(dataset)
    try:
        found.start_workers(num_workers)
        yield found
    finally:
        found.close()


def kill(process: Process) -> None:
    """End a process as a lost machine would."""
    process.kill()
    process.wait()


@contextlib.contextmanager
def stopped(process: Process) -> Iterator[None]:
    """A process that is there and does nothing."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)


@dataclass
class Reader:
    """A rank that takes a batch every `step_s`, in a thread, until it is told to end."""

    access: DataAccess
    slots: tuple[int, int]
    step_s: float
    slices: list[BatchSlice] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)
    """(when it came, how long it was waited for), in seconds."""
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self._ending = threading.Event()
        self._asked_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client = DataClient(self.access)
        try:
            stream = client.stream("train", 0, 10**9, self.slots)
            while not self._ending.is_set():
                self._asked_at = began = time.monotonic()
                self.slices.append(next(stream))
                now = time.monotonic()
                self.waits.append((now, now - began))
                self._ending.wait(max(0.0, self.step_s - (now - began)))
        except BaseException as error:
            self.error = error
        finally:
            client.close()

    def longest_wait(self, since: float) -> float:
        """The longest wait that ended, or goes on, after a moment; raises what ended the reader."""
        if self.error is not None:
            raise self.error
        going_on = time.monotonic() - self._asked_at - self.step_s
        return max([seconds for end, seconds in list(self.waits) if end >= since], default=0.0) + max(0.0, going_on)

    def until(self, count: int, timeout_s: float = 30.0) -> None:
        """Wait until so many batches came."""
        deadline = time.monotonic() + timeout_s
        while len(self.slices) < count:
            if self.error is not None:
                raise self.error
            assert time.monotonic() < deadline, f"{len(self.slices)} of {count} batches came in {timeout_s} s"
            time.sleep(0.01)

    def end(self) -> None:
        self._ending.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), "the reader hangs"
        if self.error is not None:
            raise self.error
