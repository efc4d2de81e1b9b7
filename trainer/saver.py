"""Checkpoints beside training: a rank copies its fragments to host memory, and a thread writes them.

Owns the copy, the thread, and the order of saves: one is in flight at most, and the next save, a stop and the end of
the loop wait for it. A part that is not durable is not reported, so that a rank which dies in the middle of a save
leaves the checkpoint before as the newest. On GPUs the copy runs on a stream of its own into pinned memory, under the
forward and backward passes of the next step; `fence` keeps the next update from overtaking it. What a part is, and
where it lies, belongs to `trainer.checkpoint`.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_service import storage
from trainer.checkpoint import write_part
from trainer.errors import SaveFailedError
from trainer.fragments import BYTES_PER_ELEMENT, Fragment
from trainer.manifest import PartReceipt, TrainState
from trainer.protocol import PartReport

__all__ = ["CheckpointSaver"]

_SLOWEST_BYTES_PER_S = 1 << 20
_LONGEST_PAUSE_S = 600.0
"""A save that nobody else waits for may take so long, and a second for each MiB on top; the store's own deadlines end a
stuck one sooner."""
_SHARE_OF_PEERS = 0.75
"""Of the time that the other ranks wait for this one in a collective: what is left lets it say what it waits for."""
_NICENESS = 10
"""Of the writing thread: on a CPU it shares the cores with the ranks' arithmetic."""


@dataclass
class _Copy:
    """Fragments on their way into the host buffer."""

    fragments: list[Fragment]
    """On the host, whole once `done` has happened."""
    done: torch.cuda.Event | None
    fences: list[tuple[torch.cuda.Event, torch.cuda.Event]]
    """Around each wait of the computing stream for this copy."""

    def wait(self) -> None:
        """Block until the host memory holds the values."""
        if self.done is not None:
            self.done.synchronize()

    def fenced_s(self) -> float:
        """Seconds in which the computing stream stood still for it; `wait` was called before."""
        for _, after in self.fences:
            after.synchronize()
        return sum(float(before.elapsed_time(after)) for before, after in self.fences) / 1e3


class _HostBuffer:
    """Memory for one save, kept from save to save: fragments end to end, as they will lie in the file."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def reserve(self, numel: int) -> Tensor:
        """At least `numel` fp32 elements, resident (pinned for a GPU)."""
        if self._held is None or self._held.numel() < numel:
            self._held = None  # before the next is there
            on_gpu = self._device.type == "cuda"
            self._held = torch.empty(numel, dtype=torch.float32, pin_memory=on_gpu)
            if not on_gpu:
                self._held.zero_()  # pages come now and not during the first save
        return self._held

    def copy(self, fragments: Sequence[Fragment]) -> _Copy:
        """Start copying; on a CPU it is done on return."""
        buffer = self.reserve(sum(one.numel for one in fragments))
        held, begin = [], 0
        for one in fragments:
            held.append(replace(one, data=buffer[begin : begin + one.numel]))
            begin += one.numel
        if all(one.data.device.type == "cpu" for one in fragments):
            for target, source in zip(held, fragments, strict=True):
                target.data.copy_(source.data)
            return _Copy(held, None, [])
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in zip(held, fragments, strict=True):
                target.data.copy_(source.data, non_blocking=True)
                if source.data.is_cuda:
                    source.data.record_stream(self._stream)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return _Copy(held, done, [])


class CheckpointSaver:
    """Writes one rank's parts. Used from the rank's main thread; `report` is also called from the writing thread."""

    def __init__(
        self,
        checkpoints_uri: str,
        attempt: int,
        rank: int,
        device: torch.device,
        report: Callable[[PartReport], None],
        *,
        asynchronous: bool = True,
        collective_timeout_s: float | None = None,
    ) -> None:
        """Write nothing yet.

        Args:
            checkpoints_uri: the run's checkpoints.
            attempt: fencing token of the controller that started this rank.
            rank: of the writer.
            device: where the fragments live.
            report: takes the report of a part that is durable.
            asynchronous: write in a thread; otherwise each `save` returns when its part is durable.
            collective_timeout_s: how long the other ranks wait for this one; None where there are none.
        """
        self._checkpoints_uri = checkpoints_uri
        self._attempt = attempt
        self._rank = rank
        self._device = device
        self._report = report
        self._asynchronous = asynchronous
        self._collective_timeout_s = collective_timeout_s
        self._buffer = _HostBuffer(device)
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint-write", initializer=_prepare_thread, initargs=(device,)
        )
        self._reserved: Future[Tensor] | None = None
        self._in_flight: Future[None] | None = None
        self._step = 0
        self._num_bytes = 0
        self._copying: _Copy | None = None

    def reserve(self, numel: int) -> None:
        """Get host memory for saves of `numel` elements, in the background; without it the first save does."""
        if self._asynchronous and numel:
            self._reserved = self._pool.submit(self._buffer.reserve, numel)

    def save(self, step: int, fragments: Sequence[Fragment], state: TrainState | None) -> None:
        """Write this rank's part of a checkpoint; the values are those of this moment.

        Waits for the save before. The fragments' memory may be written again on return, on a GPU after `fence`.

        Args:
            step: of the checkpoint.
            fragments: what this rank writes; live memory is fine.
            state: what the manifest records beside them; the reporter rank's.

        Raises:
            OSError: a part could not be written here; also of the save before.
            SaveFailedError: the store did not take it, or the save before does not end.
        """
        began = time.perf_counter()
        if not self._asynchronous:
            receipt = self._write_part(step, fragments)
            seconds = time.perf_counter() - began
            self._report(PartReport(step, self._rank, receipt, state, write_s=seconds, total_s=seconds))
            return
        self.wait()
        if self._reserved is not None:
            self._reserved.result(_LONGEST_PAUSE_S)
            self._reserved = None
        copied = self._buffer.copy(fragments)
        self._step, self._num_bytes = step, BYTES_PER_ELEMENT * sum(one.numel for one in fragments)
        self._copying = copied if copied.done is not None else None
        stood_s = time.perf_counter() - began
        self._in_flight = self._pool.submit(self._write, step, copied, state, began, stood_s)

    def fence(self) -> None:
        """Keep what the GPU is asked from now on behind the copy. Called before fragments are written again."""
        copying = self._copying
        if copying is None or copying.done is None:
            return
        self._copying = None
        stream = torch.cuda.current_stream(self._device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record(stream)
        stream.wait_event(copying.done)
        after.record(stream)
        copying.fences.append((before, after))

    def check(self) -> None:
        """Raise what went wrong with a save that has ended; does not wait."""
        if self._in_flight is not None and self._in_flight.done():
            self.wait()

    def wait(self, *, apart: bool = False) -> None:
        """Wait until the save in flight is durable and reported.

        Args:
            apart: no rank meets this one in a collective any more, so that it may take as long as a save may.

        Raises:
            OSError: it could not be written here.
            SaveFailedError: the store did not take it, or it does not end in time.
        """
        in_flight = self._in_flight
        if in_flight is None:
            return
        deadline_s = _LONGEST_PAUSE_S + self._num_bytes / _SLOWEST_BYTES_PER_S
        remedy = "or save less often with train.checkpoint.every"
        peers_s = self._collective_timeout_s
        if not apart and peers_s is not None and _SHARE_OF_PEERS * peers_s < deadline_s:
            deadline_s = _SHARE_OF_PEERS * peers_s
            remedy = (
                f"save less often with train.checkpoint.every, or raise train.collective_timeout_s={peers_s:g}: no "
                "longer do the other ranks wait for this one"
            )
        try:
            in_flight.result(deadline_s)
        except FutureTimeoutError as error:
            if in_flight.done():
                raise  # the writing itself said so
            raise SaveFailedError(
                f"Rank {self._rank} waited {deadline_s:.0f} s for its part of step {self._step} "
                f"({self._num_bytes} bytes) to be written to {self._checkpoints_uri}. Look at the disk or the store "
                f"there, {remedy}."
            ) from error
        self._in_flight = None

    def close(self) -> None:
        """End the thread once the save in flight is done; failures of it are not told any more."""
        self._pool.shutdown(wait=True)

    def _write(self, step: int, copied: _Copy, state: TrainState | None, began: float, stood_s: float) -> None:
        copied.wait()
        receipt = self._write_part(step, copied.fragments)
        report = PartReport(
            step,
            self._rank,
            receipt,
            state,
            write_s=stood_s + copied.fenced_s(),
            total_s=time.perf_counter() - began,
        )
        self._report(report)

    def _write_part(self, step: int, fragments: Sequence[Fragment]) -> PartReceipt:
        try:
            return write_part(self._checkpoints_uri, step, self._attempt, self._rank, fragments)
        except OSError as error:
            if storage.is_local(self._checkpoints_uri):
                raise  # a full or broken disk does not mend itself
            raise SaveFailedError(
                f"Rank {self._rank} could not write its part of step {step}, after the store's own retries: {error}. "
                "The run goes on from the checkpoint before; look at the store."
            ) from error


def _prepare_thread(device: torch.device) -> None:
    """Let the thread that trains go first, and pin memory for its GPU and no other.

    Linux keeps niceness by thread, and raising it needs no privilege.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    if device.type == "cuda":
        torch.cuda.set_device(device)
