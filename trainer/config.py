"""Configuration of `model` and `train`.

What decides a run's layout may be `auto` in a file: `AutoTrainConfig`. A rank is told a `TrainConfig`, which has none.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_service.settings import Section

__all__ = [
    "AutoParallelConfig",
    "AutoTrainConfig",
    "AutoZeroConfig",
    "CheckpointConfig",
    "ClassificationConfig",
    "EvalConfig",
    "GuardConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParameterGroupConfig",
    "ScheduleConfig",
    "TrainConfig",
    "ZeroConfig",
]

RUN_REFERENCE = r"run://(?P<run>[a-z0-9][a-z0-9-]*)(@(?P<which>best|latest|step=\d+))?"
"""`model.from` of a run that starts where another one is."""
TASK_PATTERN = r"^(causal_lm|sft|text_classification|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$"
"""Our tasks, and the path of a class."""


class ModelConfig(Section):
    """The Transformer. Either its shape, or `from` an existing Hugging Face folder."""

    family: Literal["llama", "qwen2", "qwen3", "gpt2", "bert"] = "llama"
    """Architecture. `llama` is RMSNorm, rotary positions, SwiGLU and grouped-query attention; `qwen2` adds biases to
    queries, keys and values, `qwen3` norms to queries and keys. `gpt2` is LayerNorm, learned positions, GELU and
    biases. `bert` is an encoder: it classifies and does not generate."""
    from_: str | None = Field(None, alias="from")
    """A Hugging Face folder whose configuration and weights to start from; the shape keys are then read there. Or
    another run below the same `run.storage`: `run://NAME@best`, `run://NAME@latest` or `run://NAME@step=400`."""
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

    @field_validator("from_")
    @classmethod
    def _reference_is_whole(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("run://") and not re.fullmatch(RUN_REFERENCE, value):
            raise ValueError(f"{value!r} names no run. Write run://NAME@best, run://NAME@latest or run://NAME@step=N.")
        return value

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


class AutoParallelConfig(Section):
    """The mesh of ranks: dp · pp processes."""

    dp: int | Literal["auto"] = "auto"
    """Data-parallel degree; `auto` takes what the slots allow. After a loss an elastic run goes on with less."""
    pp: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Pipeline stages. `auto` is what the planner finds best whenever the run is started; where it cannot plan, 1."""
    balance: Literal["parameters", "measured"] = "parameters"
    """What layers cost where a pipeline is cut: their matrices, or their time, measured when an attempt starts."""

    @model_validator(mode="after")
    def _dp_positive(self) -> Self:
        if self.dp != "auto" and self.dp < 1:
            raise ValueError(f"dp={self.dp}: a degree is at least 1. Set a positive number or auto.")
        return self

    @property
    def safe_pp(self) -> int:
        """Pipeline stages; for `auto` those without a plan."""
        return 1 if self.pp == "auto" else self.pp


class ParallelConfig(AutoParallelConfig):
    """The mesh, its pipeline stages decided."""

    pp: int = Field(1, ge=1)
    """Pipeline stages."""


class AutoZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3, "auto"] = 1
    """What is partitioned over dp: nothing, optimizer states, gradients as well, or weights as well. `auto` takes what
    the planner finds best; where it cannot plan 1, and 3 with offloaded weights."""
    offload_optimizer: Literal["none", "cpu", "auto"] = "none"
    """`cpu` keeps masters and moments in host memory, and updates them there. `auto` does so on GPUs where the planner
    finds it best, and knows the host's memory."""
    offload_parameters: Literal["none", "cpu", "auto"] = "none"
    """`cpu` keeps the partitions of the weights in host memory between uses; needs stage 3. `auto` as above."""

    @model_validator(mode="after")
    def _offload_is_legal(self) -> Self:
        if self.offload_optimizer == "cpu" and self.stage == 0:
            raise ValueError(
                "offload_optimizer=cpu with stage=0: without ZeRO every rank would hold all of it. Set stage=1, 2 or 3."
            )
        if self.offload_parameters == "cpu" and self.stage not in (3, "auto"):
            raise ValueError(
                f"offload_parameters=cpu with stage={self.stage}: only stage 3 cuts the weights. Set stage=3."
            )
        return self

    @property
    def safe_stage(self) -> Literal[0, 1, 2, 3]:
        """The stage; for `auto` the one without a plan."""
        if self.stage == "auto":
            return 3 if self.offload_parameters == "cpu" else 1
        return self.stage


class ZeroConfig(AutoZeroConfig):
    """DeepSpeed ZeRO, all decided."""

    stage: Literal[0, 1, 2, 3] = 1
    """What is partitioned over dp."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where masters and moments are."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where the partitions of the weights are."""


class ParameterGroupConfig(Section):
    """Parameters that are trained in another way than the rest."""

    match: str = Field(min_length=1)
    """Canonical names, with `*` for any characters: `embedding.*`, `*.norm.weight`, `blocks.0.*`, `*lora*`."""
    lr_scale: float = Field(1.0, ge=0)
    """Their learning rate as a multiple of the run's; 0 leaves them as they are."""
    weight_decay: float | None = Field(None, ge=0)
    """Their weight decay; by default as without this group."""


class OptimizerConfig(Section):
    """The optimizer."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """`adamw` decays weights apart from the gradient; `adam` and `sgd` add the decay to the gradient."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments (adamw and adam)."""
    eps: float = Field(1e-8, gt=0)
    """Term that keeps the update finite (adamw and adam)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the last update that sgd keeps; 0 keeps nothing, and no state."""
    nesterov: bool = False
    """Whether sgd looks ahead along its momentum."""
    weight_decay: float = Field(0.1, ge=0)
    """Decay of the weights; norms and biases are not decayed."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; 0 does not clip."""
    groups: tuple[ParameterGroupConfig, ...] = Field((), max_length=32)
    """Parameters that are trained in another way; of several groups that match, the last one counts."""

    @model_validator(mode="after")
    def _is_an_optimizer(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: both lie from 0 to below 1. Change them.")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=true with momentum=0: there is nothing to look ahead along. Set momentum=0.9.")
        return self


class ScheduleConfig(Section):
    """The learning rate over the steps."""

    name: Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"] = "cosine"
    """What follows the warm-up: the peak, half a cosine, a straight fall, a fall with 1 / sqrt(step), or `wsd`:
    warm-up, stable, decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear rise from 0."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Share of all steps in which `wsd` falls linearly to the minimum."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """The last learning rate as a share of the peak (cosine, linear and wsd), or the least one (inverse_sqrt)."""


class GuardConfig(Section):
    """What happens to a step whose loss or gradient is no number, or whose loss leaps."""

    action: Literal["stop", "skip"] = "stop"
    """`stop` ends the run with the batches named; `skip` goes on without that step's update."""
    spike_factor: float | None = Field(None, gt=1)
    """A loss above so many times the median of the last `window` ones counts too; by default none does."""
    window: int = Field(32, ge=4, le=1024)
    """Steps that the median is taken of; before so many there is no spike."""
    max_skips: int = Field(8, ge=1)
    """So many skipped steps in a row stop the run after all."""


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
    """Keep so many more that are best by the task's metric: the loss of language models, `classification.best`."""
    asynchronous: bool = True
    """Copy the state to host memory and write it beside training; false stands still until it is written."""


class ClassificationConfig(Section):
    """The `text_classification` task."""

    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = "none"
    """What the loss of a row counts by its class: all the same, `balanced` (rarer classes more, so that all classes
    count the same in sum), or a number for each class by its name."""
    best: Literal["macro_f1", "accuracy", "loss"] = "macro_f1"
    """Which metric on the held-out split says which checkpoint is best."""


class LoraConfig(Section):
    """Train small matrices beside frozen ones (LoRA); needs `model.from`."""

    rank: int = Field(16, ge=1)
    """Inner width of an adapter."""
    alpha: float = Field(32.0, gt=0)
    """An adapter counts alpha / rank."""
    targets: Literal["all"] | tuple[Literal["q", "k", "v", "out", "gate", "up", "down"], ...] = "all"
    """Matrices of each block that get one: queries, keys, values and output of attention, and those of the feed-forward
    layer; `all` is those that the model has."""
    dropout: Literal[0] = 0
    """None: models train without dropout here."""

    @model_validator(mode="after")
    def _has_targets(self) -> Self:
        if not self.targets:
            raise ValueError("targets is empty: nothing would be trained. Name matrices, or set `all`.")
        return self


class AutoTrainConfig(Section):
    """How it is trained."""

    task: str = Field("causal_lm", pattern=TASK_PATTERN)
    """What is learned. `causal_lm` predicts the next token; `sft` does so for the assistant's words of chats;
    `text_classification` tells the class of a row. A task of your own is `package.module:Class`."""
    lora: LoraConfig | None = None
    """Train adapters instead of the model's own weights."""
    classification: ClassificationConfig = ClassificationConfig()
    """How classes are told apart; for `text_classification`."""
    parallel: AutoParallelConfig = AutoParallelConfig()
    """The mesh."""
    zero: AutoZeroConfig = AutoZeroConfig()
    """DeepSpeed ZeRO."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where the slots have GPUs."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto` is bf16 on GPUs and fp32 on CPUs. Masters and accumulation are fp32 always. `fp16` is for GPUs without
    bf16; its loss is scaled, and a step whose gradient overflows makes no update."""
    global_batch: int = Field(32, ge=1, lt=2**31)
    """Rows per optimizer step, on every mesh."""
    micro_batch: int | Literal["auto"] = "auto"
    """Rows per forward pass of a rank. `auto` takes what the planner finds fastest of what fits, where the memory of a
    rank is known; elsewhere at most 8 rows, and few enough to keep a pipeline full."""
    recompute: Literal["none", "blocks", "auto"] = "none"
    """What the forward pass keeps for the backward pass: everything, or of each block only its input, at the price of
    computing the block twice. `auto` takes what the planner finds best, and `none` where it cannot plan."""
    compile: bool = False
    """Let torch.compile fuse the inside of each block; for GPUs, where it saves passes over memory. Every rank then
    compiles for a minute when it starts."""
    steps: int = Field(1000, ge=1)
    """Optimizer steps of the run."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate schedule."""
    guard: GuardConfig = GuardConfig()
    """What happens to a step whose loss is no number, or leaps."""
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
        pp = self.parallel.safe_pp
        if self.zero.stage == "auto" and self.zero.offload_parameters == "cpu" and (pp > 1 or self.compile):
            raise ValueError(
                f"zero.offload_parameters=cpu with parallel.pp={self.parallel.pp} and compile={self.compile}: it needs "
                "ZeRO stage 3, which goes with neither. Set zero.offload_parameters=none, or change these."
            )
        if pp > 1 and self.zero.stage not in (1, "auto"):
            raise ValueError(
                f"zero.stage={self.zero.stage} with parallel.pp={self.parallel.pp}: pipeline stages need ZeRO "
                "stage 1. Set zero.stage=1 or parallel.pp=1."
            )
        if self.zero.stage == 0 and self.precision in ("bf16", "fp16"):
            raise ValueError(
                f"zero.stage=0 with precision={self.precision}: without ZeRO there are no fp32 masters. "
                "Set zero.stage=1 or precision=fp32."
            )
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("precision=fp16 with device=cpu: fp16 is for GPUs. Set precision=bf16 or fp32.")
        if self.compile and (self.device == "cpu" or self.zero.stage == 3):
            raise ValueError(
                f"compile=true with device={self.device} and zero.stage={self.zero.stage}: blocks are compiled for "
                "GPUs, and ZeRO stage 3 reads its weights by hooks that cannot be. Set compile=false."
            )
        if pp > 1 and self.precision == "fp16":
            raise ValueError(
                f"precision=fp16 with parallel.pp={self.parallel.pp}: DeepSpeed adds up tied gradients in a pipeline "
                "before they are scaled back. Set precision=bf16 or parallel.pp=1."
            )
        if pp > 1 and self.zero.offload_optimizer == "cpu":
            raise ValueError(
                f"zero.offload_optimizer=cpu with parallel.pp={self.parallel.pp}: DeepSpeed moves gradients to the "
                "host before a pipeline has added up the tied ones. Set zero.offload_optimizer=none or parallel.pp=1."
            )
        if self.micro_batch != "auto" and self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch}: set a positive number or auto.")
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} exceeds steps={self.steps}. Lower one."
            )
        return self

    @property
    def auto_layout(self) -> dict[str, int | str]:
        """Keys of the layout that are left to the planner, with what they are where it cannot plan."""
        keys: dict[str, tuple[int | str, int | str]] = {
            "train.parallel.pp": (self.parallel.pp, self.parallel.safe_pp),
            "train.zero.stage": (self.zero.stage, self.zero.safe_stage),
            "train.zero.offload_optimizer": (self.zero.offload_optimizer, "none"),
            "train.zero.offload_parameters": (self.zero.offload_parameters, "none"),
            "train.recompute": (self.recompute, "none"),
        }
        return {key: safe for key, (asked, safe) in keys.items() if asked == "auto"}


class TrainConfig(AutoTrainConfig):
    """How it is trained, with the layout decided, but for dp and the micro-batch: they follow the slots."""

    parallel: ParallelConfig = ParallelConfig()
    """The mesh."""
    zero: ZeroConfig = ZeroConfig()
    """DeepSpeed ZeRO."""
    recompute: Literal["none", "blocks"] = "none"
    """What the forward pass keeps for the backward pass."""
