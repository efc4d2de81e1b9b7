"""What ranks of the tests run, beside `trainer.worker.run` itself. DeepSpeed is imported in the ranks only."""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
import psutil

from data_service.client import BatchSlice, DataClient
from tests.helpers.ranks import QueueHooks
from trainer import worker
from trainer.fragments import KINDS, Kind
from trainer.protocol import ProfileSteps, WorkerSpec

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.loop import Rank
    from trainer.tasks.base import Outputs, Targets


def be_rank(spec: WorkerSpec, hooks: QueueHooks) -> None:
    """What an agent's rank process runs."""
    worker.run(spec, hooks)


def train_and_compare_tied(spec: WorkerSpec, hooks: QueueHooks) -> dict[str, object]:
    """Train, then compare the tied matrices of the first and the last stage: weights, fp32 masters and moments."""
    import torch
    from torch import distributed as dist

    from trainer.loop import train

    with _opened(spec, hooks) as rank:
        train(rank)
        held = [one.parameter for one in rank.engine.parameters if one.name == "embedding.weight"]
        like = held[0] if held else torch.empty(rank.config.vocab_size, rank.config.d_model)
        bits = like.detach().float().contiguous().view(torch.int32)
        everywhere = [torch.empty_like(bits) for _ in range(spec.world_size)]
        dist.all_gather(everywhere, bits)
        holders = [everywhere[at] for at in range(spec.world_size) if at % spec.pp in (0, spec.pp - 1)]
        return {
            "equal": all(torch.equal(holders[0], other) for other in holders),
            "elements": bits.numel(),
            "states": {kind: _same_on_both_ends(rank, kind) for kind in KINDS},
        }


def _same_on_both_ends(rank: "Rank", kind: Kind) -> bool:
    """Whether the first and the last stage hold the same bits of the tied matrix, put together from all pipelines."""
    import torch
    from torch import distributed as dist

    values = torch.zeros(rank.config.vocab_size * rank.config.d_model, dtype=torch.int32)
    held = torch.zeros_like(values)
    for view in rank.engine.views:
        if view.name == "embedding.weight":
            values[view.start : view.start + view.numel] = view.tensors[kind].view(torch.int32)
            held[view.start : view.start + view.numel] = 1
    pieces = torch.stack([held, values])
    everywhere = [torch.empty_like(pieces) for _ in range(rank.spec.world_size)]
    dist.all_gather(everywhere, pieces)
    first, last = (sum(everywhere[stage :: rank.spec.pp], torch.zeros_like(pieces)) for stage in (0, rank.spec.pp - 1))
    return bool((first[0] == 1).all()) and torch.equal(first, last)


def load_and_save(spec: WorkerSpec, hooks: QueueHooks, target: str) -> None:
    """Load a checkpoint and write it to `target` at once."""
    from trainer.loop import save
    from trainer.saver import CheckpointSaver

    with _opened(spec, hooks) as rank:
        device = rank.engine.device
        save(rank, CheckpointSaver(target, spec.attempt, spec.rank, device, hooks.report, asynchronous=False), None)


class _Tampered:
    """A client that changes a token of the first row of one training batch, with another checksum."""

    def __init__(self, client: DataClient, index: int) -> None:
        self._client, self._index = client, index
        self.plan = client.plan

    def stream(
        self, split: Literal["train", "eval"], start: int, stop: int, slots: tuple[int, int]
    ) -> Iterator[BatchSlice]:
        for rows in self._client.stream(split, start, stop, slots):
            if split == "train" and rows.index == self._index:
                tokens = rows.tokens.copy()
                tokens[0, 1] ^= 1
                yield replace(rows, tokens=tokens, row_crc=rows.row_crc ^ np.uint32(1))
            else:
                yield rows


def train_on_different_rows(spec: WorkerSpec, hooks: QueueHooks) -> None:
    """Train; the last stage of pipeline 0 is given another token in global batch 2."""
    from trainer.loop import train

    with contextlib.closing(DataClient(spec.data)) as client:
        last = spec.rank == spec.pp - 1
        train(worker.open_rank(spec, hooks, _Tampered(client, 2) if last else client))


def train_on_poisoned_losses(spec: WorkerSpec, hooks: QueueHooks, poison: str) -> None:
    """Train; the losses of some steps are multiplied.

    Args:
        spec: of the rank.
        hooks: of the rank.
        poison: JSON of step (as text) to factor.
    """
    from trainer.loop import train

    factors = {int(step): float(factor) for step, factor in json.loads(poison).items()}
    with _opened(spec, hooks) as rank:
        task = rank.task
        honest = task.loss

        def poisoned(outputs: "Outputs", targets: "Targets") -> "Tensor":
            training = torch.is_grad_enabled()
            return honest(outputs, targets) * (factors.get(rank.step + 1, 1.0) if training else 1.0)

        import torch

        object.__setattr__(task, "loss", poisoned)
        train(rank)


class _DieAt:
    """Hooks that kill or freeze their own process when a step is done."""

    def __init__(self, hooks: QueueHooks, step: int, how: int) -> None:
        self._hooks, self._left, self._how = hooks, step, how
        self.report, self.profile = hooks.report, hooks.profile
        self.snapshot, self.wants_snapshot = hooks.snapshot, hooks.wants_snapshot

    def control(self) -> None:
        if self._left == 0:
            os.kill(os.getpid(), self._how)
        self._left -= 1


class _Traced:
    """Hooks that ask for a trace of two steps from the start."""

    def __init__(self, hooks: QueueHooks, uri: str) -> None:
        self.report, self.control = hooks.report, hooks.control
        self.snapshot, self.wants_snapshot = hooks.snapshot, hooks.wants_snapshot
        self._request = ProfileSteps(1, 2, uri)

    def profile(self) -> ProfileSteps:
        return self._request


def train_traced(spec: WorkerSpec, hooks: QueueHooks, uri: str) -> None:
    """Train with a request for a trace that lies there from the start."""
    worker.run(spec, _Traced(hooks, uri))


def rank_1_is_killed(spec: WorkerSpec, hooks: QueueHooks) -> None:
    """Rank 1 dies by SIGKILL before its fourth step."""
    worker.run(spec, _DieAt(hooks, 3, signal.SIGKILL) if spec.rank == 1 else hooks)


def rank_1_freezes(spec: WorkerSpec, hooks: QueueHooks) -> None:
    """Rank 1 stands still before its fourth step."""
    worker.run(spec, _DieAt(hooks, 3, signal.SIGSTOP) if spec.rank == 1 else hooks)


@contextlib.contextmanager
def _writes_wait(seconds: float) -> Iterator[None]:
    """Parts of checkpoints are written and not yet published for so long."""
    from trainer import checkpoint

    publish = checkpoint.storage.publish

    @contextlib.contextmanager
    def waiting(uri: str) -> Iterator[BinaryIO]:
        with publish(uri) as stream:
            yield stream
            stream.flush()
            threading.Event().wait(seconds)

    checkpoint.storage.publish = waiting
    try:
        yield
    finally:
        checkpoint.storage.publish = publish


def train_with_slow_writes(spec: WorkerSpec, hooks: QueueHooks) -> None:
    """Train; each part takes long to become durable."""
    with _writes_wait(0.4):
        worker.run(spec, hooks)


def rank_1_is_killed_in_a_save(spec: WorkerSpec, hooks: QueueHooks) -> None:
    """Rank 1 dies by SIGKILL before its fourth step; the part that it began after the second is not whole by then."""
    if spec.rank == 1:
        with _writes_wait(60.0):
            worker.run(spec, _DieAt(hooks, 3, signal.SIGKILL))
    worker.run(spec, hooks)


def train_on_poisoned_losses_with_slow_writes_of_rank_1(spec: WorkerSpec, hooks: QueueHooks, poison: str) -> None:
    """As `train_on_poisoned_losses`; the parts of rank 1 take long to become durable."""
    with _writes_wait(4.0 if spec.rank == 1 else 0.0):
        train_on_poisoned_losses(spec, hooks, poison)


def train_with_a_stuck_store_of_rank_1(spec: WorkerSpec, hooks: QueueHooks) -> None:
    """Train; a part of rank 1 does not become durable."""
    with _writes_wait(60.0 if spec.rank == 1 else 0.0):
        worker.run(spec, hooks)


def leave_no_traces(spec: WorkerSpec, hooks: QueueHooks, extensions: str) -> list[str]:
    """Train, with `extensions` for torch to build in; returns the modules loaded that could have built C++ code."""
    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    worker.run(spec, hooks)
    return [name for name in ("torch.utils.cpp_extension", "deepspeed.ops.op_builder.all_ops") if name in sys.modules]


class _Listening:
    """Hooks that look, once training goes on, where their own process listens."""

    def __init__(self, hooks: QueueHooks) -> None:
        self.report, self.profile = hooks.report, hooks.profile
        self.snapshot, self.wants_snapshot = hooks.snapshot, hooks.wants_snapshot
        self.addresses: set[str] = set()

    def control(self) -> None:
        found = psutil.Process().net_connections(kind="tcp")
        self.addresses |= {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}


def train_and_tell_where_it_listens(spec: WorkerSpec, hooks: QueueHooks) -> list[str]:
    """Train; returns the addresses that this rank's sockets listened on meanwhile."""
    looking = _Listening(hooks)
    worker.run(spec, looking)
    return sorted(looking.addresses)


@contextlib.contextmanager
def _opened(spec: WorkerSpec, hooks: QueueHooks) -> Iterator["Rank"]:
    client = DataClient(spec.data)
    try:
        yield worker.open_rank(spec, hooks, client)
    finally:
        client.close()


def train_in_fp16_on_cpu(spec: WorkerSpec, hooks: QueueHooks) -> list[float]:
    """Train with fp16, which is for GPUs: CPUs are slow at it, but they count the same. Returns the loss scales.

    The scale begins high and doubles soon, so that gradients overflow now and then.
    """
    from deepspeed.accelerator import get_accelerator

    from trainer import deepspeed_config
    from trainer.loop import train

    worker.preload("cpu")
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed_config.resolve_precision = lambda train, device: "fp16"
    deepspeed_config._LOSS_SCALE_POWER, deepspeed_config._LOSS_SCALE_WINDOW = 16, 3
    scales: list[float] = []
    with _opened(spec, hooks) as rank:
        step = rank.engine.train_step

        def noted(*arguments: object) -> object:
            done = step(*arguments)
            assert rank.engine.loss_scale is not None
            scales.append(rank.engine.loss_scale.scale)
            return done

        rank.engine.train_step = noted
        train(rank)
    return scales
