"""Configuration of `model` and `train`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data_service.settings import Section

__all__ = [
    "CheckpointConfig",
    "ClassificationConfig",
    "EvalConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "TrainConfig",
    "ZeroConfig",
]


class ModelConfig(Section):
TASK_PATTERN = r"^(causal_lm|sft|text_classification|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$"
"""Our tasks, and the path of a class."""

    """The Transformer. Either its shape, or `from` an existing Hugging Face folder."""

    family: Literal["llama", "qwen2", "qwen3", "gpt2", "bert"] = "llama"
    """Architecture. `llama` is RMSNorm, rotary positions, SwiGLU and grouped-query attention; `qwen2` adds biases to
    queries, keys and values, `qwen3` norms to queries and keys. `gpt2` is LayerNorm, learned positions, GELU and
    biases. `bert` is an encoder: it classifies and does not generate."""
    from_: str | None = Field(None, alias="from")
    """A Hugging Face folder whose configuration and weights to start from; the shape keys are then read there."""
    d_model: int = Field(256, ge=8)
    """Width of the residual stream."""
    num_layers: int = Field(6, ge=1)
    """Transformer blocks."""
    num_heads: int = Field(8, ge=1)
    """Query heads."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key and value heads; by default as many as query heads."""
    head_dim: int | None = Field(None, ge=2)
    """Width of a head; by default d_model / num_heads."""
    d_ff: int | None = Field(None, ge=8)
    """Width of the feed-forward layer; by default 8/3 of d_model (gpt2 and bert: 4 times), rounded up to a multiple
    of 32."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies; gpt2 and bert have none."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of the norms."""
    tie_embeddings: bool = True
    """One matrix for the token embedding and the output head."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide d_model={self.d_model}. Change one, or set head_dim."
            )
        width = self.head_dim if self.head_dim is not None else self.d_model // self.num_heads
        if self.family in ("gpt2", "bert"):
            if self.num_kv_heads not in (None, self.num_heads) or width * self.num_heads != self.d_model:
                raise ValueError(
                    f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim} with family={self.family}: its heads "
                    "share nothing and are d_model / num_heads wide. Leave both out."
                )
        elif width % 2:
            raise ValueError(f"a head is {width} wide: rotary positions need an even width. Set head_dim.")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}. Change one."
            )
        return self


class ParallelConfig(Section):
    """The mesh of ranks: dp · pp processes."""

    dp: int | Literal["auto"] = "auto"
    """Data-parallel degree; `auto` takes what the slots allow. After a loss an elastic run goes on with less."""
    pp: int = Field(1, ge=1)
    """Pipeline stages."""

    @model_validator(mode="after")
    def _dp_positive(self) -> Self:
        if self.dp != "auto" and self.dp < 1:
            raise ValueError(f"dp={self.dp}: a degree is at least 1. Set a positive number or auto.")
        return self


class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 1
    """What is partitioned over dp: nothing, optimizer states, gradients as well, or weights as well."""


class OptimizerConfig(Section):
    """The optimizer."""

    name: Literal["adamw"] = "adamw"
    """AdamW (decoupled weight decay)."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""
    eps: float = Field(1e-8, gt=0)
    """Term that keeps the update finite."""
    weight_decay: float = Field(0.1, ge=0)
    """Decay of the weights; norms are not decayed."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; 0 does not clip."""


class ScheduleConfig(Section):
    """The learning rate over the steps."""

    name: Literal["constant", "cosine", "wsd"] = "cosine"
    """`wsd` is warm-up, stable, decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear rise from 0."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Share of all steps in which `wsd` falls linearly to the minimum."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """The last learning rate as a share of the peak (cosine and wsd)."""


class EvalConfig(Section):
    """Evaluation on the held-out split."""

    every: int = Field(0, ge=0)
    """Evaluate after every so many steps, and after the last; 0: after the last only."""
    max_batches: int | None = Field(None, ge=1)
    """Look at no more than this many global batches; by default at the whole split."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: int = Field(100, ge=1)
    """Write after every so many steps, and after the last."""
    keep_last: int = Field(3, ge=1)
    """Keep the newest so many."""
    keep_best: int = Field(1, ge=0)
    """Keep so many more with the lowest evaluation loss."""
    asynchronous: bool = True
    """Copy the state to host memory and write it beside training; false stands still until it is written."""


class TrainConfig(Section):
    """How it is trained."""

    task: str = Field("causal_lm", pattern=TASK_PATTERN)
    """What is learned. `causal_lm` predicts the next token; `sft` does so for the assistant's words of chats;
    `text_classification` tells the class of a row. A task of your own is `package.module:Class`."""
    classification: ClassificationConfig = ClassificationConfig()
    """How classes are told apart; for `text_classification`."""
    parallel: ParallelConfig = ParallelConfig()
    """The mesh."""
    zero: ZeroConfig = ZeroConfig()
    """DeepSpeed ZeRO."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where the slots have GPUs."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 on GPUs and fp32 on CPUs; with bf16 masters and accumulation stay fp32."""
    global_batch: int = Field(32, ge=1, lt=2**31)
    """Rows per optimizer step, on every mesh."""
    micro_batch: int | Literal["auto"] = "auto"
    """Rows per forward pass of a rank; `auto` keeps a pipeline full and a micro-batch at 8 rows or fewer."""
    steps: int = Field(1000, ge=1)
    """Optimizer steps of the run."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate schedule."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    deterministic: bool = False
    """Ask torch for deterministic GPU kernels; CPU runs are deterministic as they are."""
    collective_timeout_s: float = Field(120.0, gt=0)
    """A collective that waits longer than this fails the rank."""

    @model_validator(mode="after")
    def _mesh_is_legal(self) -> Self:
        if self.parallel.pp > 1 and self.zero.stage != 1:
            raise ValueError(
                f"zero.stage={self.zero.stage} with parallel.pp={self.parallel.pp}: pipeline stages need ZeRO "
                "stage 1. Set zero.stage=1 or parallel.pp=1."
            )
        if self.zero.stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero.stage=0 with precision=bf16: without ZeRO there are no fp32 masters. "
                "Set zero.stage=1 or precision=fp32."
            )
        if self.micro_batch != "auto" and self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch}: set a positive number or auto.")
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} exceeds steps={self.steps}. Lower one."
            )
        return self
class ClassificationConfig(Section):
    """The `text_classification` task."""

    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = "none"
    """What the loss of a row counts by its class: all the same, `balanced` (rarer classes more, so that all classes
    count the same in sum), or a number for each class by its name."""
    best: Literal["macro_f1", "accuracy", "loss"] = "macro_f1"
    """Which metric on the held-out split says which checkpoint is best."""


