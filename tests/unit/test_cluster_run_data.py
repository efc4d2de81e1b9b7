"""Which data a run reads, and what a resumed run may change of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import RunConfig, load_config
from cluster.run_data import check_resume, dataset_of_run, order_of, service_token, train_plan
from cluster.run_store import RunFolder
from data_service import storage
from data_service.cursor import Cursor
from data_service.errors import ConfigError
from data_service.manifest import DatasetManifest, PartInfo, manifest_name
from tests.helpers.written_parts import make_state, write_parts
from trainer.manifest import TrainState, commit

RUN = """
run: {name: small, storage: ./runs}
data:
  sources: [{path: zh.csv, weight: 3}, {path: en.csv, weight: 1}]
  seq_len: 32
  mixture: {changes: [{first_batch: 20, weights: {zh: 1, en: 1}}]}
  skip: [{first: 4, end: 7}]
train: {global_batch: 8}
"""
SHAPES = {"head.norm.weight": (32,)}
CONSUMED = 30


def config_in(folder: Path, *overrides: str) -> RunConfig:
    (folder / "run.yaml").write_text(RUN, encoding="utf-8")
    return load_config(folder / "run.yaml", list(overrides))


def dataset(generation: int = 0, digest: str = "aa") -> DatasetManifest:
    parts = tuple(
        PartInfo(source, number, 100, 40_000, 0, number * 10, 10)
        for number in range(generation + 1)
        for source in ("zh", "en")
    )
    return DatasetManifest(
        version=2,
        digest=digest,
        generation=generation,
        rows="stream",
        row_tokens=0,
        shard_tokens=4096,
        shard_rows=0,
        vocab_size=400,
        token_dtype="uint16",
        eos_id=0,
        labels=(),
        loss_masks=False,
        splits={"train": parts, "eval": ()},
        num_shards=20 * (generation + 1),
        index_digests=("00",),
        tokenizer_digest="11",
        eval_below=0,
        prepare_key="22",
        inputs={},
        files=(),
        num_records=100,
        num_rejects=0,
        num_duplicates=0,
        num_truncated=0,
        base="aa" if generation else None,
    )


def publish(config: RunConfig, manifest: DatasetManifest) -> None:
    storage.write_bytes(f"{config.dataset_uri}/{manifest_name(manifest.generation)}", manifest.to_json().encode())


def commit_step(config: RunConfig, manifest: DatasetManifest, step: int) -> TrainState:
    """A checkpoint of this configuration after so many steps."""
    uri = RunFolder(config.root).checkpoints_uri
    cursor = Cursor.of(train_plan(config, manifest), step)
    state = make_state(
        SHAPES,
        step,
        plan_digest=cursor.plan_digest,
        dataset_digest=manifest.digest,
        seed=config.run.seed,
        seq_len=config.data.seq_len,
        global_batch=config.train.global_batch,
        config=config.resolved(),
    )
    commit(uri, step, 1, write_parts(uri, step, 1, SHAPES, num_ranks=1), state)
    return state


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = config_in(tmp_path)
    publish(config, dataset())
    commit_step(config, dataset(), CONSUMED)
    return config


def test_the_same_configuration_goes_on(config: RunConfig) -> None:
    check_resume(config)


@pytest.mark.parametrize(
    "change",
    [
        "data.mixture.changes=[{first_batch: 20, weights: {zh: 1, en: 1}}, {first_batch: 33, weights: {zh: 0, en: 1}}]",
        "data.skip=[{first: 4, end: 7}, {first: 33, end: 40}]",
        "data.service.workers=5",
        "train.steps=99",
    ],
)
def test_what_lies_behind_the_consumed_batches_may_change(config: RunConfig, tmp_path: Path, change: str) -> None:
    """Step 30 consumed batch 32: three were skipped."""
    check_resume(config_in(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "data.mixture.changes=[{first_batch: 32, weights: {zh: 0, en: 1}}]",
            [
                "data.mixture.changes: trained with from batch 0 zh 3, en 1; from batch 20 zh 1, en 1",
                "now from batch 0 zh 3, en 1; from batch 32 zh 0, en 1; new ones may begin at global batch 33 or later",
            ],
        ),
        ("data.mixture.changes=[]", ["data.mixture.changes"]),
        ("data.sources.0.weight=4", ["trained with from batch 0 zh 3, en 1", "now from batch 0 zh 4, en 1"]),
        ("data.skip=[]", ["data.skip: trained with 4 to 6, now none", "global batch 33 or later"]),
        ("data.skip=[{first: 4, end: 7}, {first: 32, end: 40}]", ["data.skip", "now 4 to 6, 32 to 39"]),
        ("data.mixture.temperature=2.0", ["data.mixture.temperature: trained with 1.0, now 2.0"]),
        ("run.seed=9", ["run.seed: trained with 0, now 9"]),
        ("data.isolate_documents=true", ["data.isolate_documents: trained with False, now True"]),
        ("train.global_batch=4", ["train.global_batch: trained with 8, now 4"]),
    ],
)
def test_what_was_consumed_may_not_change(config: RunConfig, tmp_path: Path, change: str, told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_resume(config_in(tmp_path, change))
    message = str(caught.value)
    assert f"the checkpoint of step {CONSUMED}" in message
    assert "Nothing was changed." in message
    for part in told:
        assert part in message, message
    assert len(message.splitlines()) <= 5


def test_a_run_stays_with_its_generation(config: RunConfig) -> None:
    newer = dataset(1, "bb")
    publish(config, newer)
    check_resume(config)
    assert dataset_of_run(config, newer).digest == "aa"


def test_a_run_without_a_checkpoint_takes_the_newest_generation(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    check_resume(config)
    assert dataset_of_run(config, dataset(1, "bb")).digest == "bb"


def test_another_dataset_is_named(config: RunConfig, tmp_path: Path) -> None:
    other = config_in(tmp_path, "data.dataset=elsewhere")
    publish(other, dataset(digest="cc"))
    with pytest.raises(ConfigError) as caught:
        check_resume(other)
    message = str(caught.value)
    for part in ("to step 30 on the dataset aa", "data.dataset: trained on None, now", "elsewhere", "there are cc"):
        assert part in message, message
    with pytest.raises(ConfigError, match="dataset aa"):
        dataset_of_run(other, dataset(digest="cc"))


def test_a_configuration_of_another_release_is_no_traceback(config: RunConfig, tmp_path: Path) -> None:
    state = replace(commit_step(config, dataset(), CONSUMED + 1), config={"data": {"colour": "red"}})
    uri = RunFolder(config.root).checkpoints_uri
    step = state.step + 1
    commit(uri, step, 1, write_parts(uri, step, 1, SHAPES, num_ranks=1), replace(state, step=step))
    with pytest.raises(ConfigError, match="cannot be read by this release"):
        check_resume(config_in(tmp_path, "run.seed=9"))


def test_an_order_of_another_release_is_said_to_be_one(config: RunConfig, tmp_path: Path) -> None:
    state = commit_step(config, dataset(), CONSUMED + 1)
    uri = RunFolder(config.root).checkpoints_uri
    step = state.step + 1
    state = replace(state, step=step, plan_digest="ab" * 16, versions={"torch": "9.9"})
    commit(uri, step, 1, write_parts(uri, step, 1, SHAPES, num_ranks=1), state)
    with pytest.raises(ConfigError, match=r"no key differs, .* plans of version 2.*torch 9\.9"):
        check_resume(config)


def test_the_order_is_the_configurations(tmp_path: Path) -> None:
    order = order_of(config_in(tmp_path, "run.seed=5", "data.isolate_documents=true"))
    assert (order.seed, order.seq_len, order.global_batch, order.isolate_documents) == (5, 32, 8, True)
    assert order.weights == ((0, (("zh", 3.0), ("en", 1.0))), (20, (("zh", 1.0), ("en", 1.0))))
    assert order.skip == ((4, 7),)


def test_a_running_service_needs_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORMJIB_DATA_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"data.service.address.*STORMJIB_DATA_TOKEN"):
        service_token()
    monkeypatch.setenv("STORMJIB_DATA_TOKEN", "a-secret-of-many")
    assert service_token() == "a-secret-of-many"
