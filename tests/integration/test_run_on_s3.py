"""A run whose corpus, dataset, checkpoints and export lie on S3, told of the store by its run file alone."""

from pathlib import Path

import pytest

from data_service import storage
from tests.helpers.runs import running, step_records, write_corpus, write_run
from tests.helpers.s3_faults import FaultProxy

TRAIN = """
  steps: 8
  checkpoint: {every: 4, keep_last: 2}
"""


@pytest.mark.timeout(300)
def test_every_process_of_a_run_reaches_the_store_as_the_run_file_says(
    tmp_path: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Secrets come from the environment; without `run.s3` nothing says where the store is."""
    file = write_run(tmp_path, train=TRAIN)
    root = f"s3://bucket/{tmp_path.name}"
    corpus = tmp_path / "corpus.csv"
    write_corpus(corpus)
    storage.write_bytes(f"{root}/corpus.csv", corpus.read_bytes())
    corpus.unlink()
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    settings = [
        f"run.storage={root}/runs",
        f"run.s3.endpoint_url={proxy.url}",
        "run.s3.region=us-east-1",
        f"data.sources.0.path={root}/corpus.csv",
    ]
    storage.configure_s3(proxy.url, "us-east-1")  # for this process, which follows the run
    try:
        with running("train", file, *settings) as run:
            assert run.wait(240) == 0, run.output[-4000:]
            records = step_records(run.folder)
        names = storage.list_tree(f"{root}/runs/small")
    finally:
        storage.configure_s3()
    assert sorted(records) == list(range(1, 9))
    assert {"dataset/manifest.json", "config.yaml"} <= set(names)
    assert any(name.endswith("model.safetensors") for name in names if name.startswith("export/"))
    assert "test-secret" not in run.log_path.read_text()
