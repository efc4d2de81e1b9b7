"""A run that leaves its layout to the planner: it trains what it told, as the run with that written out does."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import RunProcess, running, step_records, write_run
from trainer.manifest import TrainState, read_manifest

STEPS = 6
AUTO = "  parallel: {pp: auto}\n  zero: {stage: auto}\n  recompute: auto\n  micro_batch: auto\n"
REST = f"  steps: {STEPS}\n  eval: {{every: 1000, max_batches: 2}}\n  checkpoint: {{every: 2}}\n"


def finished(run: RunProcess) -> dict[int, dict[str, Any]]:
    """The steps of a run that ends well."""
    assert run.wait() == 0, run.output[-4000:]
    return step_records(run.folder)


def layout_of(state: TrainState) -> dict[str, Any]:
    """What the configuration beside a checkpoint says of the layout."""
    train: Any = state.config["train"]
    return {
        "train.parallel.pp": train["parallel"]["pp"],
        "train.zero.stage": train["zero"]["stage"],
        "train.recompute": train["recompute"],
        "train.micro_batch": train["micro_batch"],
    }


@pytest.mark.timeout(300)
def test_a_planned_run_is_the_run_with_its_layout_written_out_and_goes_on_in_another(tmp_path: Path) -> None:
    for name in ("planned", "written"):
        (tmp_path / name).mkdir()
    planned = write_run(tmp_path / "planned", train=AUTO + REST)
    with running("train", planned) as run:
        found = finished(run)
        assert run.folder.saved_config()["train"]["parallel"]["pp"] == "auto", "the file's own values"
        state = read_manifest(run.folder.checkpoints_uri, STEPS).state
        layout = layout_of(state)
        assert "auto" not in layout.values()
        told = " ".join(f"{key}={value}" for key, value in layout.items() if key != "train.micro_batch")
        assert f"planned: {told}, micro-batches of {layout['train.micro_batch']} rows" in run.output
        assert (state.pp, state.zero_stage) == (layout["train.parallel.pp"], layout["train.zero.stage"])
        assert state.zero_stage != 1, "what nobody plans is no choice"

    written = write_run(tmp_path / "written", train=REST)
    with running("train", written, *(f"{key}={value}" for key, value in layout.items())) as run:
        same = finished(run)
    assert sorted(same) == list(range(1, STEPS + 1))
    for step, record in same.items():
        for key in ("loss", "grad_norm", "sample_hash", "lr", "dp", "pp"):
            assert found[step][key] == record[key], (step, key)

    with running("train", planned, f"train.steps={STEPS + 2}", "train.parallel.pp=2") as run:
        longer = finished(run)
        state = read_manifest(run.folder.checkpoints_uri, STEPS + 2).state
    assert (state.pp, state.zero_stage) == (2, 1)
    assert {step: longer[step] for step in found} == found
