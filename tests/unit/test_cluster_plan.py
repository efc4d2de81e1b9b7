"""`stormjib plan` and `stormjib doctor` on the data of a run."""

import json
import socket
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.config import load_config
from cluster.run_data import train_plan
from data_service.order import rows_of_batch
from data_service.plan import part_of_rows
from data_service.prepare import prepare
from tests.helpers.runs import write_corpus

RUN = """
run: {name: two, storage: ./runs}
cluster: {address: local, node: {slots: 2}}
data:
  sources: [{path: big.csv, weight: 3}, {path: small.csv, weight: 1}]
  tokenizer: {train: {vocab_size: 400}}
  seq_len: 32
  shard_tokens: 4096
  mixture: {changes: [{first_batch: 10, weights: {big: 1, small: 1}}, {first_batch: 90, weights: {big: 1, small: 0}}]}
  skip: [{first: 4, end: 12}]
train: {global_batch: 8, steps: 40, parallel: {dp: 1}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "big.csv", documents=120, seed=1)
    write_corpus(tmp_path / "small.csv", documents=40, seed=2)
    path = tmp_path / "run.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path


def test_plan_tells_the_epochs_of_each_source(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] is None
    assert main(["plan", str(file)]) == 0
    assert "data: not prepared yet" in capsys.readouterr().out

    config = load_config(file)
    plan = train_plan(config, prepare(config.data, config.dataset_uri))
    assert main(["plan", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["data"]
    assert (told["rows"], told["batches"]) == (plan.num_rows, plan.num_batches)
    assert told["epochs"] == pytest.approx(40 * 8 / plan.num_rows)
    drawn = {"big": 0, "small": 0}
    for step in range(40):
        for row in rows_of_batch(plan, step).tolist():
            drawn[plan.parts[part_of_rows(row)[0]].source] += 1
    sizes = {part.source: part.num_rows for part in plan.parts}
    for name, epochs in told["sources"].items():
        assert epochs * sizes[name] == pytest.approx(drawn[name], abs=2)
    assert main(["plan", str(file)]) == 0
    assert "source small: " in capsys.readouterr().out


OPEN = ["train.parallel={dp: auto, pp: auto}", "train.zero.stage=auto", "train.recompute=auto"]


def test_plan_marks_the_row_that_the_run_would_take(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides in ([], OPEN, [*OPEN, "train.parallel.pp=2", "train.micro_batch=1", "train.recompute=blocks"]):
        arguments = ["plan", str(file), *overrides, "--memory-gib", "4"]
        assert main([*arguments, "--json"]) == 0
        run = json.loads(capsys.readouterr().out)["run"]
        for more in ([], ["--all"]):
            assert main([*arguments, *more]) == 0
            (marked,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith("<- the run")]
            recompute = "blocks" if run["recompute"] else "-"
            wanted = [run["dp"], run["pp"], run["zero_stage"], run["micro_batch"], recompute]
            assert marked.split()[:5] == [str(value) for value in wanted]
        assert "auto" not in run["keys"].values()
    assert main(["plan", str(file), *OPEN, "--memory-gib", "0.001"]) == 2
    assert "The run does not fit" in capsys.readouterr().err


def test_doctor_looks_at_sources_and_at_a_running_service(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STORMJIB_DATA_TOKEN", raising=False)
    with socket.socket() as listening, socket.socket() as closed:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        closed.bind(("127.0.0.1", 0))
        here, nobody = (f"127.0.0.1:{one.getsockname()[1]}" for one in (listening, closed))
        gone = "data.sources.1={path: gone.csv, name: small, weight: 1}"
        code = main(["doctor", str(file), gone, f"data.service.address=['{here}', '{nobody}']"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 1
    assert any(line.startswith("ok    data.sources.0: 1 file") for line in lines), lines
    assert any(line.startswith("FAIL") and "gone.csv" in line for line in lines), lines
    assert any(line.startswith("FAIL  STORMJIB_DATA_TOKEN is not set") for line in lines), lines
    assert any(line.startswith(f"ok    data.service.address {here}") for line in lines), lines
    assert any(line.startswith(f"FAIL  data.service.address {nobody}") for line in lines), lines
