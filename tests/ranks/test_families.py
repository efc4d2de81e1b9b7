"""Language models of every causal family on meshes, with blocks computed again: they train like one rank without."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks.conftest import Case, Lab
from trainer.config import ModelConfig
from trainer.protocol import WorkerSpec

STEPS = 6
ONE = Case(1, 1)
MESHES = {"gpt2": [Case(1, 2), Case(2, 1, zero=3)], "qwen2": [Case(1, 2, tied=False)], "qwen3": [Case(2, 2)]}


def _spec(lab: Lab, case: Case, family: str, recompute: str, checkpoints: Path) -> WorkerSpec:
    spec = lab.changed(case, checkpoints, steps=STEPS, recompute=recompute)
    kv_heads = None if family == "gpt2" else 2
    model = {"family": family, "d_model": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": kv_heads}
    return replace(spec, model=ModelConfig.model_validate({**model, "tie_embeddings": case.tied}))


@pytest.mark.parametrize("family", MESHES)
def test_a_family_trains_on_every_mesh_like_on_one_rank(lab: Lab, family: str, tmp_path: Path) -> None:
    for case in MESHES[family]:
        one = lab.run(_spec(lab, replace(ONE, tied=case.tied), family, "none", tmp_path / f"one-{case}"))
        other = lab.run(_spec(lab, case, family, "blocks", tmp_path / str(case)))
        for step in range(1, STEPS + 1):
            assert other.steps[step].loss == pytest.approx(one.steps[step].loss, rel=2e-3), (case, step)
            assert other.steps[step].grad_norm == pytest.approx(one.steps[step].grad_norm, rel=5e-3), (case, step)
        assert one.steps[STEPS].loss < one.steps[1].loss
