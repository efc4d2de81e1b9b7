"""One run as a user starts it: from a CSV to a streamed answer, and everything its folder must hold."""

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import openai
import pytest
import yaml

from cluster.run_store import RunFolder
from tests.helpers.runs import ROOT, processes_of, running, step_records, write_run

TRAIN = """
  parallel: {dp: 1, pp: 2}
  steps: 12
  eval: {every: 6}
  checkpoint: {every: 4, keep_last: 2, keep_best: 1}
"""


def stormjib(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.timeout(300)
def test_a_run_trains_serves_streams_and_stops(tmp_path: Path) -> None:
    """With a home that it may not write, where another cluster left its token (root may write it all the same)."""
    folder = tmp_path / "home"
    foreign = folder / ".ray" / "auth_token"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("left by another cluster")
    foreign.parent.chmod(0o500)
    folder.chmod(0o500)
    file = write_run(tmp_path, train=TRAIN)
    marker = uuid.uuid4().hex
    with running("run", file, env={"STORMJIB_TEST_MARKER": marker, "HOME": str(folder)}) as run:
        serving = run.until_event("serving", deadline_s=200)
        client = openai.OpenAI(base_url=f"{serving['url']}/v1", api_key="none", max_retries=0)
        whole = client.completions.create(model="small", prompt="storm wind", max_tokens=16, temperature=0)
        pieces = [
            chunk.choices[0].text
            for chunk in client.completions.create(
                model="small", prompt="storm wind", max_tokens=16, temperature=0, stream=True
            )
            if chunk.choices
        ]
        assert "".join(pieces) == whole.choices[0].text
        assert whole.system_fingerprint is not None
        assert whole.system_fingerprint.startswith("step-")
        run.process.send_signal(signal.SIGINT)
        assert run.wait(60) == 0, run.output[-4000:]
    assert processes_of(marker) == []
    assert foreign.read_text() == "left by another cluster"
    check_stable_surface(file, Path(run.folder.root))


def check_stable_surface(file: Path, root: Path) -> None:
    resolved = yaml.safe_load((root / "config.yaml").read_text())
    assert resolved["train"]["optimizer"]["eps"] == 1e-8, "defaults are written out"
    events = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    assert all({"v", "time", "monotonic_s", "event", "state", "attempt", "node_id"} <= set(event) for event in events)
    states = [event["state"] for event in events if event["event"] == "state_changed"]
    assert states == ["placing", "running", "finished"]
    steps = step_records(RunFolder(str(root)))
    wanted = {
        "step",
        "loss",
        "tokens",
        "sample_hash",
        "lr",
        "grad_norm",
        "dp",
        "pp",
        "attempt",
        "step_s",
        "data_wait_s",
    }
    assert all(wanted <= set(record) for record in steps.values())
    assert len(steps) == 12
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval" in line] == [0, 6, 12]
    assert all((root / "dataset" / name).exists() for name in ("manifest.json", "shards", "tokenizer", "rejects.jsonl"))
    exports = os.listdir(root / "export")
    assert len(exports) == 1
    status = json.loads(stormjib("status", str(file), "--json").stdout)
    assert status["state"] == "finished"
    assert status["step"] == 12
    listed = json.loads(stormjib("checkpoint", "list", str(file), "--json").stdout)
    assert [row["step"] for row in listed][-2:] == [8, 12]
    model = str(root / "export" / exports[0])
    command = ["generate", "--prompt", "storm wind", "--max-tokens", "8", "--temperature", "0"]
    from_folder = stormjib(*command, "--model", model)
    from_run = stormjib(command[0], str(file), *command[1:], "--json")
    assert from_folder.returncode == 0, from_folder.stderr
    assert json.loads(from_run.stdout)["text"] == from_folder.stdout.removesuffix("\n")
    logs = stormjib("logs", str(file), "--rank", "0")
    assert logs.returncode == 0, logs.stderr


@pytest.mark.timeout(300)
def test_stop_and_resume_give_the_losses_of_a_run_that_was_not_stopped(tmp_path: Path) -> None:
    """Ctrl-C after some steps, then the same command: the same bytes of metrics, apart from the times."""
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    train = "  parallel: {dp: 2, pp: 1}\n  steps: 40\n  eval: {every: 1000, max_batches: 2}\n"
    whole = write_run(tmp_path / "whole", train=train)
    with running("train", whole) as run:
        assert run.wait() == 0, run.output[-4000:]
        reference = step_records(run.folder)
    parts = write_run(tmp_path / "parts", train=train)
    with running("train", parts) as run:
        run.until_step(5)
        run.process.send_signal(signal.SIGINT)
        assert run.wait(60) == 130, run.output[-4000:]
        stopped = run.folder.history().last_step
    assert 5 <= stopped < 40
    refused = stormjib("train", str(parts), "run.seed=4")
    assert refused.returncode == 2
    assert "run.seed: started with 3, now 4" in refused.stderr
    with running("train", parts) as run:
        assert run.wait() == 0, run.output[-4000:]
        resumed = step_records(run.folder)
    for step in reference:
        for key in ("loss", "grad_norm", "sample_hash", "lr", "tokens"):
            assert resumed[step][key] == reference[step][key], (step, key)
