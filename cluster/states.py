"""The states of a run and which may follow which. Pure."""

from enum import StrEnum

__all__ = ["RunState", "check_transition"]


class RunState(StrEnum):
    """Where a run stands."""

    PENDING = "pending"
    """Nothing is reserved yet: the data are prepared, or slots are awaited."""
    PLACING = "placing"
    """Ranks get their slots."""
    RUNNING = "running"
    """Ranks train."""
    DRAINING = "draining"
    """Ranks were asked to write a checkpoint and to leave."""
    RECOVERING = "recovering"
    """A rank or a node was lost; what is left of the attempt is being ended."""
    RESIZING = "resizing"
    """The mesh changes although nothing was lost."""
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the run is over; only a new controller can take it up again."""
        return self in (RunState.FINISHED, RunState.FAILED, RunState.CANCELLED)


_ENDS = {RunState.FINISHED, RunState.FAILED, RunState.CANCELLED}
_NEXT: dict[RunState, set[RunState]] = {
    RunState.PENDING: {RunState.PLACING} | _ENDS,
    RunState.PLACING: {RunState.RUNNING, RunState.RECOVERING, RunState.PENDING} | _ENDS,
    RunState.RUNNING: {RunState.DRAINING, RunState.RECOVERING, RunState.RESIZING} | _ENDS,
    RunState.DRAINING: {RunState.RECOVERING, RunState.RESIZING} | _ENDS,
    RunState.RECOVERING: {RunState.PENDING, RunState.PLACING} | _ENDS,
    RunState.RESIZING: {RunState.PENDING, RunState.PLACING, RunState.RECOVERING} | _ENDS,
    RunState.FINISHED: {RunState.PENDING},
    RunState.FAILED: {RunState.PENDING},
    RunState.CANCELLED: {RunState.PENDING},
}


def check_transition(old: RunState, new: RunState) -> None:
    """Assert that a run may go from `old` to `new`; a terminal state is left only by a new controller (pending)."""
    assert new in _NEXT[old], f"a run cannot go from {old} to {new}"
