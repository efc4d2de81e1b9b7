"""The `text_classification` task: the class of a row.

Owns the loss over classes and what is said of a classifier: accuracy, precision, recall and F1 of each class and their
means, and the confusion matrix. A row is one text; one that has no class counts nowhere. One optimizer step is the mean
over the N rows with a class of the global batch, each times the weight of its class.

Shape letters: B rows, C classes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from data_service.errors import ConfigError
from data_service.schema import NO_LABEL, BatchSlice
from trainer.config import ClassificationConfig
from trainer.tasks.base import Outputs, Sums, Targets
from trainer.tasks.facts import TaskFacts
from trainer.tasks.rows import TaskRows

__all__ = ["TextClassification", "classification_metrics"]

_UNLABELLED = -100
_MAX_NAMED = 100
"""With more classes, metrics of each class are left out."""
_MAX_CONFUSION = 32
"""With more classes, the confusion matrix is left out of the metrics."""


@dataclass(frozen=True)
class TextClassification:
    """Classes of rows."""

    labels: tuple[str, ...]
    class_weights: tuple[float, ...]
    """What the loss of a row counts, by its class."""
    metric: str = "macro_f1"

    @classmethod
    def of(cls, config: ClassificationConfig, facts: TaskFacts) -> "TextClassification":
        """The task on a dataset.

        Raises:
            ConfigError: rows carry no classes, or fewer than two, or the weights do not fit them.
        """
        if len(facts.labels) < 2:
            raise ConfigError(
                f"train.task=text_classification: the dataset has {len(facts.labels)} classes. Name the column of the "
                "classes with data.sources.N.label, set data.rows=document, and see that there are two at least."
            )
        return cls(facts.labels, _class_weights(config, facts), config.best)

    @property
    def better(self) -> Literal["lower", "higher"]:
        """A loss is better where it is lower, the other metrics where they are higher."""
        return "lower" if self.metric == "loss" else "higher"

    @property
    def num_labels(self) -> int:
        """Classes."""
        return len(self.labels)

    def count(self, rows: BatchSlice) -> int:
        """Rows that have a class."""
        return 0 if rows.labels is None else int((rows.labels != NO_LABEL).sum())

    def targets(self, rows: TaskRows, weight: float) -> Targets:
        """Classes, int64 [B], negative where a row has none; weights, fp32 [B], 0 there."""
        assert rows.classes_B is not None, "the dataset has classes"
        there_B = rows.classes_B >= 0
        by_class_C = torch.tensor(self.class_weights, dtype=torch.float32, device=rows.classes_B.device)
        weights_B = torch.where(there_B, weight * by_class_C[rows.classes_B.clamp(min=0)], 0.0)
        return rows.classes_B.masked_fill(~there_B, _UNLABELLED), weights_B

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Cross-entropy of each row in fp32, times its weight, summed."""
        assert isinstance(outputs, Tensor), "a classifier gives logits"
        classes_B, weights_B = targets
        losses_B = F.cross_entropy(outputs.float(), classes_B, reduction="none", ignore_index=_UNLABELLED)
        return (losses_B * weights_B).sum()

    def zeros(self) -> Sums:
        """The confusion matrix: rows are true classes, columns predicted ones."""
        return {"confusion": torch.zeros(self.num_labels, self.num_labels, dtype=torch.int64)}

    def observe(self, outputs: Outputs, targets: Targets) -> Sums:
        """Count each row with a class once."""
        assert isinstance(outputs, Tensor), "a classifier gives logits"
        there_B = targets[0] >= 0
        cells = targets[0][there_B] * self.num_labels + outputs.argmax(dim=-1)[there_B]
        counts = torch.bincount(cells, minlength=self.num_labels**2)
        return {"confusion": counts.view(self.num_labels, self.num_labels)}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """See `classification_metrics`."""
        return classification_metrics(sums["confusion"], self.labels)


def classification_metrics(confusion_CC: Tensor, labels: tuple[str, ...]) -> dict[str, float]:
    """What a confusion matrix says.

    Precision, recall and F1 (van Rijsbergen 1979, chapter 7, with beta 1) are 0 where they would divide by 0.
    The macro means go over the classes that occur, as truth or as prediction.

    Args:
        confusion_CC: int64; rows are true classes, columns predicted ones.
        labels: names of the classes.

    Returns:
        `accuracy`, `macro_precision`, `macro_recall` and `macro_f1`; up to 100 classes `precision/NAME`, `recall/NAME`
        and `f1/NAME`; up to 32 classes `confusion/TRUE/PREDICTED`, a number of rows.
    """
    matrix: list[list[int]] = confusion_CC.tolist()
    size, total = len(labels), sum(map(sum, matrix))
    hits = [matrix[one][one] for one in range(size)]
    truths = [sum(row) for row in matrix]
    predictions = [sum(row[one] for row in matrix) for one in range(size)]
    precision = [_share(hit, count) for hit, count in zip(hits, predictions, strict=True)]
    recall = [_share(hit, count) for hit, count in zip(hits, truths, strict=True)]
    f1 = [_share(2 * hit, truth + said) for hit, truth, said in zip(hits, truths, predictions, strict=True)]
    there = [one for one in range(size) if truths[one] or predictions[one]]
    found = {"accuracy": _share(sum(hits), total)}
    named = {"precision": precision, "recall": recall, "f1": f1}
    for name, values in named.items():
        found[f"macro_{name}"] = _share(sum(values[one] for one in there), len(there))
    if size <= _MAX_NAMED:
        for name, values in named.items():
            found |= {f"{name}/{label}": value for label, value in zip(labels, values, strict=True)}
    if size <= _MAX_CONFUSION:
        for row, truth in enumerate(labels):
            found |= {f"confusion/{truth}/{said}": float(matrix[row][column]) for column, said in enumerate(labels)}
    return found


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _class_weights(config: ClassificationConfig, facts: TaskFacts) -> tuple[float, ...]:
    """What each class counts.

    `balanced` is rows / (classes · rows of the class) (King and Zeng 2001, section 4.2, with equal shares as the aim),
    whose mean over the training rows is 1.
    """
    given = config.class_weights
    if given == "none":
        return (1.0,) * len(facts.labels)
    if given == "balanced":
        if len(facts.label_rows) != len(facts.labels) or not all(facts.label_rows):
            raise ConfigError(
                "train.classification.class_weights=balanced: some class has no training row, or nobody counted them "
                f"({dict(zip(facts.labels, facts.label_rows, strict=False))}). Give the weights by name."
            )
        total = sum(facts.label_rows)
        return tuple(total / (len(facts.labels) * rows) for rows in facts.label_rows)
    unknown, missing = sorted(set(given) - set(facts.labels)), sorted(set(facts.labels) - set(given))
    if unknown or missing:
        raise ConfigError(
            f"train.classification.class_weights names {', '.join(sorted(given))}; the classes are "
            f"{', '.join(facts.labels)}. Name each of them once."
        )
    return tuple(given[label] for label in facts.labels)
