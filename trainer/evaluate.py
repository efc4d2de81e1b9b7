"""Loss and perplexity on the held-out split.

Owns the walk over the evaluation plan and the mean over its tokens. The rows come through the same service, layout and
weights as training rows, so that an evaluation is equal on every mesh.
"""

import math
from dataclasses import dataclass

from data_service.errors import ConfigError
from trainer.batching import RowSource, count_tokens, micro_batches
from trainer.deepspeed_engine import TrainEngine

__all__ = ["Evaluation", "evaluate", "perplexity"]

_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Evaluation:
    """An evaluation; the same on every rank."""

    loss: float
    """Mean token loss in nats."""
    tokens: int
    """Valid tokens looked at."""


def perplexity(loss: float) -> float:
    """Exponential of the mean token loss; capped where exp would overflow a double."""
    return math.exp(min(loss, _LARGEST_EXPONENT))


def evaluate(engine: TrainEngine, client: RowSource, max_batches: int | None) -> Evaluation:
    """Evaluate on the held-out split. A collective: every rank calls it.

    Args:
        engine: holds the model and the layout.
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
    total, num_tokens = 0.0, 0
    for _ in range(stop):
        rows = None if stream is None else next(stream)
        batch_tokens = engine.global_tokens(0 if rows is None else count_tokens(rows))
        batch = [] if rows is None else micro_batches(rows, layout, batch_tokens, engine.device)
        total += engine.evaluate(batch) * batch_tokens
        num_tokens += batch_tokens
    if num_tokens == 0:
        raise ConfigError(
            f"the held-out split was evaluated, none of the labels of its {stop} global batches counts: its chats have "
            "no assistant's words within data.seq_len. Raise data.seq_len, data.split.eval or train.eval.max_batches."
        )
    return Evaluation(total / num_tokens, num_tokens)
