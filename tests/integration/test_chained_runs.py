"""The story of two files: pre-train, then fine-tune a classifier from the best checkpoint, through the command line."""

import csv
import json
import random
from pathlib import Path

import pytest

from cluster.commands.status import status_of
from cluster.config import load_config
from cluster.run_store import RunFolder
from tests.helpers.runs import running
from trainer.adapters import base_of
from trainer.export import read_provenance
from trainer.manifest import read_manifest

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

STEPS = 40
SHARED = f"""
cluster: {{address: local, nodes: 1, node: {{slots: 2}}}}
train:
  global_batch: 16
  steps: {STEPS}
  eval: {{every: 20}}
  checkpoint: {{every: 20}}
  optimizer: {{lr: 5.0e-3}}
"""


def write_files(folder: Path) -> tuple[Path, Path]:
    """Both files, and the reviews beside them."""
    draw = random.Random(2)
    words = {"calm": ["still", "mild", "warm", "blue"], "rough": ["gale", "wild", "grey", "torn"]}
    with (folder / "weather.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(300):
            label = draw.choice(["calm", "rough"])
            told = draw.choices(["sea", "sky", "wind", "day"], k=3) + draw.choices(words[label], k=4)
            draw.shuffle(told)
            writer.writerow([f"{' '.join(told)} {number}", label])
    first, second = folder / "first.yaml", folder / "second.yaml"
    first.write_text(
        """
run: {name: first, storage: ./runs, seed: 1}
data:
  sources: [{path: weather.csv}]
  tokenizer: {train: {vocab_size: 320}}
  seq_len: 48
  split: {eval: 0.2}
model: {d_model: 32, num_layers: 2, num_heads: 2}
"""
        + SHARED
    )
    second.write_text(
        """
run: {name: second, storage: ./runs, seed: 1}
data:
  sources: [{path: weather.csv, label: label}]
  tokenizer: {path: "run://first"}
  rows: document
  seq_len: 48
  split: {eval: 0.2}
model: {from: "run://first@best"}
"""
        + SHARED
        + "  task: text_classification\n  parallel: {dp: 1, pp: 2}\n"
    )
    return first, second


def test_a_classifier_starts_from_the_best_of_another_run(tmp_path: Path) -> None:
    first, second = write_files(tmp_path)
    with running("train", second) as early:
        assert early.wait() == 2
        assert "there is no run in" in early.output
    with running("train", first) as run:
        assert run.wait() == 0, run.output
    with running("train", second) as run:
        assert run.wait() == 0, run.output
    config = load_config(second)
    folder = RunFolder(config.root)
    base = read_provenance(f"{folder.root}/base")
    assert base is not None
    losses = RunFolder(load_config(first).root).history().evals
    assert base.step == min((step for step in losses if step), key=lambda step: losses[step]["loss"])
    status = status_of(folder)
    assert status["evals"][STEPS]["metrics"]["macro_f1"] > 0.9
    state = read_manifest(folder.checkpoints_uri, STEPS).state
    assert state.evaluation is not None
    assert state.evaluation.metrics == status["evals"][STEPS]["metrics"]
    assert (state.task, state.labels) == ("text_classification", ("calm", "rough"))
    described = json.loads(Path(status["exported"], "config.json").read_text())
    assert described["id2label"] == {"0": "calm", "1": "rough"}
    with running("status", second) as shown:
        assert shown.wait() == 0
        assert "as calm" in shown.output
        assert "macro_f1" in shown.output


def test_adapters_name_the_weights_that_the_controller_read(tmp_path: Path) -> None:
    first, second = write_files(tmp_path)
    with running("train", first) as run:
        assert run.wait() == 0, run.output
    adapted = ("run.name=adapted", "train.lora.rank=4")
    with running("train", second, *adapted, f"train.steps={STEPS // 2}") as run:
        assert run.wait() == 0, run.output
    folder = RunFolder(load_config(second, adapted).root)
    base = base_of(f"{folder.root}/base")
    assert read_manifest(folder.checkpoints_uri, STEPS // 2).state.base == base
    with running("train", second, *adapted) as run:
        assert run.wait() == 0, run.output
        assert f"from the checkpoint of step {STEPS // 2}" in run.output
    assert read_manifest(folder.checkpoints_uri, STEPS).state.base == base
