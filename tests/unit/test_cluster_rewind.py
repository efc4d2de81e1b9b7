"""Going back to an older checkpoint: what lies behind it is set aside whole, and only where something is left."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.config import RunConfig
from cluster.folder_lock import FolderLock
from cluster.journal import read_journal
from cluster.rewind import rewind
from cluster.run_data import check_resume
from cluster.run_store import RunFolder, RunWriter
from data_service.errors import ConfigError
from tests.helpers.written_parts import write_parts
from tests.unit.test_cluster_run_data import SHAPES, commit_step, config_in, dataset, publish
from trainer import manifest as checkpoints
from trainer.manifest import commit

STEPS = (10, 20, 30)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = config_in(tmp_path)
    publish(config, dataset())
    writer = RunWriter.open(config)
    for step in range(1, 33):
        writer.append_metrics({"step": step, "loss": 1.0})
    writer.close()
    for step in STEPS:
        commit_step(config, dataset(), step)
    return config


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_lies_behind_is_set_aside_whole(config: RunConfig) -> None:
    folder = RunFolder(config.root)
    before = files_below(Path(folder.checkpoints_uri))
    assert rewind(config, 15) == (10, [20, 30])
    assert checkpoints.list_complete(folder.checkpoints_uri) == [10]
    found, skipped = checkpoints.newest_complete(folder.checkpoints_uri)
    assert found is not None
    assert (found.step, skipped) == (10, [])
    after = files_below(Path(folder.checkpoints_uri))
    for step in (20, 30):
        name = f"step_{step:08d}"
        assert {path for path in after if path.startswith(f"superseded/{name}.attempt_1/")}
    back = {path.removeprefix("superseded/").replace(".attempt_1/", "/", 1): data for path, data in after.items()}
    assert back == before, "what was saved is not what it was"
    assert folder.history().last_step == 10
    assert [line["step"] for line in read_journal(folder.discarded_uri)] == list(range(11, 33))
    event = folder.events()[-1]
    assert (event["event"], event["step"], event["set_aside"]) == ("checkpoints_set_aside", 10, [20, 30])
    assert rewind(config, 15) == (10, [])


def test_a_step_may_be_set_aside_again_and_again(config: RunConfig) -> None:
    uri = RunFolder(config.root).checkpoints_uri
    state = checkpoints.read_manifest(uri, 30).state
    rewind(config, 20)
    commit(uri, 30, 2, write_parts(uri, 30, 2, SHAPES, num_ranks=1), replace(state))
    assert rewind(config, 20) == (20, [30])
    kept = sorted(path.name for path in (Path(uri) / "superseded").iterdir())
    assert kept == ["step_00000030.attempt_1", "step_00000030.attempt_2"]


def test_cut_short_it_moves_the_rest_when_asked_again(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import trainer.superseded as module

    folder = RunFolder(config.root)
    before = files_below(Path(folder.checkpoints_uri))
    moves = module.storage.move_file
    left = [1]

    def failing(source: str, target: str) -> None:
        if not left:
            raise OSError("the disk went away")
        left.pop()
        moves(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.storage, "move_file", failing)
        with pytest.raises(OSError, match="went away"):
            rewind(config, 10)
    assert rewind(config, 10) == (10, [20, 30])
    after = files_below(Path(folder.checkpoints_uri))
    back = {path.removeprefix("superseded/").replace(".attempt_1/", "/", 1): data for path, data in after.items()}
    assert back == before


def test_without_a_checkpoint_to_go_on_from_nothing_is_changed(config: RunConfig) -> None:
    folder = RunFolder(config.root)
    before = files_below(Path(folder.root))
    with pytest.raises(ConfigError, match=r"--after 9: no checkpoint .* there are 10, 20, 30"):
        rewind(config, 9)
    held = FolderLock.acquire(folder.root)
    try:
        with pytest.raises(ConfigError, match="in use by process"):
            rewind(config, 10)
    finally:
        held.release()
    assert {name: data for name, data in files_below(Path(folder.root)).items() if name != ".lock"} == {
        name: data for name, data in before.items() if name != ".lock"
    }


def test_a_refused_skip_names_the_way_back_and_the_command_goes_it(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 20 has consumed batches 0 to 22 without 4 to 6; the skip begins at 25."""
    change = "data.skip=[{first: 4, end: 7}, {first: 25, end: 28}]"
    with pytest.raises(ConfigError, match="checkpoint drop FILE --after 20"):
        check_resume(config_in(tmp_path, change))
    file = str(tmp_path / "run.yaml")
    assert main(["checkpoint", "drop", file]) == 2
    assert "Add --after" in capsys.readouterr().err
    assert main(["checkpoint", "drop", file, "--after", "20"]) == 0
    assert "steps 30 were moved to" in capsys.readouterr().out.replace("step 30 was", "steps 30 were")
    check_resume(config_in(tmp_path, change))
    assert main(["checkpoint", "list", file, "--json"]) == 0
    assert [one["step"] for one in json.loads(capsys.readouterr().out)] == [10, 20]


def test_where_no_checkpoint_fits_no_way_back_is_named(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_resume(config_in(tmp_path, "run.seed=9"))
    assert "checkpoint drop" not in str(caught.value)
