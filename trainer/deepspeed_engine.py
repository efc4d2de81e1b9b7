"""A thin wrapper around DeepSpeed's engines: ZeRO 0 to 3 on one stage, ZeRO 1 over a pipeline.

Owns the process group, the building of an engine from uninitialised modules, one optimizer step and one evaluation of a
global batch, and this rank's `StateView`s. The caller sets the learning rate, brings the micro-batches and loads the
state. Refuses to write checkpoints, to schedule and to compile. Written for DeepSpeed 0.19.8.
"""

import contextlib
import io
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import deepspeed
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import TCPStore, distributed_c10d  # type: ignore[attr-defined]  # no stub names TCPStore

from trainer.batching import MicroBatch
from trainer.config import TrainConfig
from trainer.deepspeed_config import BufferSizes, Precision, engine_config, quiet, rank_environment, switch_off_builds
from trainer.errors import WorkerLostError
from trainer.fragment_readers import (
    StateView,
    allocate_moments,
    linked_views,
    partitioned_views,
    plain_views,
    refresh_partitions,
    set_optimizer_steps,
)
from trainer.loss_module import LossModule, Observe
from trainer.model import Transformer, TransformerConfig
from trainer.optim import make_optimizer
from trainer.pipeline import StagePipeline, build_pipeline
from trainer.tasks.base import Task
from trainer.topology import BatchLayout, Mesh

__all__ = ["StepOutcome", "TrainEngine", "close_process_group", "open_process_group"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step tells; the same on every rank."""

    loss: float
    """Mean loss of the global batch, before the update."""
    grad_norm: float
    """L2 norm of the whole model's gradient before clipping; tied weights count once."""


def open_process_group(
    rank: int,
    world_size: int,
    local_rank: int,
    master: tuple[str, int],
    device: Literal["cpu", "cuda"],
    interface: str | None,
    timeout_s: float,
) -> None:
    """Join the ranks of the attempt. A collective: every rank calls it, rank 0 opens the store at `master`.

    Args:
        rank: of this process.
        world_size: ranks in all.
        local_rank: CUDA device of this process, where `device` is cuda.
        master: host and port of the TCPStore.
        device: cpu uses gloo, cuda NCCL.
        interface: network interface of the collectives, such as `lo`; None lets the backend choose.
        timeout_s: a collective that waits longer fails.
    """
    os.environ.update(rank_environment(rank, world_size, local_rank, master, device))
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ["NCCL_SOCKET_IFNAME"] = interface
    quiet()
    switch_off_builds()
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    backend = "gloo" if device == "cpu" else "nccl"
    timeout = timedelta(seconds=timeout_s)
    store = _open_store(rank, world_size, master, timeout)
    # bound to its GPU, as DeepSpeed 0.19.8 does where there are peers
    own = torch.device("cuda", local_rank) if device == "cuda" and world_size > 1 else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=own)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def _open_store(rank: int, world_size: int, master: tuple[str, int], timeout: timedelta) -> TCPStore:
    """The ranks' store. Rank 0 brings its own socket: torch 2.13 would listen on every interface, without a password.

    Raises:
        WorkerLostError: the address is none of this node's, or its port is taken.
    """
    if rank != 0:
        return TCPStore(*master, world_size, is_master=False, timeout=timeout)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(*master, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(world_size)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise WorkerLostError(
            f"Rank 0 cannot open its store at {master[0]}:{master[1]}: {error}. The address must be one of its node's, "
            "and the port free."
        ) from error
    # the store owns the descriptor from here on
    return TCPStore(*master, world_size, is_master=True, master_listen_fd=listener.detach(), timeout=timeout)


def close_process_group() -> None:
    """Leave the process group; does nothing where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


class TrainEngine:
    """One rank's part of the model, its optimizer and its schedule."""

    def __init__(
        self,
        train: TrainConfig,
        config: TransformerConfig,
        mesh: Mesh,
        rank: int,
        layout: BatchLayout,
        device: torch.device,
        precision: Precision,
        task: Task,
    ) -> None:
        """Build it, weights uninitialised: fill `views`, then call `refresh`. A collective: every rank calls it."""
        self.mesh = mesh
        self.layout = layout
        self.device = device
        self.dp_index, self.stage = mesh.coordinate(rank)
        self._train = train
        self._zero_stage = train.zero.stage
        self._model: StagePipeline | LossModule = (
            build_pipeline(config, mesh.dp, mesh.pp, task) if mesh.pp > 1 else LossModule(Transformer(config), task)
        )
        self.parameters = tuple(self._model.named_model_parameters())
        sizes = BufferSizes.of(named.parameter for named in self.parameters)
        self._adamw = make_optimizer(((n.name, n.parameter) for n in self.parameters), train.optimizer)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            self._engine: Any = deepspeed.initialize(
                model=self._model,
                optimizer=self._adamw,
                config=engine_config(train, layout, precision, sizes),
                dist_init_required=False,
            )[0]
        _log.debug("deepspeed: %s", said.getvalue().strip())
        if isinstance(self._model, StagePipeline):
            self._model.schedule_exact_ties(self._engine)
        elif self._zero_stage == 3:
            self._model.gather_output_matrix()
        _bound_all_groups(timedelta(seconds=train.collective_timeout_s))
        self.views = self._views()

    def _views(self) -> list[StateView]:
        """Views of this rank's masters and moments; the moments are allocated."""
        zero = self._engine.optimizer
        if self._zero_stage == 3:
            allocate_moments(self._adamw, zero.fp32_partitioned_groups_flat)
            return partitioned_views(self.parameters, zero)
        allocate_moments(self._adamw, (held for group in self._adamw.param_groups for held in group["params"]))
        if self._zero_stage == 0:
            return plain_views(self.parameters, self._adamw, self.dp_index, self.mesh.dp)
        return linked_views(self.parameters, self._adamw, self._adamw.param_groups)

    @property
    def is_first(self) -> bool:
        """Whether this rank reads tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank reads labels and knows the loss first."""
        return self.stage == self.mesh.pp - 1

    @property
    def consumes_rows(self) -> bool:
        """Whether this rank needs rows at all."""
        return self.is_first or self.is_last

    def before_update(self, action: Callable[[], None]) -> None:
        """Have `action` called before each time the optimizer writes masters and moments."""
        self._adamw.register_step_pre_hook(lambda *_: action())

    def refresh(self, optimizer_steps: int) -> None:
        """Bring the computing weights in line with masters that were just written through `views`.

        A collective: every rank calls it.

        Args:
            optimizer_steps: updates made so far, 0 for initial weights.
        """
        set_optimizer_steps(self._adamw, optimizer_steps)
        if self._zero_stage == 3:
            refresh_partitions(self._engine.optimizer)
        elif self._zero_stage > 0:
            self._engine.optimizer.update_lp_params()

    def train_step(self, batch: Sequence[MicroBatch], lr: float) -> StepOutcome:
        """One optimizer step over this rank's micro-batches of a global batch. A collective: every rank calls it.

        Args:
            batch: `layout.num_micro_batches` micro-batches; empty on a stage between the first and the last.
            lr: learning rate of this step.
        """
        for group in self._adamw.param_groups:
            group["lr"] = lr
        if isinstance(self._model, StagePipeline):
            loss = float(self._engine.train_batch(data_iter=iter(batch)))
            return StepOutcome(loss, float(self._engine.get_global_grad_norm()))
        self._engine.train()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for inputs, targets in batch:
            micro_loss = self._engine(inputs, targets)
            total += micro_loss.detach()
            self._engine.backward(micro_loss)
            if self._zero_stage == 0 and self._engine.is_gradient_accumulation_boundary():
                norm = self._clip()
            self._engine.step()
        if self._zero_stage > 0:
            norm = float(self._engine.get_global_grad_norm())
        return StepOutcome(self._mean_over_dp(total), norm)

    def evaluate(self, batch: Sequence[MicroBatch], observe: Observe | None = None) -> float:
        """Mean loss of one global batch, without an update. A collective: every rank calls it.

        Args:
            batch: as for `train_step`, of the same shape.
            observe: called for each micro-batch on the ranks of the last stage.
        """
        if isinstance(self._model, StagePipeline):
            with self._model.observed_by(observe):
                return float(self._engine.eval_batch(iter(batch)))
        self._engine.eval()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        with torch.no_grad():
            for inputs, targets in batch:
                total += self._engine.module(inputs, targets, observe)
        self._engine.train()
        return self._mean_over_dp(total)

    def global_sums(self, *counts: int) -> tuple[int, ...]:
        """Counts of this rank's rows, added up over the whole global batch. A collective: every rank calls it.

        Args:
            counts: such as units (`Task.count`) and tokens; what the last stages say counts.
        """
        mine = counts if self.is_last else (0,) * len(counts)
        held = torch.tensor(mine, dtype=torch.int64, device=self.device)
        dist.all_reduce(held)
        return tuple(held.tolist())

    def _mean_over_dp(self, weighted_sum: Tensor) -> float:
        """What DeepSpeed's pipeline reports: the sum over micro-batches, divided by gas, meant over dp."""
        mean = weighted_sum / self.layout.num_micro_batches
        if self.mesh.dp > 1:
            dist.all_reduce(mean)
            mean /= self.mesh.dp
        return float(mean)

    def _clip(self) -> float:
        """Clip without ZeRO, where gradients are whole and equal on all ranks; returns the norm before it."""
        bound = self._train.optimizer.grad_clip or float("inf")
        return float(torch.nn.utils.clip_grad_norm_([n.parameter for n in self.parameters], bound))


def _bound_all_groups(timeout: timedelta) -> None:
    """Give every process group our deadline; those that DeepSpeed makes come with torch's half hour."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)
