"""Names, units and meanings of what training measures; call sites invent nothing.

Declarations only: values travel in the reports of `trainer.protocol`.
"""

from dataclasses import dataclass

__all__ = ["METRICS", "Metric"]


@dataclass(frozen=True)
class Metric:
    """One measured quantity."""

    name: str
    unit: str
    """`1` where there is none."""
    tags: tuple[str, ...]
    """What a value is told apart by, beside the run and the step."""
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric("train/loss", "nats", (), "mean token loss of the global batch, before the update"),
    Metric("train/grad_norm", "1", (), "L2 norm of the whole model's gradient before clipping"),
    Metric("train/lr", "1", (), "learning rate of the step"),
    Metric("train/tokens", "tokens", (), "valid tokens in the global batch"),
    Metric("train/step_s", "s", (), "from the first row asked for to the update done"),
    Metric("data/wait_s", "s", (), "part of step_s in which the reporting rank waited for rows"),
    Metric("eval/loss", "nats", (), "mean token loss on the held-out split"),
    Metric("eval/perplexity", "1", (), "exp of eval/loss"),
    Metric("eval/tokens", "tokens", (), "valid tokens looked at"),
    Metric("ckpt/save_s", "s", ("rank",), "how long a rank stood still to write its part"),
    Metric("ckpt/bytes", "bytes", ("rank",), "size of a rank's part"),
    Metric("rank/import_s", "s", ("rank",), "loading torch, deepspeed and the trainer; 0 in a warm standby"),
    Metric("rank/process_group_s", "s", ("rank",), "joining the other ranks"),
    Metric("rank/engine_s", "s", ("rank",), "building the engine"),
    Metric("rank/load_s", "s", ("rank",), "initial weights or a checkpoint into the engine"),
)
