"""Which attempts have been shut out: a mark for each attempt, beside the steps, that says where it went on from.

An attempt that begins leaves the mark `fences/attempt_000003.from_00000400`. What an attempt before it commits behind
step 400, then or later, was not there when it began: it does not exist. So a controller that was taken for dead, or cut
off, can put its manifest whenever it likes, and changes nothing. One attempt number is claimed by one controller only
(`cluster.run_store`); marks are never changed. No torch here.
"""

import re
from dataclasses import dataclass

from data_service import storage

__all__ = ["FENCES", "Fences", "raise_fence", "read_fences"]

FENCES = "fences"
_MARK = re.compile(r"attempt_(\d+)\.from_(\d+)")


@dataclass(frozen=True)
class Fences:
    """Where attempts went on from."""

    marks: tuple[tuple[int, int], ...]
    """(attempt, step), ascending; step 0 where the attempt began from initial weights."""

    def shut_out(self, attempt: int, step: int) -> tuple[int, int] | None:
        """The mark that rules out what `attempt` commits as `step`; None where none does."""
        later = ((other, start) for other, start in self.marks if other > attempt and start < step)
        return next(later, None)


def raise_fence(checkpoints_uri: str, attempt: int, resume_step: int) -> None:
    """Shut earlier attempts out behind `resume_step`. Only the controller that claimed `attempt` calls this.

    Args:
        checkpoints_uri: the run's checkpoints.
        attempt: that begins.
        resume_step: the checkpoint it goes on from, looked for after the claim; 0 for none.
    """
    mark = f"attempt_{attempt:06d}.from_{resume_step:08d}"
    storage.write_bytes(storage.join(checkpoints_uri, FENCES, mark), b"")


def read_fences(checkpoints_uri: str) -> Fences:
    """All marks, by one listing."""
    found = (_MARK.fullmatch(name) for name in storage.list_names(storage.join(checkpoints_uri, FENCES)))
    return Fences(tuple(sorted((int(mark[1]), int(mark[2])) for mark in found if mark is not None)))
