"""What happens to a step whose loss or gradient is no number, or whose loss leaps.

Pure: the same losses give the same decisions on every rank and after a resume, because all that a decision depends on
is in `GuardState`, which checkpoints carry. Which update is not made is up to the engine. No torch here, so that a
manifest may hold the state.
"""

import math
import statistics
from dataclasses import dataclass, replace
from typing import Literal

from trainer.config import GuardConfig
from trainer.errors import LossSpikeError, NonFiniteLossError

__all__ = ["Guard", "GuardState", "LossScale", "Verdict"]

Verdict = Literal["good", "non_finite", "spike"]


@dataclass(frozen=True)
class LossScale:
    """Where the loss scale of fp16 stands."""

    scale: float
    """What losses are multiplied by."""
    quiet_steps: int
    """Steps since the last overflow; after enough of them the scale doubles."""
    hysteresis: int
    """Overflows that are taken before the scale halves."""


@dataclass(frozen=True)
class GuardState:
    """What later decisions depend on."""

    losses: tuple[float, ...] = ()
    """Losses of the last `guard.window` good steps, oldest first; empty where no spike is looked for."""
    skipped: int = 0
    """Steps whose update was not made, in the whole run."""
    in_row: int = 0
    """Of those the ones right before the next step."""
    first_batch: int | None = None
    """The global batch of the first of these."""


class Guard:
    """Judges the steps of one run, in order."""

    def __init__(self, config: GuardConfig, state: GuardState) -> None:
        """Go on from a state.

        Args:
            config: the `train.guard` section.
            state: of the checkpoint that the run goes on from, or a new one.
        """
        self._config = config
        self.state = state

    @property
    def skips(self) -> bool:
        """Whether bad steps are skipped, so that they must be judged before their update."""
        return self._config.action == "skip"

    def admits(self, loss: float, grad_norm: float) -> bool:
        """Whether a step may change the weights."""
        return self.judge(loss, grad_norm) == "good"

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """What a step is.

        Args:
            loss: mean loss of its global batch.
            grad_norm: of the whole gradient, before clipping; negative stands for one that is no number.
        """
        if not math.isfinite(loss) or not math.isfinite(grad_norm) or grad_norm < 0:
            return "non_finite"
        factor, seen = self._config.spike_factor, self.state.losses
        if factor is not None and len(seen) >= self._config.window and loss > factor * statistics.median(seen):
            return "spike"
        return "good"

    def record(self, step: int, batch: int, loss: float, grad_norm: float, *, counted: bool, overflowed: bool) -> bool:
        """Take note of a step that is done.

        Args:
            step: optimizer steps done, this one included.
            batch: absolute number of its global batch.
            loss: as for `judge`.
            grad_norm: as for `judge`.
            counted: whether any unit of the batch counts; a batch without one has no loss to compare.
            overflowed: whether the gradient only exceeded the range of fp16, which the loss scale answers.

        Returns:
            Whether the step was skipped.

        Raises:
            NonFiniteLossError: the loss or gradient is no number, and steps are not skipped, or too many were.
            LossSpikeError: the loss leapt, and steps are not skipped, or too many were.
        """
        config, state = self._config, self.state
        verdict = "good" if overflowed and math.isfinite(loss) else self.judge(loss, grad_norm)
        if verdict == "good" and not overflowed:
            losses = state.losses
            if config.spike_factor is not None and counted:
                losses = (*losses, loss)[-config.window :]
            self.state = GuardState(losses, state.skipped)
            return False
        if verdict == "good":
            self.state = replace(state, skipped=state.skipped + 1)
            return True
        first = batch if state.first_batch is None else state.first_batch
        self.state = replace(state, skipped=state.skipped + 1, in_row=state.in_row + 1, first_batch=first)
        if self.skips and self.state.in_row < config.max_skips:
            return True
        kind = NonFiniteLossError if verdict == "non_finite" else LossSpikeError
        raise kind(self._story(verdict, step, first, batch, loss, grad_norm))

    def _story(self, verdict: Verdict, step: int, first: int, batch: int, loss: float, grad_norm: float) -> str:
        """What was found, and what to change."""
        batches = f"global batch {batch}" if first == batch else f"global batches {first} to {batch}"
        found = f"Step {step} ({batches}): loss {loss:g}, gradient norm {'nan' if grad_norm < 0 else f'{grad_norm:g}'}"
        if verdict == "spike":
            median = statistics.median(self.state.losses)
            found += f"; more than train.guard.spike_factor={self._config.spike_factor:g} times the median {median:g}"
        if self.skips:
            found += f"; bad step number {self.state.in_row} in a row (train.guard.max_skips={self._config.max_skips})"
        before = step - self.state.in_row
        return (
            f"{found}. Leave the batches out with data.skip=[{{first: {first}, end: {batch + 1}}}] (where the newest "
            f"checkpoint is past step {before}, first go back with `stormjib checkpoint drop FILE --after {before}`), "
            "lower train.optimizer.lr, or lengthen train.schedule.warmup_steps."
        )
