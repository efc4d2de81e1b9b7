"""What a run goes on from beside its fragments, as ranks report it and manifests hold it. No torch here."""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue

from trainer.adapters import Base, Lora
from trainer.fragments import KINDS, Kind
from trainer.guard import GuardState, LossScale

__all__ = ["EvalRecord", "TrainState"]


@dataclass(frozen=True)
class EvalRecord:
    """The evaluation at a checkpoint."""

    loss: float
    perplexity: float | None
    """Of language models; None for a classifier."""
    tokens: int
    """Units that the loss is the mean of: tokens, or rows of a classification."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The task's own metrics, by name."""
    metric: str = "loss"
    """What says which checkpoint is best: `loss`, or one of `metrics`."""
    better: Literal["lower", "higher"] = "lower"


@dataclass(frozen=True)
class TrainState:
    """What a run goes on from, beside the fragments."""

    step: int
    """Steps of the run: the checkpoint's name."""
    optimizer_steps: int
    """Updates that the optimizer has made: its bias correction goes on from here."""
    plan_digest: str
    """Of what decided the consumed rows (`Plan.digest_at`); with `consumed_batches` the data cursor."""
    consumed_batches: int
    dataset_digest: str
    seed: int
    seq_len: int
    global_batch: int
    dp: int
    pp: int
    zero_stage: int
    precision: str
    model: dict[str, JsonValue]
    """The fields of the model's `TransformerConfig`."""
    parameters: dict[str, tuple[int, ...]]
    """Canonical name to shape of every trained parameter (`trainer.model.parameter_shapes`)."""
    config: dict[str, JsonValue]
    """The run's resolved configuration; empty in a rank's report, filled in by who commits."""
    versions: dict[str, str]
    """Packages and their versions."""
    kinds: tuple[Kind, ...] = KINDS
    """What is stored of each parameter."""
    evaluation: EvalRecord | None = None
    guard: GuardState = GuardState()
    """What decides whether coming steps are skipped."""
    loss_scale: LossScale | None = None
    """Of fp16; None for other precisions."""
    task: str = "causal_lm"
    """What was learned (`train.task`)."""
    labels: tuple[str, ...] = ()
    """Names of a classifier's classes in the order of their numbers."""
    lora: Lora | None = None
    """The adapters, where they are what was trained; `parameters` are theirs."""
    base: Base | None = None
    """What adapters were trained on; frozen weights are in no checkpoint."""
