"""The same run on every mesh: losses, rows, gradient norms, tied copies."""

import pytest

from tests.helpers.rank_programs import train_and_compare_tied
from tests.helpers.ranks import specs_of
from tests.ranks.conftest import HALF, STEPS, Case, Lab

ONE = Case(1, 1)
MESHES = [
    Case(2, 1),
    Case(1, 2),
    Case(2, 2),
    Case(3, 1),
    Case(1, 1, zero=0),
    Case(2, 1, zero=0),
    Case(2, 1, zero=2),
    Case(3, 1, zero=2),
]


@pytest.mark.parametrize("case", MESHES, ids=str)
def test_a_mesh_trains_like_one_rank(lab: Lab, case: Case) -> None:
    one, other = lab.reference(ONE), lab.reference(case)
    assert sorted(other.steps) == list(range(1, STEPS + 1))
    assert sorted(other.evals) == [0, STEPS]
    for step, expected in one.evals.items():
        assert other.evals[step].loss == pytest.approx(expected.loss, rel=2e-3)
        assert other.evals[step].tokens == expected.tokens
    for step, expected in one.steps.items():
        found = other.steps[step]
        assert found.loss == pytest.approx(expected.loss, rel=2e-3), step
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=5e-3), step
        assert (found.sample_hash, found.tokens, found.lr) == (expected.sample_hash, expected.tokens, expected.lr)


def test_the_run_learns_and_clips(lab: Lab) -> None:
    one = lab.reference(ONE)
    assert one.evals[STEPS].loss < 0.85 * one.evals[0].loss
    assert any(report.grad_norm > 0.5 for report in one.steps.values()), "clipping was not exercised"
    assert len({report.sample_hash for report in one.steps.values()}) == STEPS


@pytest.mark.parametrize("case", [Case(1, 1, tied=False), Case(2, 2, tied=False)], ids=str)
def test_an_untied_head_is_trained(lab: Lab, case: Case) -> None:
    reference, found = lab.reference(Case(1, 1, tied=False)), lab.reference(case)
    for step, expected in reference.steps.items():
        assert found.steps[step].loss == pytest.approx(expected.loss, rel=2e-3), step
        assert found.steps[step].grad_norm == pytest.approx(expected.grad_norm, rel=5e-3), step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tied_copies_stay_equal_bit_for_bit(lab: Lab, precision: str) -> None:
    case = Case(2, 2, precision=precision)
    spec = lab.spec(case, lab.folder / f"tied-{precision}", steps=HALF)
    outcome = lab.server.run(train_and_compare_tied, specs_of(spec))
    compared = [outcome.returned[rank] for rank in range(4)]
    assert all(one["equal"] for one in compared)
    assert all(one["elements"] == lab.vocab_size * 32 for one in compared)


@pytest.mark.parametrize("case", [Case(1, 1), Case(2, 1, zero=2), Case(2, 2)], ids=str)
def test_bf16_follows_fp32(lab: Lab, case: Case) -> None:
    exact = lab.reference(Case(1, 1))
    half = lab.reference(Case(case.dp, case.pp, case.zero, "bf16"))
    assert half.steps[1].loss == pytest.approx(exact.steps[1].loss, rel=5e-3)
    assert half.evals[STEPS].loss == pytest.approx(exact.evals[STEPS].loss, rel=3e-2)
    assert half.steps[1].sample_hash == exact.steps[1].sample_hash
