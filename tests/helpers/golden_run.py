"""Makes a small run to keep: what a release wrote, so that later ones can show that they go on from it.

    python -m tests.helpers.golden_run tests/golden/run_NAME

The folder holds a run file, its corpus, the run as it lay on the disk after step 4 (configuration, journals, dataset,
checkpoint), and `expected.json`: steps 5 to 8 as that release went on. Paths and names of the machine are replaced.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.row_service import write_corpus
from tests.helpers.runs import ROOT, read_json_lines

KEPT_STEP = 4
_ELSEWHERE = "/home/somebody/golden"
_DROPPED = (".lock", "logs", "export", "tensorboard", "checkpoints/step_00000008")
_RUN = """\
run: {name: golden, storage: ., seed: 3}
cluster: {address: local, nodes: 1, node: {slots: 2}}
data:
  sources: [{path: corpus.csv}]
  tokenizer: {train: {vocab_size: 300}}
  seq_len: 32
  shard_tokens: 4096
  shuffle_window_shards: 2
  split: {eval: 0.1}
model: {d_model: 8, num_layers: 2, num_heads: 2, num_kv_heads: 1}
train:
  parallel: {dp: 2, pp: 1}
  global_batch: 8
  steps: 8
  optimizer: {lr: 5.0e-3}
  schedule: {name: wsd, warmup_steps: 2}
  eval: {max_batches: 2}
  checkpoint: {every: 4, keep_last: 3}
"""


def make(target: Path) -> None:
    """Train eight steps, and keep what was there after the fourth."""
    with tempfile.TemporaryDirectory() as made:
        here = Path(made)
        write_corpus(here / "corpus.csv", 120, seed=5)
        (here / "run.yaml").write_text(_RUN)
        subprocess.run([sys.executable, "-m", "cluster", "train", str(here / "run.yaml")], cwd=ROOT, check=True)
        run = here / "golden"
        steps = [one for one in read_json_lines(run / "metrics.jsonl") if one["step"] > KEPT_STEP]
        (here / "expected.json").write_text(json.dumps([one for one in steps if "loss" in one], indent=1) + "\n")
        _cut(run / "metrics.jsonl", lambda one: one["step"] <= KEPT_STEP)
        _cut(run / "events.jsonl", lambda one: one.get("step", 0) <= KEPT_STEP and one["state"] != "finished")
        for name in _DROPPED:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in [*run.rglob("*.json"), *run.rglob("*.jsonl"), *run.rglob("*.yaml")]:
            path.write_text(_without_machine(path.read_text(), made))
        shutil.copytree(here, target)


def _cut(path: Path, keep) -> None:  # type: ignore[no-untyped-def]
    path.write_text("".join(json.dumps(one) + "\n" for one in read_json_lines(path) if keep(one)))


def _without_machine(text: str, made: str) -> str:
    import socket

    return text.replace(made, _ELSEWHERE).replace(f'"{socket.gethostname()}"', '"somewhere"')


if __name__ == "__main__":
    make(Path(sys.argv[1]))
