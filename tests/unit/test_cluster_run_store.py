import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import RunConfig, load_config
from cluster.events import Event
from cluster.journal import SegmentJournal, open_journal, read_journal
from cluster.run_store import RunFolder, RunWriter
from cluster.states import RunState
from data_service.errors import ConfigError

RUN = """
run: {name: small, storage: ./runs}
data: {sources: [{path: a.csv}]}
"""


def config_in(folder: Path, *overrides: str) -> RunConfig:
    (folder / "run.yaml").write_text(RUN, encoding="utf-8")
    return load_config(folder / "run.yaml", list(overrides))


def test_a_journal_survives_a_torn_last_line(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.jsonl")
    journal = open_journal(uri)
    journal.append({"step": 1})
    journal.close()
    with Path(uri).open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    assert read_journal(uri) == [{"step": 1}]
    journal = open_journal(uri)
    journal.append({"step": 2})
    journal.close()
    assert read_journal(uri) == [{"step": 1}, {"step": 2}]


def test_segments_on_an_object_store_read_like_a_file() -> None:
    uri = "memory://bucket/run/metrics.jsonl"
    journal = SegmentJournal(uri)
    for step in range(1, 121):
        journal.append({"step": step})
    journal.close()
    assert [record["step"] for record in read_journal(uri)] == list(range(1, 121))
    again = SegmentJournal(uri)
    assert [record["step"] for record in again.rewrite(lambda record: record["step"] <= 70)] == list(range(71, 121))
    again.append({"step": 71})
    again.close()
    assert [record["step"] for record in read_journal(uri)] == list(range(1, 72))


def test_steps_that_are_recomputed_move_to_the_discarded(tmp_path: Path) -> None:
    writer = RunWriter.open(config_in(tmp_path))
    for step in range(1, 8):
        writer.append_metrics({"step": step, "loss": float(step)})
    writer.append_metrics({"step": 7, "eval": {"loss": 1.0}})
    assert writer.discard_after(5) == 2
    writer.append_metrics({"step": 6, "loss": 6.5})
    writer.close()
    folder = RunFolder(writer.folder.root)
    assert [record["loss"] for record in folder.history().steps] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.5]
    assert folder.history().evals == {}
    assert [record["step"] for record in read_journal(folder.discarded_uri)] == [6, 7, 7]


def test_attempts_count_on_over_controllers_and_events_tell_the_state(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    writer = RunWriter.open(config)
    assert writer.next_attempt() == 1
    writer.events.enter(RunState.PLACING)
    writer.events.enter(RunState.FAILED)
    writer.close()
    writer = RunWriter.open(config)
    assert writer.next_attempt() == 2
    writer.close()
    events = RunFolder(config.root).events()
    assert [event["event"] for event in events].count(Event.RUN_STARTED.value) == 2
    assert all({"v", "time", "monotonic_s", "event", "state", "attempt", "node_id"} <= set(event) for event in events)


def test_an_attempt_number_is_given_once(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    writer = RunWriter.open(config)
    claim = Path(config.root) / "control" / "attempt_000001.json"
    claim.parent.mkdir(parents=True, exist_ok=True)
    claim.write_text("{}", encoding="utf-8")
    assert writer.next_attempt() == 2
    writer.close()


def test_another_identity_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    RunWriter.open(config).close()
    before = {path: path.read_bytes() for path in Path(config.root).rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"run.seed: started with 0, now 7"):
        RunWriter.open(config_in(tmp_path, "run.seed=7"))
    after = {path: path.read_bytes() for path in Path(config.root).rglob("*") if path.is_file()}
    assert {path.name for path in after} == {path.name for path in before}
    assert after[Path(config.root) / "config.yaml"] == before[Path(config.root) / "config.yaml"]
    assert after[Path(config.root) / "events.jsonl"] == before[Path(config.root) / "events.jsonl"]


def test_mesh_steps_and_serving_may_change(tmp_path: Path) -> None:
    RunWriter.open(config_in(tmp_path)).close()
    RunWriter.open(
        config_in(tmp_path, "train.steps=7", "cluster.nodes=4", "serve.port=1", "train.zero.stage=2")
    ).close()
    left_open = config_in(tmp_path, "train.parallel.pp=auto", "train.zero.stage=auto", "train.recompute=auto")
    for config in (left_open, left_open, config_in(tmp_path, "cluster.node.slots=2", "train.parallel.pp=2")):
        RunWriter.open(config).close()  # the saved configuration may hold `auto` as well


def test_one_controller_at_a_time(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    writer = RunWriter.open(config)
    with pytest.raises(ConfigError, match="in use by process"):
        RunWriter.open(config)
    writer.close()
    RunWriter.open(config).close()


def test_a_killed_controller_leaves_the_folder_free(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    script = (
        "import os, signal, sys\n"
        "from cluster.config import load_config\n"
        "from cluster.run_store import RunWriter\n"
        "writer = RunWriter.open(load_config(sys.argv[1]))\n"
        "writer.append_metrics({'step': 1, 'loss': 2.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run.yaml")], check=False, timeout=60)
    assert ended.returncode == -9
    writer = RunWriter.open(config)
    assert writer.folder.history().last_step == 1
    writer.close()


def test_a_stop_request_reaches_the_controller_once(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    writer = RunWriter.open(config)
    assert not writer.stop_requested()
    RunFolder(config.root).request_stop()
    assert writer.stop_requested()
    writer.close()
    writer = RunWriter.open(config)
    assert not writer.stop_requested()
    writer.close()


def test_status_as_json_has_its_stable_keys(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    RunWriter.open(config).close()
    command = [sys.executable, "-m", "cluster", "status", str(tmp_path / "run.yaml"), "--json"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    status = json.loads(ended.stdout)
    assert status["state"] == "pending"
    assert status["step"] == 0
    assert {"run", "steps", "attempt", "loss", "dp", "pp", "evals", "checkpoints", "recoveries", "exported"} <= set(
        status
    )
