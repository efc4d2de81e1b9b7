"""Runs that earlier releases wrote, kept in tests/golden: the present code goes on from them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.config import LaidOutConfig, RunConfig, load_config
from cluster.run_store import RunFolder
from data_service.access import DataAccess
from data_service.control import ControlServer
from data_service.manifest import read_manifests
from data_service.plan import OrderSpec
from data_service.server import DataWorker
from tests.helpers.row_service import TOKEN
from tests.helpers.runs import running, step_records
from tests.ranks.conftest import Lab
from trainer.protocol import WorkerSpec

GOLDEN = sorted((Path(__file__).resolve().parents[1] / "golden").glob("run_*"))
KEPT_STEP = 4


def expected(folder: Path) -> dict[int, dict[str, float]]:
    return {one["step"]: one for one in json.loads((folder / "expected.json").read_text())}


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy: a run writes into its folder."""
    return Path(shutil.copytree(request.param, tmp_path / "run"))


@pytest.fixture
def config(golden: Path) -> RunConfig:
    return load_config(golden / "run.yaml")


@pytest.fixture
def rows(config: RunConfig) -> Iterator[DataAccess]:
    control = ControlServer(config.dataset_uri, TOKEN)
    address = control.start()
    worker = DataWorker(config.dataset_uri, address, TOKEN)
    worker.start()
    order = OrderSpec.from_config(config.data, seed=config.run.seed, global_batch=config.train.global_batch)
    (manifest,) = read_manifests(config.dataset_uri)
    try:
        yield DataAccess((address,), TOKEN, order, manifest.digest, stalled_s=20.0)
    finally:
        worker.stop()
        control.stop()


def test_there_is_one() -> None:
    assert GOLDEN


def test_its_checkpoint_is_whole(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(golden / "run.yaml"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["step"], row["status"], row["dp"]) == (KEPT_STEP, "committed", 2)


@pytest.mark.parametrize(("dp", "pp"), [(2, 1), (1, 2)], ids=["same mesh", "pipeline"])
def test_ranks_go_on_from_it(golden: Path, config: RunConfig, rows: DataAccess, lab: Lab, dp: int, pp: int) -> None:
    (manifest,) = read_manifests(config.dataset_uri)
    uri = RunFolder(config.root).checkpoints_uri
    spec = WorkerSpec(
        attempt=2,
        rank=0,
        world_size=dp * pp,
        dp=dp,
        pp=pp,
        local_rank=0,
        device="cpu",
        master_addr="127.0.0.1",
        master_port=0,
        seed=config.run.seed,
        seq_len=config.data.seq_len,
        vocab_size=manifest.vocab_size,
        model=config.model,
        train=LaidOutConfig.of(config, {}).train,
        data=rows,
        checkpoints_uri=uri,
        resume_step=KEPT_STEP,
        interface="lo",
    )
    outcome = lab.run(spec)
    wanted = expected(golden)
    assert sorted(outcome.steps) == sorted(wanted)
    for step, found in outcome.steps.items():
        assert found.sample_hash == wanted[step]["sample_hash"], step
        assert found.loss == pytest.approx(wanted[step]["loss"], rel=1e-4), step
        assert found.grad_norm == pytest.approx(wanted[step]["grad_norm"], rel=1e-3), step
        assert found.lr == pytest.approx(wanted[step]["lr"])


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_whole_run_goes_on_from_it(golden: Path) -> None:
    dataset = (golden / "golden" / "dataset" / "manifest.json").read_bytes()
    with running("train", golden / "run.yaml") as run:
        assert run.wait() == 0, run.output[-4000:]
        records = step_records(run.folder)
        assert run.events("attempt_started")[-1]["resume_step"] == KEPT_STEP
    assert sorted(records) == list(range(1, 9))
    for step, wanted in expected(golden).items():
        assert records[step]["sample_hash"] == wanted["sample_hash"], step
        assert records[step]["loss"] == pytest.approx(wanted["loss"], rel=1e-4), step
    assert (golden / "golden" / "dataset" / "manifest.json").read_bytes() == dataset, "prepared again"
