"""What a rank is told and what it tells: the seam between the trainer and whatever starts it.

Plain frozen dataclasses with a JSON round trip. No torch and no DeepSpeed here, so that a controller may import it.
A rank is `trainer.worker.run(spec, hooks)`; everything it says goes through `RankHooks`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import TypeAdapter, ValidationError

from data_service.access import DataAccess
from data_service.errors import ConfigError
from trainer.adapters import Base
from trainer.config import ModelConfig, TrainConfig
from trainer.manifest import PartReceipt, TrainState
from trainer.tasks.facts import TaskFacts

if TYPE_CHECKING:
    from trainer.fragments import Fragment

__all__ = [
    "EvalReport",
    "FinishedReport",
    "NoHooks",
    "PartReport",
    "ProfileSteps",
    "RankHooks",
    "ReadyReport",
    "Report",
    "Sample",
    "SampleWishes",
    "StepReport",
    "StopAfter",
    "WorkerSpec",
    "report_from_json",
    "report_to_json",
]


@dataclass(frozen=True)
class SampleWishes:
    """What a language model continues at each evaluation."""

    prompts: tuple[tuple[int, ...], ...]
    """Token ids to continue; with none, the beginnings of held-out rows."""
    count: int
    """Held-out rows to continue where there are no prompts."""
    prompt_tokens: int
    """Tokens of a held-out row that are given."""
    max_tokens: int
    """Tokens to generate."""


@dataclass(frozen=True)
class WorkerSpec:
    """Everything one rank needs to know, and no more of the run's configuration than that.

    It names no dataset path: rows come from the data service only.
    """

    attempt: int
    """Fencing token of the controller; checkpoint parts are written under it."""
    rank: int
    """Position in the mesh: dp index * pp + pipeline stage."""
    world_size: int
    dp: int
    pp: int
    local_rank: int
    """Index among the ranks of this node; the CUDA device where device is cuda."""
    device: Literal["cpu", "cuda"]
    master_addr: str
    """Where rank 0 opens the TCPStore."""
    master_port: int
    seed: int
    seq_len: int
    """Tokens a row feeds to the model."""
    vocab_size: int
    model: ModelConfig
    train: TrainConfig
    data: DataAccess
    checkpoints_uri: str
    resume_step: int | None
    """The committed checkpoint to go on from; None starts from initial weights."""
    facts: TaskFacts = TaskFacts()
    """What the task knows of the dataset."""
    threads: int = 1
    """CPU threads of torch in this rank."""
    interface: str | None = None
    """Network interface for collectives (`lo` on one machine); None leaves the choice to the backend."""
    samples: SampleWishes | None = None
    """What to generate at each evaluation; None for nothing."""
    base: Base | None = None
    """What adapters are trained on (`train.lora`). Whoever starts the ranks has read it: it may take longer than ranks
    wait for each other."""

    def to_json(self) -> str:
        """One line of JSON."""
        return _dump(WorkerSpec, self)

    @classmethod
    def from_json(cls, text: str) -> "WorkerSpec":
        """The inverse of `to_json`.

        Raises:
            ConfigError: the text is no worker specification.
        """
        try:
            spec: WorkerSpec = _adapter(WorkerSpec).validate_json(text)
        except ValidationError as error:
            # neither what pydantic prints of the values nor the cause goes along: the data token may be among them
            raise ConfigError(f"A rank was started with a malformed specification: {_problems(error)}") from None
        return spec


@dataclass(frozen=True)
class ReadyReport:
    """A rank has built its engine and loaded its state. Every rank sends one."""

    rank: int
    phases: dict[str, float]
    """Seconds spent in `import`, `process_group`, `engine` and `load`."""
    device_name: str = ""
    """What the driver calls the rank's GPU; empty on CPUs."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the weights that compute."""
    flops_per_token: float = 0.0
    """What the whole model needs for a token, forward and backward."""


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. Sent by the reporter rank: the last stage of dp index 0."""

    step: int
    """Optimizer steps done, this one included: the first step reports 1."""
    batch: int
    """Absolute number of the global batch that it consumed (`Plan.batch_at`)."""
    loss: float | None
    """Mean loss over what counts in the global batch (tokens, or the task's other units), before the update; None where
    nothing does."""
    tokens: int
    """Tokens of the global batch that are no padding."""
    sample_hash: str
    """Hash of the rows that the ranks consumed, in global order."""
    lr: float
    grad_norm: float | None
    """L2 norm of the whole model's gradient before clipping; None where it is no finite number."""
    step_s: float
    """Seconds from the first row asked for to the update done."""
    data_wait_s: float
    """Seconds of those in which this rank waited for rows."""
    memory_bytes: int = 0
    """Most memory that this rank has held so far: the allocator's peak on GPUs, resident memory on CPUs."""
    skipped: bool = False
    """Whether the step made no update (`train.guard`, or an overflow of fp16)."""


@dataclass(frozen=True)
class Sample:
    """What the model wrote after a prompt, as token ids: a rank has no tokenizer."""

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class EvalReport:
    """One evaluation on the held-out split. Sent by the reporter rank; a fresh run sends one for step 0."""

    step: int
    loss: float
    """Mean loss: of tokens, or of the task's other units."""
    perplexity: float | None
    """Of language models; None for a classifier."""
    tokens: int
    """Units that the loss is the mean of: tokens that count, or a classifier's rows."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The task's own metrics, by name."""
    samples: tuple[Sample, ...] = ()
    """Greedy continuations, for language models."""
    metric: str = "loss"
    """What says which checkpoint is best: `loss`, or one of `metrics`."""
    better: Literal["lower", "higher"] = "lower"


@dataclass(frozen=True)
class PartReport:
    """A rank has written its part of a checkpoint. Every rank sends one for each checkpoint."""

    step: int
    rank: int
    receipt: PartReceipt
    state: TrainState | None
    """What the manifest records beside the fragments; the reporter rank fills it, all but its `config`."""
    write_s: float = 0.0
    """Seconds the rank stood still for it: waiting for the save before, copying, and the GPU's wait for the copy."""
    total_s: float = 0.0
    """Seconds until the part was durable."""


@dataclass(frozen=True)
class FinishedReport:
    """A rank leaves the loop in good order. Every rank sends one, as its last report."""

    rank: int
    step: int
    reason: Literal["steps", "stop"]
    """All steps are done, or a `StopAfter` was agreed."""


Report = ReadyReport | StepReport | EvalReport | PartReport | FinishedReport

_KINDS: dict[str, Any] = {
    "ready": ReadyReport,
    "step": StepReport,
    "eval": EvalReport,
    "part": PartReport,
    "finished": FinishedReport,
}
_KIND_OF: dict[Any, str] = {report: kind for kind, report in _KINDS.items()}


@dataclass(frozen=True)
class StopAfter:
    """Ask a rank to write a checkpoint after this optimizer step, and to leave.

    A step that has passed already means the next step boundary. The ranks agree on the step by a collective, so that
    it does not matter which of them hears of it, or when.
    """

    step: int


@dataclass(frozen=True)
class ProfileSteps:
    """Ask a rank to trace its next optimizer steps with torch's profiler, once for each `number`."""

    number: int
    """Of the request; a rank takes a number it has seen for the same request."""
    steps: int
    uri: str
    """Folder for the traces, `rank_00000.json.gz` each."""


class RankHooks(Protocol):
    """What a rank calls, from its main thread; `report` also from the thread that writes checkpoints."""

    def report(self, report: Report) -> None:
        """Take a report; it must not block for long. A `PartReport` may come while another report is taken."""

    def control(self) -> StopAfter | None:
        """Asked once before each step; None lets the rank go on."""

    def profile(self) -> ProfileSteps | None:
        """Asked once before each step; the newest request there is, None without any."""

    def snapshot(self, step: int, fragments: "Sequence[Fragment]") -> None:
        """Take the rank's fragments after a step; the memory is only valid during the call."""

    def wants_snapshot(self, step: int) -> bool:
        """Whether `snapshot` is to be called after this step; fragments cost a copy."""


class NoHooks:
    """Hooks that do nothing; a base for those who need some of them."""

    def report(self, report: Report) -> None:
        """Drop it."""

    def control(self) -> StopAfter | None:
        """Never stop."""
        return None

    def profile(self) -> ProfileSteps | None:
        """Never trace."""
        return None

    def snapshot(self, step: int, fragments: "Sequence[Fragment]") -> None:
        """Drop it."""

    def wants_snapshot(self, step: int) -> bool:
        """Take no snapshots."""
        return False


def report_to_json(report: Report) -> str:
    """One line of JSON with the report's `kind`."""
    kind = _KIND_OF[type(report)]
    fields = _adapter(_KINDS[kind]).dump_python(report, mode="json", by_alias=True)
    return json.dumps({"kind": kind, **fields}, separators=(",", ":"))


def report_from_json(text: str) -> Report:
    """The inverse of `report_to_json`.

    Raises:
        ConfigError: the text is no report.
    """
    try:
        fields = json.loads(text)
        kind = _KINDS[fields.pop("kind")]
        report: Report = _adapter(kind).validate_python(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"A rank sent a malformed report {text[:200]!r}: {error}") from error
    return report


def _problems(error: ValidationError) -> str:
    """Where a value is wrong and why, without the value."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'the whole'}: {item['msg']}" for item in found)


def _dump(kind: Any, value: object) -> str:
    return json.dumps(_adapter(kind).dump_python(value, mode="json", by_alias=True), separators=(",", ":"))


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
