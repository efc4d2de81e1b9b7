"""Half precision with a scaled loss. On CPUs, where the product refuses it, because no test machine need have a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.checkpoints import read_state, same_bytes
from tests.helpers.rank_programs import train_in_fp16_on_cpu
from tests.ranks.conftest import HALF, STEPS, Case, Lab, copy_step
from trainer.manifest import read_manifest


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 1, zero=3),
        pytest.param(Case(2, 1), marks=pytest.mark.long),
        pytest.param(Case(1, 1), marks=pytest.mark.long),
        pytest.param(Case(2, 1, zero=2), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_fp16_follows_fp32_and_goes_on_where_it_was(lab: Lab, tmp_path: Path, case: Case) -> None:
    spec = lab.changed(case, tmp_path / "whole", precision="fp16")
    whole = lab.run(spec, program=train_in_fp16_on_cpu)
    exact = lab.reference(Case(1, 1))
    skipped = [step for step, report in sorted(whole.steps.items()) if report.skipped]
    state = read_manifest(spec.checkpoints_uri, HALF).state
    assert state.optimizer_steps == HALF - sum(step <= HALF for step in skipped)
    assert state.loss_scale is not None
    assert state.loss_scale.scale == whole.returned[0][HALF - 1]
    assert skipped, "no gradient overflowed"
    assert all(whole.steps[step].loss is not None for step in skipped), "an overflow is no bad loss"
    for step in range(1, skipped[0] + 1):
        assert whole.steps[step].loss == pytest.approx(exact.steps[step].loss, rel=5e-3), step
    assert whole.evals[STEPS].loss < 0.9 * whole.evals[0].loss
    copy_step(tmp_path / "whole", tmp_path / "resumed", HALF)
    again = replace(spec, checkpoints_uri=str(tmp_path / "resumed"), resume_step=HALF)
    resumed = lab.run(again, program=train_in_fp16_on_cpu)
    assert resumed.returned[0] == whole.returned[0][HALF:]
    assert same_bytes(read_state(tmp_path / "whole", STEPS), read_state(tmp_path / "resumed", STEPS))
