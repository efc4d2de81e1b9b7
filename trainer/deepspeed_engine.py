"""A thin wrapper around DeepSpeed's engines: ZeRO 0 to 3 on one stage, ZeRO 1 over a pipeline.

Owns the building of an engine from uninitialised modules, one optimizer step and one evaluation of a global batch, and
this rank's `StateView`s. The caller sets the learning rate, brings the micro-batches, loads the state and decides which
updates are made. Refuses to write checkpoints, to schedule and to compile. Written for DeepSpeed 0.19.8.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch import distributed as dist

from trainer.adapters import Lora
from trainer.batching import MicroBatch
from trainer.config import TrainConfig
from trainer.deepspeed_config import BufferSizes, Precision, engine_config, working_stage
from trainer.fragment_readers import (
    StateView,
    frozen_views,
    linked_views,
    partitioned_views,
    plain_views,
    refresh_partitions,
)
from trainer.guard import LossScale
from trainer.layers import compile_blocks
from trainer.lora import attach
from trainer.loss_module import LossModule, Observe
from trainer.model import Transformer, TransformerConfig
from trainer.optim import (
    GroupKey,
    allocate_state,
    group_parameters,
    make_optimizer,
    set_lr,
    set_optimizer_steps,
    state_kinds,
)
from trainer.pipeline import StagePipeline, build_pipeline
from trainer.process_group import bound_all_groups
from trainer.stages import LayerCosts, stage_bounds
from trainer.step_gate import Admit, StepGate
from trainer.tasks.base import Task
from trainer.topology import BatchLayout, Mesh

__all__ = ["StepOutcome", "TrainEngine"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step tells; the same on every rank."""

    loss: float
    """Mean loss of the global batch, before the update."""
    grad_norm: float
    """L2 norm of the whole model's gradient before clipping; tied weights count once. Infinite, not a number or
    negative where the gradient is not finite."""
    overflowed: bool = False
    """Whether the gradient exceeded the range of fp16: no update was made, and the loss scale is halved."""


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
        lora: Lora | None = None,
        costs: LayerCosts | None = None,
    ) -> None:
        """Build it, weights uninitialised; fill `views` and `frozen`, then call `refresh`.

        A collective: every rank calls it, with the same `costs` of layers where it is a pipeline.
        """
        self.mesh = mesh
        self.layout = layout
        self.device = device
        self.dp_index, self.stage = mesh.coordinate(rank)
        self._train = train
        self._precision = precision
        offloaded = "cpu" in (train.zero.offload_optimizer, train.zero.offload_parameters)
        self._zero_stage = working_stage(train.zero.stage, mesh.world_size, precision, offloaded=offloaded)
        self._clipped_norm: Tensor | None = None
        recompute = train.recompute == "blocks"
        self._model: StagePipeline | LossModule = (
            build_pipeline(config, mesh.dp, stage_bounds(config, mesh.pp, costs), task, recompute)
            if mesh.pp > 1
            else LossModule(Transformer(config, recompute), task)
        )
        if lora is not None:
            attach(self._model, lora)
        if train.compile:
            compile_blocks(self._model)
        self.parameters = tuple(self._model.named_model_parameters())
        sizes = BufferSizes.of(named.parameter for named in self.parameters)
        groups = group_parameters(((n.name, n.parameter) for n in self.parameters), train.optimizer)
        if isinstance(self._model, StagePipeline):
            _fill_groups(groups, self._model)
        self._optimizer = make_optimizer(groups, train.optimizer)
        self._gate = StepGate(self._optimizer, device)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            self._engine: Any = deepspeed.initialize(
                model=self._model,
                optimizer=self._optimizer,
                config=engine_config(train, self._zero_stage, layout, precision, sizes, on_gpu=device.type == "cuda"),
                dist_init_required=False,
            )[0]
        _log.debug("deepspeed: %s", said.getvalue().strip())
        if self._zero_stage == 0 and mesh.dp == 1:
            # There is nobody to add gradients up with, and DeepSpeed would still copy them to a buffer and back.
            self._engine.enable_backward_allreduce = False
        if isinstance(self._model, StagePipeline):
            self._model.join(self._engine)
        elif self._zero_stage == 3:
            self._model.gather_output_matrix()
        bound_all_groups(timedelta(seconds=train.collective_timeout_s))
        self.views: list[StateView] = self._views()
        self.frozen: list[StateView] = frozen_views(self.parameters)

    def _views(self) -> list[StateView]:
        """Views of this rank's masters and moments; the moments are allocated."""
        trained = [named for named in self.parameters if named.parameter.requires_grad]
        kinds = state_kinds(self._train.optimizer)
        zero = self._engine.optimizer
        if self._zero_stage == 3:
            allocate_state(self._optimizer, zero.fp32_partitioned_groups_flat, kinds)
            return partitioned_views(trained, zero)
        groups = self._optimizer.param_groups
        allocate_state(self._optimizer, (held for group in groups for held in group["params"]), kinds)
        if self._zero_stage == 0:
            return plain_views(trained, self._optimizer, self.dp_index, self.mesh.dp)
        return linked_views(trained, self._optimizer, groups)

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
        self._optimizer.register_step_pre_hook(lambda *_: action())

    def refresh(self, optimizer_steps: int) -> None:
        """Bring the computing weights in line with masters that were just written through `views`.

        A collective: every rank calls it.

        Args:
            optimizer_steps: updates made so far, 0 for initial weights.
        """
        set_optimizer_steps(self._optimizer, optimizer_steps)
        if self._zero_stage == 3:
            refresh_partitions(self._engine.optimizer)
        elif self._zero_stage > 0:
            self._engine.optimizer.update_lp_params()

    @property
    def loss_scale(self) -> LossScale | None:
        """Where the loss scale of fp16 stands; None for other precisions."""
        if self._precision != "fp16":
            return None
        scaler = self._engine.optimizer.loss_scaler
        quiet = scaler.cur_iter - scaler.last_overflow_iter - 1
        return LossScale(float(scaler.cur_scale), quiet, scaler.cur_hysteresis)

    @loss_scale.setter
    def loss_scale(self, state: LossScale | None) -> None:
        if self._precision == "fp16" and state is not None:
            scaler = self._engine.optimizer.loss_scaler
            scaler.cur_scale, scaler.cur_hysteresis = state.scale, state.hysteresis
            scaler.cur_iter, scaler.last_overflow_iter = state.quiet_steps, -1

    def train_step(self, batch: Sequence[MicroBatch], lr: float, admit: Admit | None = None) -> StepOutcome:
        """One optimizer step over this rank's micro-batches of a global batch. A collective: every rank calls it.

        Args:
            batch: `layout.num_micro_batches` micro-batches; empty on a stage between the first and the last.
            lr: learning rate of this step.
            admit: whether a step with that loss and gradient norm may change the weights; None asks for no more than
                what DeepSpeed refuses. It costs a look at the loss before the update.
        """
        set_lr(self._optimizer, lr)
        if isinstance(self._model, StagePipeline):
            pipeline = self._engine
            with self._gate.armed(admit, lambda: float(pipeline._aggregate_total_loss()), self._norm):
                loss = float(self._engine.train_batch(data_iter=iter(batch)))
            return StepOutcome(loss, self._norm())
        self._engine.train()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for inputs, targets in batch:
            micro_loss = self._engine(inputs, targets)
            total += micro_loss.detach()
            self._engine.backward(micro_loss)
            if self._engine.is_gradient_accumulation_boundary():
                break
            self._engine.step()
        mean = self._mean_over_dp(total)
        with self._gate.armed(admit, lambda: float(mean), self._norm):
            if self._zero_stage == 0:
                self._clipped_norm = self._clip()
            self._engine.step()
        return StepOutcome(float(mean), self._norm(), self._overflowed())

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
        return float(self._mean_over_dp(total))

    def look(self, micro_batch: MicroBatch, observe: Observe) -> None:
        """One forward pass over one micro-batch, of the training's shape in a pipeline, and nothing else.

        A collective: every rank calls it, also those between the first and the last stage.

        Args:
            micro_batch: inputs and targets.
            observe: called on the ranks of the last stage.
        """
        if isinstance(self._model, StagePipeline):
            with self._model.observed_by(observe):
                self._engine.eval_batch(iter([micro_batch]), num_micro_batches=1)
            return
        self._engine.eval()
        with torch.no_grad():
            self._engine.module(*micro_batch, observe)
        self._engine.train()

    def global_sums(self, *counts: int) -> tuple[int, ...]:
        """Counts of this rank's rows, added up over the whole global batch. A collective: every rank calls it.

        Args:
            counts: such as units (`Task.count`) and tokens; what the last stages say counts.
        """
        mine = counts if self.is_last else (0,) * len(counts)
        held = torch.tensor(mine, dtype=torch.int64, device=self.device)
        dist.all_reduce(held)
        return tuple(held.tolist())

    def meet(self) -> None:
        """Wait for the other ranks, within the deadline of a collective. A collective: every rank calls it."""
        self.global_sums(0)

    def _mean_over_dp(self, weighted_sum: Tensor) -> Tensor:
        """What DeepSpeed's pipeline reports: the sum over micro-batches, divided by gas, meant over dp."""
        mean = weighted_sum / self.layout.num_micro_batches
        if self.mesh.dp > 1:
            dist.all_reduce(mean)
            mean /= self.mesh.dp
        return mean

    def _norm(self) -> float:
        """Norm of the gradient of the step that is being made, once it is known."""
        zero = self._engine.optimizer
        norm: Any = self._clipped_norm if self._zero_stage == 0 else zero._global_grad_norm
        return float(norm)

    def _overflowed(self) -> bool:
        """Whether the last step exceeded the range of fp16."""
        return self._precision == "fp16" and bool(self._engine.optimizer.overflow)

    def _clip(self) -> Tensor:
        """Clip without ZeRO, where gradients are whole and equal on all ranks; returns the norm before it."""
        bound = self._train.optimizer.grad_clip or float("inf")
        return torch.nn.utils.clip_grad_norm_([n.parameter for n in self.parameters], bound)


def _fill_groups(groups: dict[GroupKey, list[nn.Parameter]], pipeline: StagePipeline) -> None:
    """Give every stage of a pipeline the same parameter groups. A collective: every rank calls it.

    DeepSpeed takes the norm of one group after the other over all stages, and would wait for ever where one has fewer.
    A group that lacks parameters here gets one element that nothing computes with.
    """
    everywhere: list[list[GroupKey]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, sorted(groups))
    for key in {key for found in everywhere for key in found} - groups.keys():
        groups[key] = [pipeline.add_filler()]
