"""Checkpoints that were cut short or damaged: left out by name, never loaded, never exported, never removed."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers.runs import ROOT, RunProcess, running, step_records, write_run

TRAIN = """
  parallel: {dp: 2, pp: 1}
  steps: 12
  eval: {every: 1000, max_batches: 2}
  checkpoint: {every: 4, keep_last: 5, keep_best: 0}
"""


def stormjib(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=150,
    )


def parts(run: RunProcess, step: int) -> list[Path]:
    return sorted(Path(run.folder.checkpoints_uri, f"step_{step:08d}").rglob("*.safetensors"))


@pytest.mark.timeout(300)
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole_and_with_none_not_at_all(tmp_path: Path) -> None:
    file = write_run(tmp_path, train=TRAIN)
    with running("train", file) as run:
        assert run.wait() == 0, run.output[-4000:]
        before = step_records(run.folder)
    Path(run.folder.checkpoints_uri, "step_00000012", "manifest.json").unlink()
    damaged = parts(run, 8)[0]
    content = bytearray(damaged.read_bytes())
    for place in range(len(content) // 4, len(content), 997):
        content[place] ^= 1
    damaged.write_bytes(content)

    refused = stormjib("export", str(file), "--step", "12", "--out", str(tmp_path / "out"))
    assert refused.returncode == 2
    assert "no checkpoint of step 12; committed: 4, 8" in refused.stderr
    spoiled = stormjib("export", str(file), "--step", "8", "--out", str(tmp_path / "out"))
    assert spoiled.returncode != 0
    assert damaged.name in spoiled.stderr
    assert "Traceback" not in spoiled.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()

    with running("train", file, "train.steps=16") as run:
        assert run.wait() == 0, run.output[-4000:]
        skipped = {event["step"]: event["reason"] for event in run.events("checkpoint_skipped")}
        after = step_records(run.folder)
    assert set(skipped) == {8, 12}
    assert "manifest.json" in skipped[12]
    assert damaged.name in skipped[8]
    assert run.events("attempt_started")[-1]["resume_step"] == 4
    assert len(after) == 16
    for step, record in before.items():
        assert after[step]["loss"] == record["loss"]
        assert after[step]["sample_hash"] == record["sample_hash"]
    check_that_it_does_not_start_over(file, run)


def check_that_it_does_not_start_over(file: Path, run: RunProcess) -> None:
    """With every checkpoint damaged a run is refused, and nothing is written."""
    for step in (4, 8, 12, 16):
        for part in parts(run, step):
            part.write_bytes(part.read_bytes()[:-8])
    kept = {path: path.read_bytes() for path in Path(run.folder.checkpoints_uri).rglob("*") if path.is_file()}
    metrics = Path(run.folder.metrics_uri).read_bytes()
    ended = stormjib("train", str(file), "train.steps=20")
    assert ended.returncode == 2, ended.stderr
    assert "steps 4, 8, 12, 16 were committed, and none can be loaded" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert {path: path.read_bytes() for path in kept} == kept
    assert Path(run.folder.metrics_uri).read_bytes() == metrics


@pytest.mark.long
@pytest.mark.timeout(300)
def test_damage_between_a_commit_and_a_loss_is_met_by_the_ranks(tmp_path: Path) -> None:
    """What this process committed is not read whole again; the ranks find the damage, and the run goes on below it."""
    every = ("train.checkpoint.every=60", "train.steps=170")
    with running("train", write_run(tmp_path, train=TRAIN), *every) as run:
        run.until(lambda: len(run.events("checkpoint_committed")) >= 2, "second checkpoint")
        part = parts(run, 120)[0]
        content = bytearray(part.read_bytes())
        content[-5] ^= 1
        part.write_bytes(content)
        below = psutil.Process(run.process.pid).children(recursive=True)
        next(one for one in below if one.name() == "rank-1").kill()
        assert run.wait() == 0, run.output[-4000:]
        starts = [event["resume_step"] for event in run.events("attempt_started")]
        skipped = {event["step"]: event["reason"] for event in run.events("checkpoint_skipped")}
        lost = [event["error"] for event in run.events("rank_lost")]
        records = step_records(run.folder)
    assert starts == [None, 120, 60]
    assert part.name in skipped[120]
    assert "CheckpointCorruptError" in lost
    assert len(records) == 170
    assert stormjib("checkpoint", "verify", str(tmp_path / "run.yaml")).returncode == 0, "step 120 was written again"
