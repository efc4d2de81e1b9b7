"""Saves beside training, in real ranks: what waits for them, and what a kill in the middle of one leaves."""

from dataclasses import replace

import pytest

from tests.helpers.rank_programs import (
    rank_1_is_killed_in_a_save,
    train_with_a_stuck_store_of_rank_1,
    train_with_slow_writes,
)
from tests.helpers.ranks import RanksFailedError, specs_of
from tests.ranks.conftest import STEPS, Case, Lab, commit_all
from trainer import manifest
from trainer.protocol import FinishedReport, PartReport, StepReport, WorkerSpec

CASE = Case(2, 1)


def _saving_every(lab: Lab, every: int, name: str, asynchronous: bool = True, steps: int = STEPS) -> WorkerSpec:
    spec = lab.spec(CASE, lab.folder / name, steps=steps)
    checkpoint = spec.train.checkpoint.model_copy(update={"every": every, "asynchronous": asynchronous})
    return replace(spec, train=spec.train.model_copy(update={"checkpoint": checkpoint}))


def test_training_goes_on_beside_a_save_and_the_end_waits_for_it(lab: Lab) -> None:
    spec = _saving_every(lab, 4, "slow-writes", steps=10)
    outcome = lab.server.run(train_with_slow_writes, specs_of(spec))
    for reports in outcome.reports.values():
        assert isinstance(reports[-1], FinishedReport)
        assert [report.step for report in reports if isinstance(report, PartReport)] == [4, 8, 10]
    told = outcome.reports[0]
    first = next(at for at, report in enumerate(told) if isinstance(report, PartReport))
    before = [report.step for report in told[:first] if isinstance(report, StepReport)]
    assert max(before) > 4, "nothing was trained while the part was written"
    quick, *_, slow = (report for report in told if isinstance(report, PartReport))
    assert quick.write_s < 0.2 < 0.4 <= quick.total_s
    assert slow.write_s < slow.total_s
    assert [one.step for one in commit_all(spec, outcome)] == [4, 8, 10]


def test_a_stop_waits_for_the_save_in_flight(lab: Lab) -> None:
    spec = _saving_every(lab, 4, "slow-stop")
    outcome = lab.server.run(train_with_slow_writes, specs_of(spec), stop_after={1: 5})
    assert {(report.step, report.reason) for report in outcome.finished} == {(5, "stop")}
    assert [one.step for one in commit_all(spec, outcome)] == [4, 5]
    rest = lab.run(replace(spec, resume_step=5))
    whole = lab.reference(CASE)
    assert [report.loss for report in rest.steps.values()] == [whole.steps[step].loss for step in range(6, STEPS + 1)]


def test_a_rank_killed_in_a_save_leaves_the_step_before(lab: Lab) -> None:
    spec = _saving_every(lab, 2, "killed")
    lab.run(spec, stop_after={0: 2})
    with pytest.raises(RanksFailedError, match="lost another rank|exit code -9"):
        lab.server.run(rank_1_is_killed_in_a_save, specs_of(replace(spec, attempt=2, resume_step=2)))
    parts = (lab.folder / "killed" / "step_00000004" / "attempt_2").iterdir()
    assert "rank_00001.safetensors" not in {part.name for part in parts}, "it was killed in the middle of its save"
    found, skipped = manifest.newest_complete(spec.checkpoints_uri)
    assert found is not None
    assert (found.step, [one.step for one in skipped]) == (2, [4])
    rest = lab.run(replace(spec, attempt=3, resume_step=2))
    whole = lab.reference(CASE)
    assert [report.loss for report in rest.steps.values()] == [whole.steps[step].loss for step in range(3, STEPS + 1)]


def test_saves_in_a_thread_and_without_write_the_same_bytes(lab: Lab) -> None:
    plain = _saving_every(lab, 10, "same-bytes", asynchronous=False)
    lab.run(plain)
    lab.reference(CASE)
    for step in (10, 20):
        for rank in range(2):
            file = f"{manifest.step_folder(step)}/attempt_1/rank_{rank:05d}.safetensors"
            assert (lab.folder / "same-bytes" / file).read_bytes() == (lab.checkpoints(CASE) / file).read_bytes()


def test_a_rank_that_waits_for_its_store_says_so_before_the_others_give_up(lab: Lab) -> None:
    spec = _saving_every(lab, 2, "stuck-store")
    spec = replace(spec, train=spec.train.model_copy(update={"collective_timeout_s": 6.0}))
    with pytest.raises(RanksFailedError) as caught:
        lab.server.run(train_with_a_stuck_store_of_rank_1, specs_of(spec))
    assert "SaveFailedError: Rank 1 waited 4 s for its part of step 2" in caught.value.failures[1]
    assert next(iter(caught.value.failures)) == 1, "another rank gave up first"
