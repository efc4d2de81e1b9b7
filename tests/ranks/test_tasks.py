"""Classes and chats on meshes: every cut trains like a plain loop over single rows."""

import contextlib
import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_service.client import DataClient
from data_service.config import DataConfig
from data_service.counts import read_counts
from tests.helpers.initial_weights import initialise
from tests.helpers.row_service import RowService, served
from tests.ranks.conftest import GLOBAL_BATCH, SEED, SEQ_LEN, Case, Lab
from trainer import manifest
from trainer.config import ModelConfig
from trainer.export import export_checkpoint
from trainer.model import Transformer, TransformerConfig
from trainer.optim import group_parameters, lr_at, make_optimizer, set_lr
from trainer.protocol import WorkerSpec
from trainer.tasks.facts import TaskFacts
from trainer.tasks.text_classification import classification_metrics

STEPS = 8
WEIGHTS = {"calm": 0.5, "rough": 2.0}
WORDS = {"calm": ("still", "mild", "warm", "blue"), "rough": ("gale", "wild", "grey", "torn")}


@dataclass
class Classes:
    """A dataset with two classes, served."""

    lab: Lab
    service: RowService

    def spec(self, case: Case, checkpoints: Path, family: str = "llama") -> WorkerSpec:
        spec = self.lab.changed(
            case,
            checkpoints,
            task="text_classification",
            classification={"class_weights": WEIGHTS},
            steps=STEPS,
            optimizer={"lr": 3e-3, "grad_clip": 1.0},
        )
        labels = self.service.manifest.labels
        (counts,) = read_counts(str(self.service.dataset), 0)
        return replace(
            spec,
            data=self.service.access,
            vocab_size=self.service.manifest.vocab_size,
            facts=TaskFacts(labels, tuple(counts.labels["train"][label] for label in labels)),
            model=ModelConfig.model_validate({"family": family, "d_model": 32, "num_layers": 2, "num_heads": 4}),
        )


@pytest.fixture(scope="module")
def classes(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Classes]:
    folder = tmp_path_factory.mktemp("classes")
    draw = random.Random(3)
    with (folder / "weather.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(120):
            label = "rough" if number % 4 == 0 else "calm"
            words = draw.choices(["sea", "sky", "wind", "day"], k=draw.randint(1, 8))
            writer.writerow([f"{number} {' '.join(words)} {draw.choice(WORDS[label])}", label])
    config = DataConfig.model_validate(
        {
            "sources": [{"path": str(folder / "weather.csv"), "label": "label"}],
            "tokenizer": {"train": {"vocab_size": 320}},
            "rows": "document",
            "seq_len": SEQ_LEN,
            "split": {"eval": 0.2},
        }
    )
    with served(config, folder / "dataset", GLOBAL_BATCH, SEED) as service:
        yield Classes(lab, service)


@dataclass
class Plain:
    """What a plain loop saw."""

    losses: list[float]
    metrics: dict[str, float]
    model: Transformer


def one_by_one(spec: WorkerSpec) -> Plain:
    """Train without meshes, padding or micro-batches: each row alone, unpadded."""
    labels = spec.facts.labels
    config = TransformerConfig.from_section(spec.model, spec.vocab_size, spec.seq_len, len(labels))
    model = Transformer(config)
    initialise(model.named_parameters(), spec.seed, config)
    optimizer = make_optimizer(group_parameters(model.named_parameters(), spec.train.optimizer), spec.train.optimizer)

    def logits(rows: Any, slot: int) -> torch.Tensor:
        length = min(int(rows.length[slot]), spec.seq_len)
        return model(torch.from_numpy(rows.tokens[slot, :length].astype("int64"))[None])

    losses = []
    confusion = torch.zeros(len(labels), len(labels), dtype=torch.int64)
    with contextlib.closing(DataClient(spec.data)) as client:
        for rows in client.stream("train", 0, STEPS, (0, GLOBAL_BATCH)):
            each = [
                WEIGHTS[labels[rows.labels[slot]]]
                * F.cross_entropy(logits(rows, slot), torch.tensor([int(rows.labels[slot])]))
                for slot in range(GLOBAL_BATCH)
            ]
            loss = torch.stack(each).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.train.optimizer.grad_clip)
            set_lr(optimizer, lr_at(rows.index, spec.train))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        with torch.no_grad():
            for rows in client.stream("eval", 0, client.plan("eval").num_batches, (0, GLOBAL_BATCH)):
                for slot in range(GLOBAL_BATCH):
                    if rows.rows[slot]:
                        confusion[rows.labels[slot], logits(rows, slot).argmax()] += 1
    return Plain(losses, classification_metrics(confusion, labels), model)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_classes_are_learned_alike_on_every_mesh(classes: Classes, family: str, tmp_path: Path) -> None:
    plain = one_by_one(classes.spec(Case(1, 1), tmp_path, family))
    cases = [Case(1, 1), Case(2, 1, zero=3), Case(1, 2)] if family == "llama" else [Case(2, 1), Case(1, 2)]
    for case in cases:
        outcome = classes.lab.run(classes.spec(case, tmp_path / str(case), family))
        assert [outcome.steps[step].loss for step in range(1, STEPS + 1)] == pytest.approx(plain.losses, rel=2e-3)
        found = outcome.evals[STEPS]
        assert found.metrics == pytest.approx(plain.metrics, rel=1e-6)
        assert (found.metric, found.better) == ("macro_f1", "higher")
        assert found.perplexity is None
        assert found.tokens == sum(value for name, value in plain.metrics.items() if name.startswith("confusion/"))


def test_a_classifier_is_exported_with_its_classes(classes: Classes, tmp_path: Path) -> None:
    import transformers

    spec = classes.spec(Case(1, 2), tmp_path / "checkpoints")
    plain = one_by_one(spec)
    classes.lab.run(spec)
    state = manifest.read_manifest(spec.checkpoints_uri, STEPS).state
    assert state.task == "text_classification"
    assert state.evaluation is not None
    assert state.evaluation.metrics["macro_f1"] == plain.metrics["macro_f1"]
    export_checkpoint(spec.checkpoints_uri, STEPS, str(tmp_path / "export"), str(classes.service.dataset / "tokenizer"))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    assert theirs.config.id2label == {0: "calm", 1: "rough"}
    assert theirs.config.label2id == {"calm": 0, "rough": 1}
    tokens = torch.randint(0, spec.vocab_size, (1, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert theirs(tokens).logits.numpy() == pytest.approx(plain.model(tokens).numpy(), abs=2e-3)


@pytest.mark.parametrize("case", [Case(2, 2)], ids=str)
def test_a_users_own_task_is_trained_and_judged(classes: Classes, case: Case, tmp_path: Path) -> None:
    """With two classes the expected number is the share of the second; the loss its squared distance."""
    spec = classes.spec(case, tmp_path / "checkpoints")
    train = spec.train.model_copy(update={"task": "examples.ordinal_task:OrdinalClasses"})
    outcome = classes.lab.run(replace(spec, train=train))
    config = TransformerConfig.from_section(spec.model, spec.vocab_size, spec.seq_len, 2)
    model = Transformer(config)
    initialise(model.named_parameters(), spec.seed, config)
    squares, distances = [], []
    with contextlib.closing(DataClient(spec.data)) as client, torch.no_grad():
        for rows in client.stream("eval", 0, client.plan("eval").num_batches, (0, GLOBAL_BATCH)):
            assert rows.labels is not None
            for slot in np.flatnonzero(rows.rows):
                tokens = torch.from_numpy(rows.tokens[slot, : int(rows.length[slot])].astype("int64"))
                share = float(model(tokens[None]).softmax(dim=-1)[0, 1])
                distances.append(abs(share - int(rows.labels[slot])))
                squares.append(distances[-1] ** 2)
    first = outcome.evals[0]
    assert first.loss == pytest.approx(sum(squares) / len(squares), rel=1e-3)
    assert first.metrics == {"mean_distance": pytest.approx(sum(distances) / len(distances), rel=1e-3)}
    assert (first.metric, first.better) == ("mean_distance", "lower")
    assert outcome.evals[STEPS].loss < first.loss
