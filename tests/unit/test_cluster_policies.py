from dataclasses import replace

from cluster.policies import (
    MAX_FUTILE_RECOVERIES,
    Failure,
    FailureBudget,
    RankExit,
    choose_promotion,
    classify_failure,
    decide_recovery,
)

NONE: frozenset[str] = frozenset()


def exit_of(rank: int, *, code: int = 1, retryable: bool = False, error: str = "boom") -> RankExit:
    return RankExit(rank=rank, node_id="n0", code=code, error=error, error_type=None, retryable=retryable)


def test_a_lost_node_explains_the_errors_of_its_peers() -> None:
    failure = classify_failure([exit_of(2), exit_of(3, retryable=True)], frozenset({"abcdef0123"}))
    assert failure.cause == "node"
    assert "abcdef01" in failure.reason


def test_a_killed_rank_is_the_machines_fault() -> None:
    failure = classify_failure([exit_of(0, retryable=True), exit_of(1, code=-9)], NONE)
    assert failure.cause == "infrastructure"
    assert "rank 1 was killed by signal 9" in failure.reason


def test_a_damaged_checkpoint_is_left_out_and_not_held_against_the_program() -> None:
    damaged = replace(exit_of(1, error="does not match its checksum"), error_type="CheckpointCorruptError")
    failure = classify_failure([exit_of(0, code=-9), damaged], NONE)
    assert (failure.cause, failure.damaged_checkpoint) == ("infrastructure", True)
    assert "rank 1 could not load its checkpoint: does not match" in failure.reason
    assert not classify_failure([exit_of(0, code=-9)], NONE).damaged_checkpoint


def test_the_first_own_error_is_named_and_echoes_are_not() -> None:
    failure = classify_failure([exit_of(0, retryable=True, error="peer gone"), exit_of(1, error="nan")], NONE)
    assert failure.cause == "program"
    assert failure.reason == "rank 1 failed: nan"


def test_echoes_alone_are_the_machines_fault() -> None:
    assert classify_failure([exit_of(0, retryable=True)], NONE).cause == "infrastructure"


def test_what_the_others_waited_for_is_named() -> None:
    echo = replace(exit_of(0, retryable=True, error="waited too long"), error_type="CollectiveTimeoutError")
    slow = replace(exit_of(2, retryable=True, error="the store at s3://b is slow"), error_type="SaveFailedError")
    failure = classify_failure([echo, slow], NONE)
    assert (failure.cause, failure.reason) == ("infrastructure", "rank 2 failed: the store at s3://b is slow")
    assert "rank 0 lost its peers" in classify_failure([echo], NONE).reason


def test_a_program_fault_is_not_retried_unless_asked_for() -> None:
    failure = Failure("program", "nan", NONE)
    refuse = decide_recovery(failure, FailureBudget(), progressed=True, elastic=True, max_program_failures=0)
    assert refuse.action == "fail"
    allow = decide_recovery(failure, FailureBudget(), progressed=True, elastic=True, max_program_failures=1)
    assert allow.action == "recover"
    again = decide_recovery(failure, allow.budget, progressed=True, elastic=True, max_program_failures=1)
    assert again.action == "fail"


def test_a_lost_node_ends_a_run_that_is_not_elastic() -> None:
    decision = decide_recovery(
        Failure("node", "node a was lost", frozenset("a")),
        FailureBudget(),
        progressed=True,
        elastic=False,
        max_program_failures=0,
    )
    assert decision.action == "fail"
    assert "cluster.elastic" in decision.reason


def test_recoveries_without_a_new_step_run_out_and_progress_restores_them() -> None:
    failure = Failure("infrastructure", "killed", NONE)
    budget = FailureBudget()
    for _ in range(MAX_FUTILE_RECOVERIES):
        decision = decide_recovery(failure, budget, progressed=False, elastic=True, max_program_failures=0)
        assert decision.action == "recover"
        budget = decision.budget
    assert decide_recovery(failure, budget, progressed=False, elastic=True, max_program_failures=0).action == "fail"
    fresh = decide_recovery(failure, budget, progressed=True, elastic=True, max_program_failures=0)
    assert fresh.action == "recover"
    assert fresh.budget.futile == 0


def test_promotion_takes_the_best_judged_or_the_newest() -> None:
    assert choose_promotion([], {}, "best") is None
    assert choose_promotion([10, 20, 30], {10: 2.0, 20: 1.0, 99: 0.0}, "best") == 20
    assert choose_promotion([10, 20, 30], {10: 1.0, 20: 1.0}, "best") == 20
    assert choose_promotion([10, 20, 30], {10: 1.0}, "last") == 30
    assert choose_promotion([10, 20], {}, "best") == 20
