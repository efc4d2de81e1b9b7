"""What a run will do, before any slot is taken: mesh, batch, stages, sizes. Pure arithmetic, no process, no GPU.

Sizes are those of the states a rank keeps by contract (weights, fp32 masters, two moments, gradients), computed from
the shapes; activations and what libraries hold beside them are not estimated here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.config import TrainConfig
from trainer.model import TransformerConfig, layers, parameter_shapes
from trainer.stages import stage_bounds
from trainer.topology import BatchLayout, Mesh

__all__ = ["RunPlan", "StagePlan", "plan_run"]

_FP32 = 4
_BF16 = 2
_MOMENTS = 2


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage, and what a rank of it keeps."""

    stage: int
    blocks: int
    parameters: int
    """Held by the stage; a tied matrix counts on both stages that hold it."""
    weight_bytes: int
    gradient_bytes: int
    """fp32 accumulation; partitioned over dp with ZeRO stage 2."""
    optimizer_bytes: int
    """fp32 masters (with ZeRO) and two moments; partitioned over dp with ZeRO."""


@dataclass(frozen=True)
class RunPlan:
    """A run as it will be placed when all its slots are there."""

    dp: int
    pp: int
    slots: int
    zero_stage: int
    precision: Literal["fp32", "bf16"]
    parameters: int
    """Of the model; a tied matrix counts once."""
    micro_batch: int
    num_micro_batches: int
    masked_rows: int
    """Rows computed for nothing in each step, where dp and micro-batch do not divide the global batch."""
    tokens_per_step: int
    bubble: float
    """Share of a step in which a stage waits for others: (pp - 1) / (micro-batches + pp - 1)."""
    stages: tuple[StagePlan, ...]


def plan_run(
    train: TrainConfig, model: TransformerConfig, *, seq_len: int, slots: int, precision: Literal["fp32", "bf16"]
) -> RunPlan:
    """Lay a run over its slots.

    Args:
        train: the `train` section.
        model: the resolved architecture.
        seq_len: tokens a row feeds to the model.
        slots: ranks that the nodes hold.
        precision: of the weights.

    Raises:
        ConfigError: there are more stages than blocks.
    """
    pp = train.parallel.pp
    mesh = Mesh(slots // pp if train.parallel.dp == "auto" else train.parallel.dp, pp)
    layout = BatchLayout(train.global_batch, mesh.dp, pp, train.micro_batch)
    shapes = parameter_shapes(model)
    bounds = stage_bounds(model, pp)
    stages = tuple(
        _stage(stage, bounds[stage], bounds[stage + 1], shapes, model, mesh, train.zero.stage, precision)
        for stage in range(pp)
    )
    return RunPlan(
        dp=mesh.dp,
        pp=pp,
        slots=slots,
        zero_stage=train.zero.stage,
        precision=precision,
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        micro_batch=layout.micro_batch,
        num_micro_batches=layout.num_micro_batches,
        masked_rows=layout.num_slots - train.global_batch,
        tokens_per_step=train.global_batch * seq_len,
        bubble=(pp - 1) / (layout.num_micro_batches + pp - 1),
        stages=stages,
    )


def _stage(
    stage: int,
    first: int,
    stop: int,
    shapes: Mapping[str, tuple[int, ...]],
    model: TransformerConfig,
    mesh: Mesh,
    zero_stage: int,
    precision: Literal["fp32", "bf16"],
) -> StagePlan:
    held = layers(model)[first:stop]
    prefixes = tuple(f"blocks.{layer.index}." if layer.kind == "block" else f"{layer.kind}." for layer in held)
    names = {name for name in shapes if name.startswith(prefixes)}
    if model.tie_embeddings and any(layer.kind == "head" for layer in held):
        names.add("embedding.weight")
    parameters = sum(math.prod(shapes[name]) for name in names)
    partitions = mesh.dp if zero_stage >= 1 else 1
    states = _MOMENTS + (1 if zero_stage >= 1 else 0)
    return StagePlan(
        stage=stage,
        blocks=sum(layer.kind == "block" for layer in held),
        parameters=parameters,
        weight_bytes=parameters * (_BF16 if precision == "bf16" else _FP32),
        gradient_bytes=-(-parameters * _FP32 // (mesh.dp if zero_stage == 2 else 1)),
        optimizer_bytes=-(-parameters * _FP32 * states // partitions),
    )
