"""A loss spike: back to a checkpoint before it, and on without the batches around it."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.run_data import train_plan
from data_service.audit import SampleAudit
from data_service.manifest import read_manifest
from tests.helpers.runs import ROOT, RunProcess, read_json_lines, running, step_records, write_run

TRAIN = """
  parallel: {dp: 2, pp: 1}
  steps: 30
  eval: {every: 100000, max_batches: 2}
  checkpoint: {every: 10, keep_last: 9}
"""
SKIP = "data.skip=[{first: 14, end: 19}]"


@pytest.mark.timeout(240)
def test_a_run_goes_back_and_leaves_batches_out(tmp_path: Path) -> None:
    file = write_run(tmp_path, train=TRAIN)
    with running("train", file) as run:
        assert run.wait() == 0, run.output[-4000:]
        before = step_records(run.folder)
    assert len(before) == 30

    refused = RunProcess("train", file, [SKIP])
    try:
        assert refused.wait(60) == 2, refused.output
        assert "`stormjib checkpoint drop FILE --after 10`" in refused.output
    finally:
        refused.end()
    command = [sys.executable, "-m", "cluster", "checkpoint", "drop", str(file), "--after", "10"]
    dropped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert dropped.returncode == 0, dropped.stderr
    assert "goes on from step 10" in dropped.stdout

    with running("train", file, SKIP) as run:
        assert run.wait() == 0, run.output[-4000:]
        after = step_records(run.folder)
        folder = Path(run.folder.root)
    assert [after[step]["batch"] for step in sorted(after)] == [*range(14), *range(19, 35)]
    config = load_config(file, [SKIP])
    manifest = read_manifest(config.dataset_uri)
    audit = SampleAudit(config.dataset_uri, train_plan(config, manifest), manifest, cache_bytes=1 << 20)
    try:
        assert {step: record["sample_hash"] for step, record in after.items()} == {
            step: audit.expected(step - 1) for step in range(1, 31)
        }
    finally:
        audit.close()
    assert all(after[step] == before[step] for step in range(1, 11))
    assert after[11]["loss"] == pytest.approx(before[11]["loss"], abs=1e-5)
    discarded = [line["step"] for line in read_json_lines(folder / "metrics.discarded.jsonl") if "loss" in line]
    assert discarded == list(range(11, 31))
    kept = sorted(path.name.partition(".")[0] for path in (folder / "checkpoints" / "superseded").iterdir())
    assert kept == ["step_00000020", "step_00000030"]
