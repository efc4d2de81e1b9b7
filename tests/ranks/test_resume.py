"""Checkpoints through real engines: resumed runs, other meshes, and what a rank writes."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.checkpoints import read_state, same_bytes, without_moments
from tests.helpers.rank_programs import load_and_save
from tests.helpers.ranks import specs_of
from tests.ranks.conftest import HALF, STEPS, Case, Lab, commit_all
from trainer import manifest
from trainer.fragments import KINDS
from trainer.model import TransformerConfig, layers, parameter_shapes
from trainer.protocol import PartReport
from trainer.stages import stage_bounds

SOURCE = Case(2, 2)
SAME_MESH = [
    Case(2, 1),
    Case(2, 1, zero=2),
    Case(2, 2),
    Case(2, 1, zero=0),
    Case(2, 2, precision="bf16"),
    Case(2, 1, zero=3),
]
MORE_SAME_MESH = [
    Case(1, 1),
    Case(1, 2),
    Case(1, 3),
    Case(3, 1),
    Case(3, 1, zero=0),
    Case(3, 1, zero=2),
    Case(3, 2),
    Case(2, 1, zero=2, precision="bf16"),
    Case(2, 2, tied=False),
    Case(3, 1, zero=3),
    Case(2, 1, zero=3, precision="bf16"),
    Case(2, 1, zero=3, tied=False),
]
OTHER_MESHES = [Case(1, 1), Case(3, 1, zero=2), Case(1, 2), Case(2, 1, zero=0), Case(2, 1, zero=3)]


@pytest.mark.parametrize(
    "case", [*SAME_MESH, *(pytest.param(case, marks=pytest.mark.long) for case in MORE_SAME_MESH)], ids=str
)
def test_a_resumed_run_equals_one_never_stopped(lab: Lab, case: Case) -> None:
    whole = lab.reference(case)
    resumed, folder = lab.resume(case, case, f"resumed-{case}")
    assert sorted(resumed.steps) == list(range(HALF + 1, STEPS + 1))
    for step, found in resumed.steps.items():
        expected = whole.steps[step]
        assert (found.loss, found.grad_norm, found.lr) == (expected.loss, expected.grad_norm, expected.lr), step
        assert found.sample_hash == expected.sample_hash
    assert resumed.evals[STEPS].loss == whole.evals[STEPS].loss
    assert sorted(resumed.evals) == [STEPS], "only a fresh run evaluates before its first step"
    assert same_bytes(read_state(folder, STEPS), read_state(lab.checkpoints(case), STEPS))


@pytest.mark.parametrize("case", OTHER_MESHES, ids=str)
def test_a_run_goes_on_on_another_mesh(lab: Lab, case: Case) -> None:
    whole = lab.reference(SOURCE)
    resumed, _ = lab.resume(case, SOURCE, f"moved-to-{case}")
    for step, found in resumed.steps.items():
        assert found.loss == pytest.approx(whole.steps[step].loss, rel=2e-3), step
        assert found.sample_hash == whole.steps[step].sample_hash


def test_moments_matter(lab: Lab) -> None:
    """The comparison above would notice moments that were not loaded."""
    whole = lab.reference(SOURCE)
    folder = lab.folder / "no-moments"
    without_moments(lab.checkpoints(SOURCE), folder, HALF)
    resumed = lab.run(lab.spec(Case(1, 1), folder, resume_step=HALF))
    worst = max(abs(found.loss / whole.steps[step].loss - 1) for step, found in resumed.steps.items())
    assert worst > 2e-3


@pytest.mark.parametrize("via", [Case(1, 1), Case(3, 1, zero=2), Case(3, 1, zero=3)], ids=str)
def test_there_and_back_gives_the_same_bytes(lab: Lab, via: Case) -> None:
    lab.reference(SOURCE)
    there, back = lab.folder / f"there-{via}", lab.folder / f"back-{via}"
    _load_and_save(lab, via, lab.checkpoints(SOURCE), there)
    _load_and_save(lab, SOURCE, there, back)
    first, last = read_state(lab.checkpoints(SOURCE), HALF), read_state(back, HALF)
    assert same_bytes(first, read_state(there, HALF))
    assert same_bytes(first, last)
    for name in ("rank_00000", "rank_00001", "rank_00002", "rank_00003"):
        file = Path(manifest.step_folder(HALF)) / "attempt_1" / f"{name}.safetensors"
        assert (back / file).read_bytes() == (lab.checkpoints(SOURCE) / file).read_bytes()


@pytest.mark.parametrize(
    "case",
    [Case(2, 1), Case(2, 1, zero=0), Case(2, 1, zero=2), Case(3, 1, zero=2), Case(2, 2), Case(3, 1, zero=3)],
    ids=str,
)
def test_no_rank_writes_much_more_than_its_share(lab: Lab, case: Case) -> None:
    """Each stage writes its own parameters once, the tied matrix the first; no rank more than its partition of them.

    ZeRO cuts the last stage with its tied copy, which is not written: its ranks' parts are uneven within that bound.
    """
    parts = lab.reference(case).parts[HALF]
    config = _config(lab, case)
    shapes = parameter_shapes(config)
    bounds = stage_bounds(config, case.pp)
    for stage in range(case.pp):
        prefixes = [
            f"blocks.{layer.index}." if layer.kind == "block" else f"{layer.kind}."
            for layer in layers(config)[bounds[stage] : bounds[stage + 1]]
        ]
        tied = ["embedding."] if config.tie_embeddings and "head." in prefixes else []
        names = [name for name in shapes if name.startswith((*prefixes, *tied))]
        owned = sum(_numel(shapes[name]) for name in names if stage == 0 or name != "embedding.weight")
        written = [_written(part) for part in parts if part.rank % case.pp == stage]
        assert sum(written) == len(KINDS) * owned
        held = sum(_numel(shapes[name]) for name in names)
        assert max(written) <= 1.2 * len(KINDS) * held / case.dp
    assert sum(_written(part) for part in parts) == len(KINDS) * sum(_numel(shape) for shape in shapes.values())


TOUR = [
    Case(3, 1, zero=3),
    Case(2, 2),
    Case(2, 1, zero=0),
    Case(2, 1, zero=3),
    Case(3, 1, zero=2),
    Case(1, 2),
    Case(1, 1, zero=3),
    Case(3, 1, zero=0),
    Case(2, 1),
]
"""A covering part of all pairs (those are in `tests/unit/test_trainer_layouts.py`, and below as a long test): every
ZeRO stage as source and as target, with and without a pipeline."""


def test_a_checkpoint_comes_home_unchanged_from_a_tour_of_layouts(lab: Lab) -> None:
    """Real engines load and write again what the one before wrote: masters and both moments, byte for byte."""
    lab.reference(TOUR[0])
    at, first = lab.checkpoints(TOUR[0]), read_state(lab.checkpoints(TOUR[0]), HALF)
    assert {kind for _, kind in first} == set(KINDS)
    assert all(values.any() for values in first.values()), "moments that are zero would prove nothing"
    for number, case in enumerate([*TOUR[1:], TOUR[0]]):
        there = lab.folder / f"tour-{number}"
        _load_and_save(lab, case, at, there)
        assert same_bytes(first, read_state(there, HALF)), (number, case)
        at = there


GRID = [
    *(Case(dp, 1, zero=zero) for zero in (0, 1, 2, 3) for dp in (1, 2, 3)),
    *(Case(dp, pp) for dp in (1, 2) for pp in (2, 4)),
]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", GRID, ids=str)
def test_every_engine_loads_what_every_other_wrote(lab: Lab, source: Case) -> None:
    lab.reference(source)
    first = read_state(lab.checkpoints(source), HALF)
    for target in GRID:
        there = lab.folder / f"pair-{source}-{target}"
        _load_and_save(lab, target, lab.checkpoints(source), there)
        assert same_bytes(first, read_state(there, HALF)), target


def test_a_stop_is_agreed(lab: Lab) -> None:
    """One rank hears of it; all write a checkpoint at the same step and leave."""
    case = Case(2, 2)
    spec = lab.spec(case, lab.folder / "stopped")
    outcome = lab.run(spec, stop_after={2: 7})
    assert {(report.step, report.reason) for report in outcome.finished} == {(7, "stop")}
    assert len(outcome.finished) == 4
    assert manifest.list_complete(spec.checkpoints_uri) == [7]
    rest = lab.run(replace(spec, resume_step=7))
    whole = lab.reference(case)
    assert [report.loss for report in rest.steps.values()] == [whole.steps[step].loss for step in range(8, STEPS + 1)]


def test_a_late_stop_means_the_next_boundary(lab: Lab) -> None:
    spec = lab.spec(Case(1, 1), lab.folder / "stopped-late")
    outcome = lab.run(spec, stop_after={0: 0})
    assert [(report.step, report.reason) for report in outcome.finished] == [(1, "stop")]


def _config(lab: Lab, case: Case) -> TransformerConfig:
    spec = lab.spec(case, lab.folder)
    return TransformerConfig.from_section(spec.model, spec.vocab_size, spec.seq_len)


def _written(part: PartReport) -> int:
    return sum(one.numel for one in part.receipt.ranges)


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def _load_and_save(lab: Lab, case: Case, source: Path, target: Path) -> None:
    spec = lab.spec(case, source, resume_step=HALF)
    outcome = lab.server.run(partial(load_and_save, target=str(target)), specs_of(spec))
    commit_all(replace(spec, checkpoints_uri=str(target)), outcome)
