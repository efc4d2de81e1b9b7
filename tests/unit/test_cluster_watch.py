"""What is shown of a run may fail and not end it; who asks for a trace waits for those of all ranks."""

import json
import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cli import main
from cluster.config import load_config
from cluster.events import Event
from cluster.run_flow import _check_task_servable
from cluster.run_store import RunFolder, RunWriter
from cluster.states import RunState
from cluster.watch import RunWatch
from data_service.errors import ConfigError, DataUnavailableError
from tests.helpers.runs import write_run
from trainer.protocol import ProfileSteps
from trainer.tasks.facts import TaskFacts


@pytest.mark.parametrize("error", [OSError("503 SlowDown"), DataUnavailableError("no answer")])
def test_a_store_that_fails_in_the_look_for_traces_is_said_once(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster.watch.load_encoder", lambda *_: None)
    monkeypatch.setattr("cluster.watch._LOOK_EVERY_S", 0.0)
    folder = RunFolder(str(tmp_path))
    parts: Any = (SimpleNamespace(tokenizer_digest="", eos_id=0), SimpleNamespace(folder=folder))
    console: Any = SimpleNamespace(say=lambda _: None)
    watch = RunWatch(load_config(write_run(tmp_path), ["observe.tensorboard=false"]), *parts, console)
    uri = folder.request_profile(3)

    def fails() -> None:
        raise error

    with caplog.at_level(logging.WARNING), monkeypatch.context() as broken:
        broken.setattr(folder, "profile_request", fails)
        assert watch.wanted_trace() is None
        assert watch.wanted_trace() is None
    assert [str(error) in record.getMessage() for record in caplog.records] == [True]
    assert watch.wanted_trace() == ProfileSteps(1, 3, uri), "it is found when the store answers again"


@pytest.mark.parametrize("num_written", [1, 2])
def test_a_profile_waits_for_every_rank(num_written: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_run(tmp_path)
    writer = RunWriter.open(load_config(file))
    writer.events.enter(RunState.PLACING)
    writer.events.write(Event.ATTEMPT_STARTED, fields={"dp": 2, "pp": 1, "resume_step": None, "ranks": []})
    written = threading.Event()

    def write_traces() -> None:
        while not Path(writer.folder.profile_uri).exists():
            time.sleep(0.01)
        number = json.loads(Path(writer.folder.profile_uri).read_text())["number"]
        folder = Path(writer.folder.traces_uri(number))
        folder.mkdir(parents=True)
        for rank in range(num_written):
            (folder / f"rank_{rank:05d}.json.gz").write_bytes(b"")
        written.set()

    thread = threading.Thread(target=write_traces)
    thread.start()
    code = main(["profile", str(file), "--wait", "2"])
    thread.join()
    writer.close()
    said = capsys.readouterr().out
    assert written.is_set()
    if num_written == 2:
        assert code == 0
        assert "rank_00000.json.gz, rank_00001.json.gz; open them" in said
    else:
        assert code == 1
        assert "traces of 2 ranks did not come within 2 s; there are: rank_00000.json.gz" in said


def test_a_classifier_of_ones_own_is_refused_before_it_trains_for_an_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.run_flow.task_facts", lambda *_: TaskFacts(labels=("bad", "good")))
    file = write_run(tmp_path)
    dataset: Any = None
    _check_task_servable(load_config(file), dataset)
    with pytest.raises(ConfigError, match="a classifier has none. Use `stormjib train`"):
        _check_task_servable(load_config(file, ["train.task=examples.ordinal_task:OrdinalClasses"]), dataset)
    own = "train.task=tests.unit.test_trainer_tasks:LineLengths"
    _check_task_servable(load_config(file, [own]), dataset)
