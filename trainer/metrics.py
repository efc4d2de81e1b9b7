"""Every figure that a run writes for people to watch: name, unit and meaning, and how it follows from a report.

Pure; loads no torch, because the controller computes the figures from what ranks report.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.observe.peaks import mfu
from trainer.protocol import EvalReport, StepReport

__all__ = ["METRICS", "Metric", "RunFacts", "evaluation_figures", "step_figures"]


@dataclass(frozen=True)
class Metric:
    """A declared figure."""

    unit: str
    meaning: str


METRICS: Mapping[str, Metric] = {
    "train/loss": Metric("nats", "mean loss of the global batch, before the update"),
    "train/grad_norm": Metric("1", "L2 norm of the whole gradient before clipping"),
    "train/lr": Metric("1", "learning rate of the step"),
    "train/tokens": Metric("tokens", "tokens of the step's rows that are no padding, those without a loss too"),
    "train/tokens_per_s": Metric("tokens/s", "those tokens by the seconds of the step, of the whole run"),
    "train/tokens_per_s_per_gpu": Metric("tokens/s", "the same for one rank's device, GPU or CPU slot"),
    "train/mfu_pct": Metric("%", "model FLOPs utilisation; absent where the device's peak is not known"),
    "train/step_s": Metric("s", "from the first row asked for to the update done"),
    "data/wait_s": Metric("s", "part of it in which the reporting rank waited for rows"),
    "memory/peak_gib": Metric("GiB", "most memory of the reporting rank so far: the allocator's on GPUs, else RSS"),
    "eval/loss": Metric("nats", "mean loss on the held-out split, over tokens or a classifier's rows"),
    "eval/perplexity": Metric("1", "exp of it; of language models"),
    "eval/tokens": Metric("tokens", "tokens that it is the mean of; of language models"),
    "eval/rows": Metric("rows", "rows with a class that it is the mean of; of classifiers"),
}
"""A task's own evaluation metrics are written as `eval/NAME` beside these."""


@dataclass(frozen=True)
class RunFacts:
    """What does not change in an attempt and turns a report into figures."""

    num_ranks: int
    row_tokens: int
    """Tokens of a global batch's rows, padding included: what the devices compute."""
    flops_per_token: float | None = None
    """Of the model, forward and backward; None where it was not told."""
    peak_flops: float | None = None
    """FLOP/s of one rank's device at most; None where it is not known."""


def step_figures(report: StepReport, facts: RunFacts) -> dict[str, float]:
    """Figures of one optimizer step, by their declared names."""
    seconds = max(report.step_s, 1e-9)
    found = {
        "train/lr": report.lr,
        "train/tokens": float(report.tokens),
        "train/tokens_per_s": report.tokens / seconds,
        "train/tokens_per_s_per_gpu": report.tokens / seconds / facts.num_ranks,
        "train/step_s": report.step_s,
        "data/wait_s": report.data_wait_s,
    }
    if report.loss is not None:
        found["train/loss"] = report.loss
    if report.grad_norm is not None:
        found["train/grad_norm"] = report.grad_norm
    if report.memory_bytes:
        found["memory/peak_gib"] = report.memory_bytes / 2**30
    if facts.peak_flops and facts.flops_per_token:
        computed = facts.row_tokens / seconds
        found["train/mfu_pct"] = 100 * mfu(computed, facts.flops_per_token, facts.num_ranks, facts.peak_flops)
    return found


def evaluation_figures(report: EvalReport) -> dict[str, float]:
    """Figures of one evaluation, by their declared names, and the task's own."""
    found = {"eval/loss": report.loss}
    if report.perplexity is None:
        found["eval/rows"] = float(report.tokens)
    else:
        found |= {"eval/perplexity": report.perplexity, "eval/tokens": float(report.tokens)}
    return found | {f"eval/{name}": value for name, value in report.metrics.items()}
