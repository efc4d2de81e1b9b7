"""A position in the data: which plan, and how many of its global batches were consumed.

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
    consumed_batches: int

    def check(self, plan: Plan) -> None:
        """Raise CursorMismatchError unless this cursor was taken on `plan`."""
        if self.plan_digest != plan.digest:
            raise CursorMismatchError(
                f"the checkpoint stands in plan {self.plan_digest}, the data service offers plan {plan.digest} "
                f"(split {plan.split}, seed {plan.seed}, seq_len {plan.seq_len}, global_batch {plan.global_batch}, "
                f"dataset {plan.dataset_digest}): going on would lose or repeat rows. "
                "Resume with the run's own data, seed, seq_len and global_batch."
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
        try:
            cursor = cls(plan_digest=str(value["plan_digest"]), consumed_batches=int(value["consumed_batches"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a cursor: {text[:200]!r}.") from error
        if cursor.consumed_batches < 0:
            raise ValueError(f"cursor.consumed_batches={cursor.consumed_batches} is negative.")
        return cursor
