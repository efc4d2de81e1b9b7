"""The audit: the hash of each step against the rows of the dataset."""

import pytest

from data_service import storage
from data_service.audit import SampleAudit
from data_service.errors import DeliveryError, ShardCorruptError
from data_service.plan import OrderSpec, Plan
from data_service.planning import make_plan
from data_service.shards import shard_file
from tests.helpers.written_datasets import WrittenDataset, stream_dataset


def plan_of(dataset: WrittenDataset, **changes) -> Plan:
    return make_plan(
        dataset.manifest, "train", OrderSpec(seed=5, seq_len=32, global_batch=16, window_shards=3, **changes)
    )


@pytest.fixture
def audited(tmp_path):
    dataset = stream_dataset(tmp_path / "d")
    plan = plan_of(dataset, skip=((2, 9),))
    audit = SampleAudit(dataset.uri, plan, dataset.manifest, cache_bytes=1 << 20)
    yield dataset, plan, audit
    audit.close()


def test_the_audit_accepts_the_plans_rows_and_counts_steps_behind_skips(audited):
    dataset, plan, audit = audited
    whole = plan_of(dataset)
    hashes = [dataset.hash_of_step(plan, step) for step in range(6)]
    assert hashes[2] == dataset.hash_of_step(whole, 9)
    for step, found in enumerate(hashes, start=1):
        assert audit.expected(step - 1) == found
        audit.submit(step, found)
    assert audit.settle(6, deadline_s=30)
    assert audit.is_settled(6)


def test_the_audit_finds_a_step_of_other_rows_and_forgets_what_was_superseded(audited):
    dataset, plan, audit = audited
    audit.submit(1, dataset.hash_of_step(plan, 0))
    audit.submit(2, dataset.hash_of_step(plan, 2))
    with pytest.raises(DeliveryError, match="step 2: the rows that the ranks consumed hash to"):
        audit.settle(2, deadline_s=30)
    audit.submit(3, "0" * 16)
    audit.forget()
    assert audit.settle(3, deadline_s=30)


def test_the_audit_names_a_damaged_shard(audited):
    dataset, plan, audit = audited
    for number in range(dataset.manifest.num_shards):
        path = storage.local_path(storage.join(dataset.uri, shard_file("train", number)))
        if path.exists():
            path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    audit.submit(1, dataset.hash_of_step(plan, 0))
    with pytest.raises(ShardCorruptError, match="shards/train-0000"):
        audit.settle(1, deadline_s=30)


def test_a_large_step_is_audited_in_pieces(audited, monkeypatch):
    dataset, plan, audit = audited
    audit._rows_at_once = 5
    assert audit.expected(1) == dataset.hash_of_step(plan, 1)


def test_an_audit_of_a_remote_dataset_keeps_shards_where_it_is_told_and_counts_what_it_reads(tmp_path):
    """Each shard once, however many of its rows are audited."""
    dataset = stream_dataset(tmp_path / "d")
    remote = f"memory://audit-{tmp_path.name}"
    for path in (tmp_path / "d").rglob("*"):
        if path.is_file():
            storage.write_bytes(storage.join(remote, path.relative_to(tmp_path / "d").as_posix()), path.read_bytes())
    plan = plan_of(dataset)
    folder = tmp_path / "kept"
    audit = SampleAudit(remote, plan, dataset.manifest, cache_bytes=1 << 30, cache_dir=str(folder))
    try:
        for step in range(plan.num_batches):
            assert audit.expected(step) == dataset.hash_of_step(plan, step)
        assert [path for path in folder.rglob("*") if path.is_file()]
        shards = (tmp_path / "d" / "shards").glob("train-*.arrow")
        assert audit.num_read_bytes == sum(path.stat().st_size for path in shards)
    finally:
        audit.close()
        storage.remove_tree(remote)
