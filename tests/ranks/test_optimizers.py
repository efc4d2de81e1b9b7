"""Optimizers, parameter groups and offload: every mesh makes the updates of a plain loop."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.helpers.checkpoints import read_state, same_bytes
from tests.helpers.plain_loop import train_plainly
from tests.ranks.conftest import HALF, STEPS, Case, Lab, copy_step
from trainer.manifest import read_manifest

GROUPS = [
    {"match": "*norm*", "lr_scale": 2.0},
    {"match": "embedding.*", "lr_scale": 0.5, "weight_decay": 0.0},
    {"match": "blocks.0.attention.*", "weight_decay": 0.5},
]
"""The last two lie in the first stage alone."""


@dataclass(frozen=True)
class Optimizer:
    """A name for the test, and keys of `train.optimizer`."""

    name: str
    keys: dict[str, object] = field(hash=False)
    kinds: tuple[str, ...] = ("master", "exp_avg", "exp_avg_sq")

    def __str__(self) -> str:
        return self.name


SGD = Optimizer("sgd", {"name": "sgd", "lr": 0.5, "weight_decay": 0.01}, ("master", "momentum_buffer"))
PLAIN_SGD = Optimizer("plain-sgd", {"name": "sgd", "lr": 0.5, "momentum": 0.0}, ("master",))
NESTEROV = Optimizer("nesterov", {"name": "sgd", "lr": 0.2, "nesterov": True}, ("master", "momentum_buffer"))
ADAM = Optimizer("adam", {"name": "adam", "weight_decay": 0.01})
GROUPED = Optimizer("grouped", {"name": "adamw", "groups": GROUPS})


@pytest.mark.parametrize(
    ("optimizer", "case"),
    [
        (SGD, Case(2, 1, zero=3)),
        (SGD, Case(1, 2)),
        (ADAM, Case(2, 1)),
        (GROUPED, Case(2, 2)),
        pytest.param(NESTEROV, Case(2, 1, zero=2), marks=pytest.mark.long),
        pytest.param(PLAIN_SGD, Case(2, 1, zero=0), marks=pytest.mark.long),
        pytest.param(GROUPED, Case(2, 1, zero=3), marks=pytest.mark.long),
        pytest.param(PLAIN_SGD, Case(3, 1, zero=3), marks=pytest.mark.long),
        pytest.param(NESTEROV, Case(2, 2), marks=pytest.mark.long),
        pytest.param(ADAM, Case(1, 4), marks=pytest.mark.long),
        pytest.param(GROUPED, Case(3, 1, zero=0), marks=pytest.mark.long),
        pytest.param(GROUPED, Case(1, 4, tied=False), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_every_optimizer_goes_as_in_a_plain_loop(lab: Lab, tmp_path: Path, optimizer: Optimizer, case: Case) -> None:
    """And a resumed run goes on with the same bytes: nothing that the optimizer keeps is lost."""
    spec = lab.changed(case, tmp_path / "whole", optimizer=optimizer.keys)
    whole = lab.run(spec)
    for step, expected in train_plainly(spec, STEPS).items():
        assert whole.steps[step].loss == pytest.approx(expected.loss, rel=2e-3), step
        assert whole.steps[step].grad_norm == pytest.approx(expected.grad_norm, rel=5e-3), step
    assert read_manifest(spec.checkpoints_uri, HALF).state.kinds == optimizer.kinds
    copy_step(tmp_path / "whole", tmp_path / "resumed", HALF)
    lab.run(replace(spec, checkpoints_uri=str(tmp_path / "resumed"), resume_step=HALF))
    first, last = read_state(tmp_path / "whole", STEPS), read_state(tmp_path / "resumed", STEPS)
    assert {kind for _, kind in first} == set(optimizer.kinds)
    assert same_bytes(first, last)


def test_groups_matter(lab: Lab, tmp_path: Path) -> None:
    """The comparison above would notice groups that are not heeded."""
    grouped = train_plainly(lab.changed(Case(1, 1), tmp_path, optimizer=GROUPED.keys), STEPS)
    plain = train_plainly(lab.spec(Case(1, 1), tmp_path), STEPS)
    assert max(abs(grouped[step].loss / plain[step].loss - 1) for step in plain) > 4e-3


@pytest.mark.parametrize(
    ("case", "parameters", "name"),
    [
        (Case(2, 1), "none", "adamw"),
        pytest.param(Case(2, 1, zero=2), "none", "sgd", marks=pytest.mark.long),
        (Case(2, 1, zero=3), "cpu", "adamw"),
        pytest.param(Case(1, 1), "none", "adamw", marks=pytest.mark.long),
        pytest.param(Case(3, 1, zero=3), "none", "adam", marks=pytest.mark.long),
        pytest.param(Case(3, 1, zero=2), "none", "adamw", marks=pytest.mark.long),
        pytest.param(Case(2, 1, zero=3, precision="bf16"), "cpu", "adamw", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_offload_changes_nothing(lab: Lab, tmp_path: Path, case: Case, parameters: str, name: str) -> None:
    """On CPUs the host is the device; what is shown is that the offloaded path computes and stores the same."""
    zero = {"offload_optimizer": "cpu", "offload_parameters": parameters}
    keys = {"zero": zero, "optimizer": {"name": name}}
    offloaded = lab.run(lab.changed(case, tmp_path / "whole", **keys))
    plain = lab.run(lab.changed(case, tmp_path / "plain", optimizer={"name": name}))
    rounding = 1 if case.precision == "fp32" else 10
    for step, expected in plain.steps.items():
        assert offloaded.steps[step].loss == pytest.approx(expected.loss, rel=1e-4 * rounding), step
        assert offloaded.steps[step].grad_norm == pytest.approx(expected.grad_norm, rel=1e-3 * rounding), step
    copy_step(tmp_path / "whole", tmp_path / "resumed", HALF)
    lab.run(lab.changed(case, tmp_path / "resumed", HALF, **keys))
    assert same_bytes(read_state(tmp_path / "whole", STEPS), read_state(tmp_path / "resumed", STEPS))
