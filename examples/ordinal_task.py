"""A task of one's own: classes that have an order, such as one to five stars.

Name it in a run's file; its module must be installed, or lie in a folder that PYTHONPATH names:

    train: {task: "examples.ordinal_task:OrdinalClasses"}

A task is a class with the parts that `trainer.tasks.base.Task` names. It is made with the `train` section and with what
is known of the dataset, once on every rank. This one takes the expected class number for its answer: its loss is the
squared distance from the true number, and its metric the mean distance. Class names must sort in their order.

Shape letters: B rows, C classes.
"""

from typing import Literal

import torch
from torch import Tensor

from data_service.errors import ConfigError
from data_service.schema import NO_LABEL, BatchSlice
from trainer.config import TrainConfig
from trainer.tasks.base import Outputs, Sums, Targets
from trainer.tasks.facts import TaskFacts
from trainer.tasks.rows import TaskRows

__all__ = ["OrdinalClasses"]


class OrdinalClasses:
    """Learns class numbers, so that a near miss costs less than a far one."""

    metric = "mean_distance"
    better: Literal["lower", "higher"] = "lower"

    def __init__(self, train: TrainConfig, facts: TaskFacts) -> None:
        """Take the classes from the dataset.

        Raises:
            ConfigError: there are fewer than two.
        """
        if len(facts.labels) < 2:
            raise ConfigError(
                f"train.task={train.task}: the dataset has {len(facts.labels)} classes, and an order needs two. Name "
                "the column of the classes with data.sources.N.label, and set data.rows=document."
            )
        self.num_labels = len(facts.labels)

    def count(self, rows: BatchSlice) -> int:
        """Rows with a class: the loss of a step is the mean over them."""
        return 0 if rows.labels is None else int((rows.labels != NO_LABEL).sum())

    def targets(self, rows: TaskRows, weight: float) -> Targets:
        """Class numbers, fp32 [B], and weights, fp32 [B], 0 where a row has no class.

        Raises:
            ConfigError: rows are no documents, and carry no classes.
        """
        if rows.classes_B is None:
            raise ConfigError("the rows carry no classes: a row must be one text. Set data.rows=document.")
        there_B = rows.classes_B >= 0
        return rows.classes_B.clamp(min=0).float(), torch.where(there_B, weight, 0.0).float()

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Squared distance of the expected number from the true one, times the weight, summed."""
        numbers_B, weights_B = targets
        return ((self._expected(outputs) - numbers_B).square() * weights_B).sum()

    def zeros(self) -> Sums:
        """Sums of an evaluation, before its first row."""
        return {"distance": torch.zeros((), dtype=torch.float64), "rows": torch.zeros((), dtype=torch.int64)}

    def observe(self, outputs: Outputs, targets: Targets) -> Sums:
        """What a micro-batch adds to them."""
        numbers_B, weights_B = targets
        there_B = weights_B > 0
        distance_B = (self._expected(outputs) - numbers_B).abs()
        return {"distance": distance_B[there_B].double().sum(), "rows": there_B.sum()}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """What the whole evaluation says."""
        return {self.metric: float(sums["distance"]) / max(1, int(sums["rows"]))}

    def _expected(self, outputs: Outputs) -> Tensor:
        assert isinstance(outputs, Tensor), "a classifier gives logits, [B, C]"
        shares_BC = outputs.float().softmax(dim=-1)
        return shares_BC @ torch.arange(self.num_labels, device=outputs.device).float()
