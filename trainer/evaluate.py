"""Loss and perplexity on the held-out split.

Owns the walk over the evaluation plan and the mean over its tokens. The rows come through the same service, layout and
weights as training rows, so that an evaluation is equal on every mesh.
"""

import math
from dataclasses import dataclass

from torch import distributed as dist

from data_service.errors import ConfigError
from trainer.batching import RowSource, micro_batches
from trainer.deepspeed_engine import TrainEngine
from trainer.tasks.base import Outputs, Sums, Targets, Task

__all__ = ["Evaluation", "evaluate", "perplexity"]

_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Evaluation:
    """An evaluation; the same on every rank."""

    loss: float
    """Mean loss over the task's units (tokens or rows), in nats."""
    tokens: int
    """Units looked at: valid tokens, or labelled rows."""
    metrics: dict[str, float]
    """What the task makes of its sums; empty where it has none."""


def perplexity(loss: float) -> float:
    """Exponential of the mean token loss; capped where exp would overflow a double."""
    return math.exp(min(loss, _LARGEST_EXPONENT))


def evaluate(engine: TrainEngine, task: Task, client: RowSource, max_batches: int | None) -> Evaluation:
    """Evaluate on the held-out split. A collective: every rank calls it.

    Args:
        engine: holds the model and the layout.
        task: what is learned.
        client: of the data service.
        max_batches: most global batches to look at; None for all.

    Raises:
        ConfigError: no label of these rows counts.
    """
    layout = engine.layout
    plan = client.plan("eval")
    stop = plan.num_batches if max_batches is None else min(plan.num_batches, max_batches)
    slots = layout.slots(engine.dp_index)
    stream = client.stream("eval", 0, stop, slots) if engine.consumes_rows else None
    sums = {name: held.to(engine.device) for name, held in task.zeros().items()}

    def observe(outputs: Outputs, targets: Targets) -> None:
        for name, seen in task.observe(outputs, targets).items():
            sums[name] += seen

    total, num_units = 0.0, 0
    for _ in range(stop):
        rows = None if stream is None else next(stream)
        (batch_units,) = engine.global_sums(0 if rows is None else task.count(rows))
        batch = [] if rows is None else micro_batches(task, rows, layout, batch_units, engine.device)
        total += engine.evaluate(batch, observe if sums else None) * batch_units
        num_units += batch_units
    if num_units == 0:
        raise ConfigError(
            f"the held-out split was evaluated, none of the labels of its {stop} global batches counts: its chats have "
            "no assistant's words within data.seq_len, or its rows no class. Raise data.seq_len, data.split.eval or "
            "train.eval.max_batches."
        )
    metrics = task.metrics(_over_all_ranks(sums))
    if task.metric != "loss" and task.metric not in metrics:
        raise ConfigError(
            f"the task says that {task.metric!r} decides which checkpoint is best, and gives no such metric "
            f"({', '.join(metrics) or 'none at all'}). Return it from `metrics`, or set `metric` to 'loss'."
        )
    return Evaluation(total / num_units, num_units, metrics)


def _over_all_ranks(sums: Sums) -> Sums:
    """The sums of the whole evaluation, on every rank; ranks before the last stage have seen nothing."""
    for held in sums.values():
        dist.all_reduce(held)
    return {name: held.cpu() for name, held in sums.items()}
