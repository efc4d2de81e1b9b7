"""`python -m data_service control|worker` as real processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_service.access import DataAccess
from data_service.client import DataClient
from tests.helpers.data_runs import read_hashes, small_order
from tests.helpers.waiting import until
from tests.helpers.written_datasets import WrittenDataset, stream_dataset

SECRET = "5f2c1d9a7b3e4f60" * 4


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenDataset:
    return stream_dataset(tmp_path_factory.mktemp("commands") / "d")


@contextlib.contextmanager
def command(
    log: Path, *arguments: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], dict[str, object]]]:
    """A process, and the line of JSON that it prints; its log goes to a file."""
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "data_service", *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **environment},
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            yield process, json.loads(line)
        finally:
            process.kill()
            process.communicate()


def test_a_service_of_plain_processes_serves_a_client_and_ends_on_sigterm(
    written: WrittenDataset, tmp_path: Path
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(SECRET + "\n")
    logs = [tmp_path / name for name in ("control.log", "one.log", "two.log")]
    dataset = ("--dataset", written.uri)
    with (
        command(logs[0], "control", *dataset, "--metrics-port", "0", STORMJIB_DATA_TOKEN=SECRET) as (control, at),
        command(logs[1], "worker", *dataset, "--control", str(at["address"]), "--token-file", str(token_file)) as (
            worker,
            one,
        ),
        command(
            logs[2],
            "worker",
            *dataset,
            *("--control", str(at["address"]), "--digest", written.manifest.digest, "--metrics-port", "0"),
            STORMJIB_DATA_TOKEN=SECRET,
        ) as (second, two),
    ):
        assert (at["role"], one["role"], two["role"]) == ("control", "worker", "worker")
        assert one["metrics_address"] is None
        access = DataAccess((str(at["address"]),), SECRET, small_order(), written.manifest.digest)
        client = DataClient(access)
        try:
            plan = client.plan("train")
            assert read_hashes(client, 0, 6, 2) == [written.hash_of_step(plan, step) for step in range(6)]
        finally:
            client.close()
        for address, sign in (
            (at["metrics_address"], 'stormjib_data_control_workers{state="alive"} 2.0'),
            (two["metrics_address"], "stormjib_data_worker_tickets_total"),
        ):
            request = urllib.request.Request(f"http://{address}/metrics", headers={"Authorization": f"Bearer {SECRET}"})
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
                assert sign in answer.read().decode()
        processes = (worker, second, control)
        for process in processes:
            assert SECRET not in " ".join(psutil.Process(process.pid).cmdline())
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    for log in logs:
        assert SECRET not in log.read_text()
        assert "Traceback" not in log.read_text()


def test_a_worker_starts_before_its_control_plane(written: WrittenDataset, tmp_path: Path) -> None:
    first, second = tmp_path / "control.log", tmp_path / "worker.log"
    dataset = ("--dataset", written.uri)
    with command(first, "control", *dataset, STORMJIB_DATA_TOKEN=SECRET) as (control, at):
        control.terminate()
        assert control.wait(20) == 0
        with (
            command(second, "worker", *dataset, "--control", str(at["address"]), STORMJIB_DATA_TOKEN=SECRET),
            command(
                first,
                "control",
                *(*dataset, "--port", str(at["address"]).rpartition(":")[2]),
                STORMJIB_DATA_TOKEN=SECRET,
            ),
        ):
            assert "does not answer yet" in second.read_text()
            access = DataAccess((str(at["address"]),), SECRET, small_order(), written.manifest.digest, stalled_s=20.0)
            client = DataClient(access)
            try:
                plan = client.plan("train")
                until(lambda: read_hashes(client, 0, 1, 1) == [written.hash_of_step(plan, 0)], "the worker serves")
            finally:
                client.close()


@pytest.mark.parametrize(
    ("arguments", "token", "told"),
    [
        (["control", "--dataset", "NOWHERE"], SECRET, "manifest.json"),
        (["control", "--dataset", "DATASET"], "", "STORMJIB_DATA_TOKEN"),
        (["control", "--dataset", "DATASET"], "short", "16"),
        (["control", "--dataset", "DATASET", "--token-file", "NOWHERE"], SECRET, "cannot be read"),
        (["control", "--dataset", "DATASET", "--digest", "0123"], SECRET, "0123"),
        (["control", "--dataset", "DATASET", "--host", "0.0.0.0"], SECRET, "--host"),
        (["control", "--dataset", "DATASET", "--host", "192.0.2.1"], SECRET, "192.0.2.1"),
        (["control", "--dataset", "DATASET", "--port", "70000"], SECRET, "--port"),
        (["worker", "--dataset", "DATASET"], SECRET, "--control"),
        (["worker", "--dataset", "DATASET", "--control", "nonsense"], SECRET, "nonsense"),
        (["worker", "--dataset", "DATASET", "--control", "a:1", "--cache-bytes", "0"], SECRET, "--cache-bytes"),
        (["worker", "--dataset", "DATASET", "--control", "127.0.0.1:1", "--host", "192.0.2.1"], SECRET, "192.0.2.1"),
        (["other"], SECRET, "other"),
    ],
)
def test_mistakes_end_with_code_2_and_say_what_is_wrong(
    written: WrittenDataset, tmp_path: Path, arguments: list[str], token: str, told: str
) -> None:
    paths = {"DATASET": written.uri, "NOWHERE": str(tmp_path / "nowhere")}
    done = subprocess.run(
        [sys.executable, "-m", "data_service", *(paths.get(one, one) for one in arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "STORMJIB_DATA_TOKEN": token},
    )
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not token or token not in done.stderr


def test_a_worker_with_another_token_is_refused(written: WrittenDataset, tmp_path: Path) -> None:
    with command(tmp_path / "log", "control", "--dataset", written.uri, STORMJIB_DATA_TOKEN=SECRET) as (_, at):
        done = subprocess.run(
            [sys.executable, "-m", "data_service", "worker", "--dataset", written.uri, "--control", str(at["address"])],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "STORMJIB_DATA_TOKEN": "another" * 5},
        )
    assert done.returncode == 2
    assert "UNAUTHENTICATED" in done.stderr
    assert "another" * 5 not in done.stderr
