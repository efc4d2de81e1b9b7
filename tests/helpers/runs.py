"""A real run in a process of its own, followed from outside through its folder."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster.config import load_config
from cluster.run_store import RunFolder

ROOT = Path(__file__).resolve().parents[2]

WORDS = [
    "sail", "wind", "sea", "storm", "jib", "mast", "rope", "harbour", "tide", "wave", "keel", "deck", "gale", "anchor",
    "船", "海", "风", "帆", "浪", "港", "潮", "绳", "舵", "锚",
]  # fmt: skip


def write_corpus(path: Path, documents: int = 400, seed: int = 7) -> None:
    """A CSV of short documents that a small model can learn something from."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for index in range(documents):
            words = draw.choices(WORDS, weights=range(len(WORDS), 0, -1), k=draw.randint(20, 60))
            file.write(f"{' '.join(words)} {index},{index % 2}\n")


def write_run(folder: Path, *, name: str = "small", nodes: int = 1, slots: int = 2, train: str = "") -> Path:
    """A run file over a corpus beside it; `train` is YAML below `train`."""
    write_corpus(folder / "corpus.csv")
    path = folder / "run.yaml"
    path.write_text(
        f"""
run: {{name: {name}, storage: ./runs, seed: 3}}
cluster: {{address: local, nodes: {nodes}, node: {{slots: {slots}}}}}
data:
  sources: [{{path: corpus.csv}}]
  tokenizer: {{train: {{vocab_size: 400}}}}
  seq_len: 32
  shard_tokens: 4096
  shuffle_window_shards: 2
  split: {{eval: 0.1}}
  service: {{stalled_s: 20}}
model: {{d_model: 32, num_layers: 2, num_heads: 2}}
train:
  global_batch: 8
  optimizer: {{lr: 3.0e-3}}
  schedule: {{name: constant}}
{train}
serve: {{port: 0}}
""",
        encoding="utf-8",
    )
    return path


class RunProcess:
    """`python -m cluster …` and the folder it writes."""

    def __init__(
        self, command: str, file: Path, overrides: Sequence[str] = (), *, env: dict[str, str] | None = None
    ) -> None:
        self.folder = RunFolder(load_config(file, list(overrides)).root)
        self.log_path = file.parent / f"{command}.log"
        self._log = self.log_path.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster", command, str(file), *overrides],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def until(self, condition: Callable[[], Any], what: str, deadline_s: float = 120.0) -> Any:
        """Wait until `condition` gives something true; fails when the process ends or the deadline passes before."""
        deadline = time.monotonic() + deadline_s
        while True:
            found = condition()
            if found:
                return found
            assert self.process.poll() is None, (
                f"ended with {self.process.returncode} before {what}:\n{self.output[-6000:]}"
            )
            assert time.monotonic() < deadline, f"no {what} within {deadline_s} s:\n{self.output[-6000:]}"
            time.sleep(0.05)

    def events(self, name: str) -> list[dict[str, Any]]:
        """All events of that name."""
        return [event for event in self.folder.events() if event["event"] == name]

    def until_step(self, step: int, deadline_s: float = 120.0) -> None:
        """Wait until this optimizer step is recorded."""
        self.until(lambda: self.folder.history().last_step >= step, f"step {step}", deadline_s)

    def until_event(self, name: str, count: int = 1, deadline_s: float = 120.0) -> dict[str, Any]:
        """Wait for the `count`-th event of that name."""
        found = self.until(lambda: len(self.events(name)) >= count and self.events(name), name, deadline_s)
        return found[count - 1]

    def node_of_rank(self, rank: int) -> str:
        """The node that holds a rank in the newest attempt."""
        return next(item["node_id"] for item in self.events("attempt_started")[-1]["ranks"] if item["rank"] == rank)

    def kill_node(self, node_id: str) -> float:
        """SIGKILL the raylet and all below it, from outside; returns the moment."""
        pid = next(node["pid"] for node in self.events("nodes_ready")[-1]["nodes"] if node["node_id"] == node_id)
        victims = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        moment = time.monotonic()
        for victim in victims:
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
        return moment

    def wait(self, deadline_s: float = 180.0) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline_s} s:\n{self.output[-6000:]}") from None

    def end(self) -> None:
        """Whatever happened in a test: nothing of the run stays."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(timeout=20)
        self._log.close()


@contextmanager
def running(command: str, file: Path, *overrides: str, env: dict[str, str] | None = None) -> Iterator[RunProcess]:
    """A run that is ended when the block is left."""
    run = RunProcess(command, file, overrides, env=env)
    try:
        yield run
    finally:
        run.end()


def processes_of(marker: str) -> list[str]:
    """Command lines of live processes that carry `marker` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("STORMJIB_TEST_MARKER") == marker:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def step_records(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """The step records that count, by step; fails when a step is there twice."""
    records = folder.history().steps
    by_step = {int(record["step"]): record for record in records}
    assert len(by_step) == len(records), "a step is recorded twice"
    assert sorted(by_step) == list(range(1, len(by_step) + 1)), "a step is missing"
    return by_step


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
