"""A run over two sources with weights, a change of them and skipped batches; killed, resumed with one change more.

Files that were added to a source meanwhile are for new runs.
"""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from cluster.config import RunConfig, load_config
from cluster.run_data import train_plan
from data_service.audit import SampleAudit
from data_service.manifest import DatasetManifest, read_manifest
from data_service.order import rows_of_batch
from data_service.plan import Plan, part_of_rows
from tests.helpers.runs import RunProcess, running, step_records, write_corpus

GLOBAL_BATCH = 6
STEPS = 120
FIRST_CHANGE, SKIPPED, SECOND_CHANGE = 8, (12, 15), 90
RUN = f"""
run: {{name: mixed, storage: ./runs, seed: 5}}
cluster: {{address: local, nodes: 1, node: {{slots: 2}}}}
data:
  sources: [{{path: big, weight: 3}}, {{path: small.csv, weight: 1}}]
  tokenizer: {{train: {{vocab_size: 400}}}}
  rows: packed
  isolate_documents: true
  seq_len: 64
  shard_tokens: 2048
  shuffle_window_shards: 2
  split: {{eval: 0.1}}
  mixture: {{changes: [{{first_batch: {FIRST_CHANGE}, weights: {{big: 1, small: 1}}}}]}}
  skip: [{{first: {SKIPPED[0]}, end: {SKIPPED[1]}}}]
model: {{d_model: 16, num_layers: 2, num_heads: 2}}
train:
  parallel: {{dp: 1, pp: 2}}
  global_batch: {GLOBAL_BATCH}
  steps: {STEPS}
  eval: {{every: 1000, max_batches: 2}}
  checkpoint: {{every: 5}}
  schedule: {{name: constant}}
serve: {{port: 0}}
"""


def change(first_batch: int) -> str:
    """The override that appends a pause of the small source."""
    return (
        f"data.mixture.changes=[{{first_batch: {FIRST_CHANGE}, weights: {{big: 1, small: 1}}}}, "
        f"{{first_batch: {first_batch}, weights: {{big: 1, small: 0}}}}]"
    )


@pytest.mark.timeout(240)
def test_a_mixed_run_is_killed_and_goes_on_with_a_change_more(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    write_corpus(tmp_path / "big" / "first.csv", documents=300, seed=1)
    write_corpus(tmp_path / "small.csv", documents=60, seed=2)
    file = tmp_path / "run.yaml"
    file.write_text(RUN, encoding="utf-8")
    with running("train", file) as run:
        run.until_event("checkpoint_committed", count=4)
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait(10)
        consumed = max(event["step"] for event in run.events("checkpoint_committed"))
        (first,) = run.events("dataset_ready")
    write_corpus(tmp_path / "big" / "second.csv", documents=50, seed=3)
    assert 20 <= consumed < SECOND_CHANGE - 3, "killed too late for this test"

    refused = RunProcess("train", file, [change(consumed)])
    try:
        assert refused.wait(60) == 2, refused.output
        free = consumed + SKIPPED[1] - SKIPPED[0]
        assert f"new ones may begin at global batch {free} or later" in refused.output
        assert len(refused.events("run_started")) == 1, "nothing was changed"
    finally:
        refused.end()

    with running("train", file, change(SECOND_CHANGE)) as run:
        assert run.wait() == 0, run.output[-4000:]
        records = step_records(run.folder)
        assert run.events("dataset_ready")[-1]["digest"] == first["digest"]
        assert "generation 1 is for new runs" in run.output
    assert len(records) == STEPS

    config = load_config(file, [change(SECOND_CHANGE)])
    manifest = read_manifest(config.dataset_uri, first["digest"])
    assert read_manifest(config.dataset_uri).num_documents() > manifest.num_documents(), "the new file was not prepared"
    check_hashes(config, manifest, {int(record["batch"]): str(record["sample_hash"]) for record in records.values()})
    batches = [int(records[step]["batch"]) for step in sorted(records)]
    assert batches == [batch for batch in range(STEPS + 3) if not SKIPPED[0] <= batch < SKIPPED[1]]
    check_mixture(train_plan(config, manifest))


def check_hashes(config: RunConfig, manifest: DatasetManifest, found: dict[int, str]) -> None:
    """Absolute batches hold what they hold without skips."""
    whole = config.model_copy(update={"data": config.data.model_copy(update={"skip": ()})})
    audit = SampleAudit(config.dataset_uri, train_plan(whole, manifest), manifest, cache_bytes=1 << 20)
    try:
        assert found == {batch: audit.expected(batch) for batch in found}
    finally:
        audit.close()


def check_mixture(plan: Plan) -> None:
    """Shares are exact in every stretch of equal weights, and no row comes again before its epoch is over."""
    names = [part.source for part in plan.parts]
    taken: Counter[int] = Counter()
    stretches = ((0, FIRST_CHANGE, 1 / 4), (FIRST_CHANGE, SECOND_CHANGE, 1 / 2), (SECOND_CHANGE, 2 * STEPS, 0))
    for first, end, small in stretches:
        steps = [step for step in range(STEPS) if first <= plan.batch_at(step) < end]
        rows = [int(row) for step in steps for row in rows_of_batch(plan, step)]
        drawn = Counter(names[part_of_rows(row)[0]] for row in rows)
        assert abs(drawn["small"] - small * len(rows)) <= 2, (first, drawn)
        taken.update(rows)
    for number, part in enumerate(plan.parts):
        times = [taken[row] for row in taken if part_of_rows(row)[0] == number]
        left_out = GLOBAL_BATCH * (SKIPPED[1] - SKIPPED[0])
        assert max(times) <= -(-(sum(times) + left_out) // part.num_rows)
