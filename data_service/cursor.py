"""A position in the data: how many steps' batches were consumed, and what decided them.

Owns `Cursor`. It lives inside the model's checkpoint and is all the state the data needs to go on.
"""

import json
from dataclasses import asdict, dataclass

from data_service.errors import CursorMismatchError
from data_service.plan import Plan

__all__ = ["Cursor"]


@dataclass(frozen=True)
class Cursor:
    """Consumed global batches of one plan."""

    plan_digest: str
    """`Plan.digest_at(consumed_batches)`: plans that differ only behind it are taken up."""
    consumed_batches: int
    """Batches consumed, skipped ones not counted: the step index to go on with."""

    @classmethod
    def of(cls, plan: Plan, consumed_batches: int) -> "Cursor":
        """The cursor behind so many consumed batches."""
        return cls(plan.digest_at(consumed_batches), consumed_batches)

    def check(self, plan: Plan) -> None:
        """Raise CursorMismatchError unless the batches consumed so far are those of `plan`."""
        if self.plan_digest != plan.digest_at(self.consumed_batches):
            raise CursorMismatchError(
                f"the checkpoint has consumed {self.consumed_batches} global batches of plan {self.plan_digest}, the "
                f"data service offers plan {plan.digest_at(self.consumed_batches)} (split {plan.split}, seed "
                f"{plan.seed}, seq_len {plan.seq_len}, global_batch {plan.global_batch}, dataset "
                f"{plan.dataset_digest}): going on would lose or repeat rows. Resume with the run's own data, seed, "
                "seq_len and global_batch; new weights and skipped ranges may only begin at global batch "
                f"{plan.batch_at(self.consumed_batches)} or later (data.mixture.changes, data.skip)."
            )

    def to_json(self) -> str:
        """Less than 1 kB."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Cursor":
        """The inverse of `to_json`.

        Raises:
            ValueError: when it is not a cursor.
        """
        value = json.loads(text)
        digest, consumed = (
            (value.get("plan_digest"), value.get("consumed_batches")) if isinstance(value, dict) else ("", 0)
        )
        if not isinstance(digest, str) or not digest or type(consumed) is not int or consumed < 0:
            raise ValueError(
                f"a cursor was asked for, this is none: {text[:200]!r}. It holds plan_digest, a text, and "
                "consumed_batches, a number of at least 0. Resume from another checkpoint."
            )
        return cls(digest, consumed)
