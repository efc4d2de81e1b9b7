"""Tasks: losses and metrics against figures worked out by hand, and how a task is found."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from data_service.errors import ConfigError
from data_service.schema import NO_ROW, BatchSlice
from tests.helpers.peer_models import make_peer, peer_tokens
from trainer.batching import count_tokens, micro_batches
from trainer.config import TrainConfig
from trainer.hf import build_from_hf
from trainer.layers import Projection
from trainer.losses import IGNORED
from trainer.tasks.base import Task
from trainer.tasks.facts import TaskFacts
from trainer.tasks.make import make_task
from trainer.tasks.rows import TaskRows
from trainer.tasks.sft import SupervisedFineTuning
from trainer.tasks.text_classification import TextClassification, classification_metrics
from trainer.topology import BatchLayout

CPU = torch.device("cpu")
FACTS = TaskFacts(labels=("bad", "good"), label_rows=(30, 10))


def train_config(task: str, **more: object) -> TrainConfig:
    return TrainConfig.model_validate({"task": task, **more})


def class_rows(lengths: list[int], classes: list[int], width: int = 6) -> BatchSlice:
    """Rows of one text each; a length of 0 is a masked slot."""
    num_rows = len(lengths)
    tokens = np.zeros((num_rows, width), dtype=np.uint16)
    for row, length in enumerate(lengths):
        tokens[row, :length] = np.arange(1, length + 1)
    there = np.array(lengths) > 0
    return BatchSlice(
        index=0,
        slots=(0, num_rows),
        tokens=tokens,
        length=np.array(lengths, dtype=np.uint32),
        start_rows=np.flatnonzero(there).astype(np.uint32),
        start_places=np.zeros(int(there.sum()), dtype=np.uint32),
        isolate_documents=False,
        answer_bits=None,
        labels=np.array(classes, dtype=np.int32),
        row_id=np.where(there, np.arange(num_rows, dtype=np.uint64), NO_ROW),
        row_crc=np.zeros(num_rows, dtype=np.uint32),
    )


def test_metrics_of_a_confusion_matrix_by_hand() -> None:
    """Ten rows of a, five of b, none of c; c is predicted once, d never occurs."""
    confusion = torch.tensor([[8, 1, 1, 0], [3, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = classification_metrics(confusion, ("a", "b", "c", "d"))
    assert found["accuracy"] == pytest.approx(10 / 15)
    assert found["precision/a"] == pytest.approx(8 / 11)
    assert found["recall/a"] == pytest.approx(8 / 10)
    assert found["f1/a"] == pytest.approx(16 / 21)
    assert found["precision/b"] == pytest.approx(2 / 3)
    assert found["recall/b"] == pytest.approx(2 / 5)
    assert found["f1/b"] == pytest.approx(4 / 8)
    assert (found["precision/c"], found["recall/c"], found["f1/c"]) == (0.0, 0.0, 0.0)
    assert found["macro_f1"] == pytest.approx((16 / 21 + 4 / 8 + 0) / 3), "d is neither true nor predicted anywhere"
    assert found["macro_precision"] == pytest.approx((8 / 11 + 2 / 3) / 3)
    assert found["macro_recall"] == pytest.approx((8 / 10 + 2 / 5) / 3)
    assert found["confusion/b/a"] == 3.0
    assert len([name for name in found if name.startswith("confusion/")]) == 16


def test_a_matrix_of_many_classes_keeps_to_the_means() -> None:
    found = classification_metrics(torch.eye(200, dtype=torch.int64), tuple(map(str, range(200))))
    assert found == {"accuracy": 1.0, "macro_precision": 1.0, "macro_recall": 1.0, "macro_f1": 1.0}


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_loss_of_classes_is_the_weighted_mean_on_every_cut(micro_batch: int) -> None:
    """Rows without a class and masked slots count nowhere; a class weight scales its rows, not the mean."""
    task = make_task(
        train_config("text_classification", classification={"class_weights": {"bad": 0.5, "good": 3.0}}), FACTS
    )
    rows = class_rows([6, 3, 4, 0], [1, 0, -1, -1])
    assert task.count(rows) == 2
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    layout = BatchLayout(4, 1, 1, micro_batch)
    sums, losses = task.zeros(), []
    for index, (_, targets) in enumerate(micro_batches(task, rows, layout, task.count(rows), CPU)):
        part = logits[index * micro_batch : (index + 1) * micro_batch]
        losses.append(float(task.loss(part, targets)) / layout.num_micro_batches)
        for name, seen in task.observe(part, targets).items():
            sums[name] += seen
    plain = F.cross_entropy(logits[:2], torch.tensor([1, 0]), reduction="none")
    assert sum(losses) == pytest.approx(float((3.0 * plain[0] + 0.5 * plain[1]) / 2), rel=1e-6)
    assert int(sums["confusion"].sum()) == 2
    assert sums["confusion"][1, int(logits[0].argmax())] == 1
    assert task.metrics(sums)["accuracy"] == float((logits[:2].argmax(1) == torch.tensor([1, 0])).float().mean())


def test_rows_to_classify_say_where_their_padding_is() -> None:
    task = make_task(train_config("text_classification"), FACTS)
    rows = class_rows([6, 3, 0], [1, 0, -1])
    assert count_tokens(rows) == 5 + 2
    ((inputs, targets),) = micro_batches(task, rows, BatchLayout(3, 1, 1, 3), 2, CPU)
    _, positions, doc_ids = inputs
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert doc_ids.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert targets[1].tolist() == [0.5, 0.5, 0.0]


def test_balanced_weights_make_classes_equal_and_keep_the_mean() -> None:
    task = make_task(train_config("text_classification", classification={"class_weights": "balanced"}), FACTS)
    assert isinstance(task, TextClassification)
    bad, good = task.class_weights
    assert bad * 30 == pytest.approx(good * 10)
    assert (bad * 30 + good * 10) / 40 == pytest.approx(1.0)


def test_a_batch_without_a_class_has_no_loss_and_no_gradient() -> None:
    task = make_task(train_config("text_classification"), FACTS)
    rows = class_rows([4, 0], [-1, -1])
    ((_, targets),) = micro_batches(task, rows, BatchLayout(2, 1, 1, 2), task.count(rows), CPU)
    logits = torch.randn(2, 2, requires_grad=True)
    loss = task.loss(logits, targets)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0.0


def test_sft_learns_the_answers_alone() -> None:
    """The loss is the mean over the counted labels, as plain cross-entropy over them is; so is the token accuracy."""
    draw = torch.Generator().manual_seed(2)
    hidden, matrix = torch.randn(2, 5, 8, generator=draw), torch.randn(11, 8, generator=draw)
    tokens = torch.randint(0, 11, (2, 6), generator=draw)
    counted = torch.tensor([[False, True, True, False, True], [False, False, False, True, False]])
    task = make_task(train_config("sft"), TaskFacts(loss_masks=True))
    targets = task.targets(TaskRows(tokens, counted, None), 1 / 4)
    outputs = Projection(hidden, matrix)
    logits, labels = (hidden @ matrix.T)[counted], tokens[:, 1:][counted]
    assert float(task.loss(outputs, targets)) == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    sums = task.observe(outputs, targets)
    assert int(sums["counted"]) == 4
    expected = float((logits.argmax(1) == labels).float().mean())
    assert task.metrics(sums) == {"token_accuracy": pytest.approx(expected)}
    assert (targets[0] == IGNORED).sum() == 6


def test_sft_has_the_loss_of_transformers_on_the_same_labels(tmp_path: Path) -> None:
    theirs = make_peer("llama_tied", tmp_path)
    ours = build_from_hf(str(tmp_path), "cpu", torch.float32)
    tokens = peer_tokens(rows=3)
    counted = torch.rand(3, tokens.shape[1] - 1, generator=torch.Generator().manual_seed(3)) < 0.4
    task = make_task(train_config("sft"), TaskFacts(loss_masks=True))
    labels = tokens.clone()
    labels[:, 1:][~counted] = IGNORED
    labels[:, 0] = IGNORED
    with torch.no_grad():
        found = task.loss(
            ours.outputs(tokens[:, :-1]), task.targets(TaskRows(tokens, counted, None), 1 / int(counted.sum()))
        )
        assert float(found) == pytest.approx(float(theirs(input_ids=tokens, labels=labels).loss), rel=1e-5)


@pytest.mark.parametrize(
    ("task", "facts", "said"),
    [
        ("sft", TaskFacts(), "data.sources.N.messages"),
        ("text_classification", TaskFacts(), "the dataset has 0 classes"),
        ("text_classification", TaskFacts(labels=("only",)), "the dataset has 1 classes"),
        ("tests.unit.test_trainer_tasks:Nowhere", TaskFacts(), "Nowhere"),
        ("tests.no_such_module:Task", TaskFacts(), "no_such_module"),
        ("tests.unit.test_trainer_tasks:HalfATask", TaskFacts(), "lacks metric, better, num_labels"),
    ],
)
def test_a_task_that_does_not_fit_is_named(task: str, facts: TaskFacts, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_task(train_config(task), facts)


class Raises:
    """A user's own task with a mistake."""

    def __init__(self, train: TrainConfig, facts: TaskFacts) -> None:
        raise KeyError("vocabulary")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("tests.unit.test_trainer_tasks:Raises", "making it raised KeyError: 'vocabulary'"),
        ("tests.unit.test_trainer_tasks:CPU", "making it raised TypeError"),
        ("users_garbled:Mine", "importing its module raised SyntaxError"),
        ("users_raising:Mine", "importing its module raised ZeroDivisionError"),
    ],
)
def test_what_a_users_task_raises_is_named_with_its_path(
    task: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_garbled.py").write_text("class Mine(:")
    (tmp_path / "users_raising.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=f"train.task={task}: {said}"):
        make_task(train_config(task), FACTS)


def test_the_example_of_a_task_says_what_its_data_lack() -> None:
    config = train_config("examples.ordinal_task:OrdinalClasses")
    with pytest.raises(ConfigError, match=r"the dataset has 0 classes.*data.sources.N.label"):
        make_task(config, TaskFacts())
    task = make_task(config, FACTS)
    assert task.num_labels == 2
    with pytest.raises(ConfigError, match="data.rows=document"):
        task.targets(TaskRows(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool), None), 1.0)


@pytest.mark.parametrize("weights", [{"bad": 1.0}, {"bad": 1.0, "good": 1.0, "odd": 1.0}])
def test_weights_of_other_classes_are_named(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="the classes are bad, good"):
        make_task(train_config("text_classification", classification={"class_weights": weights}), FACTS)


def test_a_name_that_is_no_task_is_refused() -> None:
    with pytest.raises(ValidationError):
        train_config("text_clasification")


class HalfATask:
    """Lacks nearly everything."""

    def __init__(self, train: TrainConfig, facts: TaskFacts) -> None:
        self.facts = facts

    def count(self) -> int:
        return 0


class LineLengths(SupervisedFineTuning):
    """A user's own task."""

    def __init__(self, train: TrainConfig, facts: TaskFacts) -> None:
        super().__init__()
        object.__setattr__(self, "facts", facts)


def test_a_users_own_task_is_made_with_configuration_and_facts() -> None:
    task = make_task(train_config("tests.unit.test_trainer_tasks:LineLengths"), FACTS)
    assert isinstance(task, Task)
    assert task.facts == FACTS  # type: ignore[attr-defined]
