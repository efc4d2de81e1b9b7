"""`status` and `stop` tell a run that goes on from one whose controller was killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.config import load_config
from cluster.folder_lock import FolderLock, holder
from cluster.run_store import RunFolder, RunWriter
from data_service.errors import ConfigError
from tests.helpers.runs import ROOT, write_run

CONTROLLER = """
import sys
from cluster.config import load_config
from cluster.run_store import RunWriter
writer = RunWriter.open(load_config(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
"""


def controller(capsys: pytest.CaptureFixture[str], file: Path) -> str:
    assert main(["status", str(file), "--json"]) == 0
    return str(json.loads(capsys.readouterr().out)["controller"])


def test_a_killed_controller_is_gone_for_status_and_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_run(tmp_path)
    folder = RunFolder(load_config(file).root)
    process = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, str(file)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"open\n"
        assert controller(capsys, file) == "alive"
        assert str(holder(folder.root)).startswith(f"process {process.pid} on ")
        assert main(["stop", str(file)]) == 0
        assert Path(folder.stop_uri).exists()
        Path(folder.stop_uri).unlink()
    finally:
        process.kill()
        process.wait(timeout=20)
        process.stdin.close()
        process.stdout.close()
    capsys.readouterr()
    assert controller(capsys, file) == "gone"
    assert main(["status", str(file)]) == 0
    assert "its controller is gone; the same command goes on from its checkpoint" in capsys.readouterr().out
    assert main(["stop", str(file), "--wait", "30"]) == 1
    assert "its controller is gone" in capsys.readouterr().out
    assert not Path(folder.stop_uri).exists()


def test_looking_neither_takes_the_folder_nor_waits_for_it(tmp_path: Path) -> None:
    assert holder(str(tmp_path / "nothing")) is None
    lock = FolderLock.acquire(str(tmp_path))
    assert holder(str(tmp_path)) is not None
    with pytest.raises(ConfigError, match="in use by process"):
        FolderLock.acquire(str(tmp_path))
    lock.release()
    assert holder(str(tmp_path)) is None
    FolderLock.acquire(str(tmp_path)).release()


def test_an_object_store_cannot_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_run(tmp_path)
    folder = RunFolder("memory://status/small")
    RunWriter.open(load_config(file, ["run.storage=memory://status"])).close()
    assert folder.exists()
    assert main(["status", str(file), "run.storage=memory://status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["controller"] == "unknown"
