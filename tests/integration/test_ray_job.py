"""`ray job submit` against a Ray that the user runs: token-protected, one machine, with a dashboard."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.run_store import RunFolder
from tests.helpers.runs import ROOT, step_records, write_corpus

RAY = str(Path(sys.executable).with_name("ray"))
STEPS = 6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_ray(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head with eight CPUs; yields the dashboard's address and the environment that is let in."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    home = folder / "home"
    home.mkdir()
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    short = tempfile.mkdtemp(prefix="sj-job-")
    ports = [free_port() for _ in range(3)]
    command = [
        *(RAY, "start", "--head", "--block", "--num-cpus=8", "--node-ip-address=127.0.0.1", f"--port={ports[0]}"),
        *(f"--dashboard-port={ports[1]}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={ports[2]}"),
        *(f"--object-store-memory={128 * 2**20}", f"--temp-dir={short}"),
    ]
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{ports[1]}"
        await_dashboard(address, process, folder / "ray.log")
        yield address, environment
    finally:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        shutil.rmtree(short, ignore_errors=True)


def await_dashboard(address: str, process: subprocess.Popen[bytes], log: Path, deadline_s: float = 90) -> None:
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
        except urllib.error.HTTPError:
            return  # it answers, and asks for the token
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        else:
            return


@pytest.mark.timeout(400)
def test_a_submitted_job_trains_to_its_end(tmp_path: Path) -> None:
    write_corpus(tmp_path / "reviews.csv")
    with running_ray(tmp_path) as (address, environment):
        ended = subprocess.run(
            [
                *(RAY, "job", "submit", "--address", address, "--working-dir", ".", "--"),
                *("python", "-m", "cluster", "train", "examples/reviews.yaml", f"run.storage={tmp_path / 'runs'}"),
                *(f"data.sources.0.path={tmp_path / 'reviews.csv'}", f"train.steps={STEPS}"),
                *("data.tokenizer.train.vocab_size=400", "train.eval.max_batches=2", "train.schedule.warmup_steps=2"),
            ],
            cwd=ROOT,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    folder = RunFolder(str(tmp_path / "runs" / "reviews-gpt"))
    assert len(step_records(folder)) == STEPS
    assert folder.events()[-1]["state"] == "finished"
    started = next(event for event in folder.events() if event["event"] == "attempt_started")
    assert (started["dp"], started["pp"]) == (2, 2)
    assert (Path(folder.export_uri(STEPS)) / "model.safetensors").exists()


@pytest.mark.timeout(200)
def test_starting_local_nodes_inside_a_job_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "reviews.csv")
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "cluster", "train", "examples/reviews.yaml", "cluster.address=local"),
            *(f"run.storage={tmp_path / 'runs'}", f"data.sources.0.path={tmp_path / 'reviews.csv'}"),
        ],
        cwd=ROOT,
        env={**os.environ, "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"},
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 2, ended.stderr
    assert "cluster.address=local inside a Ray job" in ended.stderr
