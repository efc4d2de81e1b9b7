"""Decisions of the controller: what to do after a loss, and which checkpoint to promote. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Failure",
    "FailureBudget",
    "RankExit",
    "RecoveryDecision",
    "choose_promotion",
    "classify_failure",
    "decide_recovery",
]

FailureCause = Literal["node", "infrastructure", "program"]

_ECHOES = ("WorkerLostError", "CollectiveTimeoutError")
"""What a rank says that waited for another one."""

MAX_FUTILE_RECOVERIES = 5
"""Recoveries in a row after which not one new step was reached: the run fails instead of going round for ever."""


@dataclass(frozen=True)
class RankExit:
    """How a rank process ended, as its agent saw it."""

    rank: int
    node_id: str
    code: int
    """Exit status; negative: the signal that ended it."""
    error: str
    """The last words: a message for people, or the end of the log."""
    error_type: str | None
    """The name of the exception class, where the rank could say it."""
    retryable: bool


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended early."""

    cause: FailureCause
    reason: str
    lost_nodes: frozenset[str]
    damaged_checkpoint: bool = False
    """Whether a rank found that the checkpoint it loaded is damaged; another one has to be chosen."""


@dataclass(frozen=True)
class FailureBudget:
    """What has been spent: program faults ever, and recoveries since the last new step."""

    program: int = 0
    futile: int = 0


@dataclass(frozen=True)
class RecoveryDecision:
    """Go on, or end the run."""

    action: Literal["recover", "fail"]
    reason: str
    budget: FailureBudget


def classify_failure(exits: Sequence[RankExit], lost_nodes: frozenset[str]) -> Failure:
    """Name the cause behind the exits of an attempt.

    A lost node explains everything else; a damaged checkpoint is left out by the next attempt. A rank killed by a
    signal, or whose error says `retryable`, is the machines' fault. What remains is the program's. The first error that
    is not a mere echo of a lost peer is named.
    """
    if lost_nodes:
        names = ", ".join(sorted(node[:8] for node in lost_nodes))
        return Failure("node", f"node {names} was lost", lost_nodes)
    damaged = [item for item in exits if item.error_type == "CheckpointCorruptError"]
    if damaged:
        reason = f"rank {damaged[0].rank} could not load its checkpoint: {damaged[0].error}"
        return Failure("infrastructure", reason, lost_nodes, damaged_checkpoint=True)
    killed = [item for item in exits if item.code < 0]
    if killed:
        first = killed[0]
        return Failure("infrastructure", f"rank {first.rank} was killed by signal {-first.code}", lost_nodes)
    own = [item for item in exits if not item.retryable]
    if own:
        first = own[0]
        return Failure("program", f"rank {first.rank} failed: {first.error}", lost_nodes)
    if exits:
        causes = [item for item in exits if item.error_type is not None and item.error_type not in _ECHOES]
        if causes:
            return Failure("infrastructure", f"rank {causes[0].rank} failed: {causes[0].error}", lost_nodes)
        first = exits[0]
        return Failure("infrastructure", f"rank {first.rank} lost its peers: {first.error}", lost_nodes)
    return Failure("infrastructure", "the ranks stopped answering", lost_nodes)


def decide_recovery(
    failure: Failure, budget: FailureBudget, *, progressed: bool, elastic: bool, max_program_failures: int
) -> RecoveryDecision:
    """Charge a failure to its budget and say whether the run goes on.

    Args:
        failure: why the attempt ended.
        budget: what has been spent so far.
        progressed: whether the attempt reached a step that no attempt before it had.
        elastic: `cluster.elastic`.
        max_program_failures: `cluster.max_program_failures`.
    """
    spent = FailureBudget(
        program=budget.program + (failure.cause == "program"), futile=0 if progressed else budget.futile + 1
    )
    if failure.cause == "program" and spent.program > max_program_failures:
        return RecoveryDecision("fail", failure.reason, spent)
    if failure.cause == "node" and not elastic:
        return RecoveryDecision("fail", f"{failure.reason}, and cluster.elastic is false", spent)
    if spent.futile > MAX_FUTILE_RECOVERIES:
        return RecoveryDecision("fail", f"{spent.futile} recoveries brought no new step; last: {failure.reason}", spent)
    return RecoveryDecision("recover", failure.reason, spent)


def choose_promotion(
    complete: Sequence[int], scores: Mapping[int, float], promote: Literal["best", "last"]
) -> int | None:
    """The checkpoint to export and serve; None when there is none. Without evaluations `best` is the newest.

    Args:
        complete: committed steps.
        scores: of those that were evaluated; lower is better.
        promote: which one.
    """
    if not complete:
        return None
    judged = [step for step in complete if step in scores]
    if promote == "best" and judged:
        return min(judged, key=lambda step: (scores[step], -step))
    return max(complete)
