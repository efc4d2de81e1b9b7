"""Going back to an older checkpoint of a run whose folder lies on S3."""

from pathlib import Path

from cluster.journal import read_journal
from cluster.rewind import rewind
from cluster.run_store import RunFolder, RunWriter
from data_service import storage
from tests.helpers.s3_faults import FaultProxy
from tests.unit.test_cluster_run_data import commit_step, config_in, dataset, publish
from trainer import manifest as checkpoints


def test_checkpoints_are_set_aside_in_the_store(tmp_path: Path, proxy: FaultProxy) -> None:
    config = config_in(tmp_path, f"run.storage=s3://bucket/{tmp_path.name}/runs")
    publish(config, dataset())
    writer = RunWriter.open(config)
    for step in range(1, 33):
        writer.append_metrics({"step": step, "loss": 1.0})
    writer.close()
    for step in (10, 20, 30):
        commit_step(config, dataset(), step)
    folder = RunFolder(config.root)
    before = storage.list_tree(folder.checkpoints_uri)
    assert rewind(config, 19) == (10, [20, 30])
    found, skipped = checkpoints.newest_complete(folder.checkpoints_uri)
    assert found is not None
    assert found.step == 10
    # SeaweedFS lists a folder for a while after its last file went.
    assert all("has no manifest.json" in one.reason for one in skipped)
    after = storage.list_tree(folder.checkpoints_uri)
    assert sorted(name.removeprefix("superseded/").replace(".attempt_1/", "/", 1) for name in after) == before
    assert folder.history().last_step == 10
    assert [line["step"] for line in read_journal(folder.discarded_uri)] == list(range(11, 33))
    assert folder.events()[-1]["event"] == "checkpoints_set_aside"
