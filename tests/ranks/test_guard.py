"""Bad steps through real engines: no update is made, every rank agrees, and a resumed run decides the same."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.checkpoints import read_state, same_bytes
from tests.helpers.rank_programs import (
    train_on_poisoned_losses,
    train_on_poisoned_losses_with_slow_writes_of_rank_1,
)
from tests.helpers.ranks import RanksFailedError, specs_of
from tests.ranks.conftest import STEPS, Case, Lab, copy_step
from trainer.manifest import read_manifest, step_folder
from trainer.parts import part_file

POISON = {6: float("nan"), 12: 50.0, 13: 50.0}
"""Step to what its loss is multiplied by."""
GUARD = {"action": "skip", "spike_factor": 5.0, "window": 4}


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 1, zero=3),
        Case(2, 2),
        Case(2, 1, zero=0),
        pytest.param(Case(2, 2, precision="bf16"), marks=pytest.mark.long),
        pytest.param(Case(3, 1), marks=pytest.mark.long),
        pytest.param(Case(1, 1), marks=pytest.mark.long),
        pytest.param(Case(2, 1, zero=2, precision="bf16"), marks=pytest.mark.long),
        pytest.param(Case(2, 1, zero=3, precision="bf16"), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_bad_steps_change_nothing_and_are_the_same_after_a_resume(lab: Lab, tmp_path: Path, case: Case) -> None:
    program = partial(train_on_poisoned_losses, poison=json.dumps(POISON))
    checkpoint = {"every": 1, "keep_last": STEPS}
    spec = lab.changed(case, tmp_path / "whole", guard=GUARD, checkpoint=checkpoint)
    whole = lab.run(spec, program=program)
    assert [step for step, report in sorted(whole.steps.items()) if report.skipped] == sorted(POISON)
    assert whole.steps[6].loss is None
    assert whole.steps[7].loss is not None
    states = {step: read_state(tmp_path / "whole", step) for step in (5, 6, 7, 11, 13, STEPS)}
    assert same_bytes(states[5], states[6])
    assert same_bytes(states[11], states[13])
    assert not same_bytes(states[6], states[7])
    assert read_manifest(spec.checkpoints_uri, STEPS).state.optimizer_steps == STEPS - len(POISON)
    copy_step(tmp_path / "whole", tmp_path / "resumed", 12)
    resumed = lab.run(replace(spec, checkpoints_uri=str(tmp_path / "resumed"), resume_step=12), program=program)
    assert [step for step, report in sorted(resumed.steps.items()) if report.skipped] == [13]
    assert same_bytes(states[STEPS], read_state(tmp_path / "resumed", STEPS))


def test_a_leap_stops_every_rank_and_names_its_batch(lab: Lab, tmp_path: Path) -> None:
    spec = lab.changed(Case(2, 2), tmp_path, guard={**GUARD, "action": "stop"})
    program = partial(train_on_poisoned_losses, poison=json.dumps({9: 50.0}))
    with pytest.raises(RanksFailedError) as caught:
        lab.server.run(program, specs_of(spec))
    assert len(caught.value.failures) == 4
    for story in caught.value.failures.values():
        assert "LossSpikeError: Step 9 (global batch 8)" in story
        assert "data.skip=[{first: 8, end: 9}]" in story


@pytest.mark.parametrize("case", [Case(2, 1), Case(1, 2)], ids=str)
def test_no_rank_leaves_with_an_error_before_all_have_saved(lab: Lab, tmp_path: Path, case: Case) -> None:
    """The first rank that leaves has the others killed: the save before the bad step would be lost."""
    spec = lab.changed(case, tmp_path, checkpoint={"every": 4})
    program = partial(train_on_poisoned_losses_with_slow_writes_of_rank_1, poison=json.dumps({5: float("nan")}))
    with pytest.raises(RanksFailedError) as caught:
        lab.server.run(program, specs_of(spec))
    assert all("NonFiniteLossError: Step 5" in story for story in caught.value.failures.values())
    for rank in range(2):
        assert (tmp_path / step_folder(4) / part_file(1, rank)).exists()
