"""What a task is: the one seam between what is learned and how it is trained.

The engine, the loop and the evaluation know tasks by this protocol only. A task turns delivered rows into targets,
targets and a model's outputs into a loss, and outputs into sums that make metrics. It knows neither mesh nor optimizer;
its loss is a weighted sum, and the weight makes one optimizer step the mean over the global batch on every mesh.

Shape letters: B rows, T tokens, V vocabulary, C classes.
"""

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from data_service.schema import BatchSlice
from trainer.layers import Outputs
from trainer.tasks.rows import TaskRows

__all__ = ["Outputs", "Sums", "Targets", "Task"]

Targets = tuple[Tensor, ...]
"""What a task compares outputs with: always as many tensors, of the same dtypes, the first axis B."""
Sums = dict[str, Tensor]
"""Named fp64 or int64 tensors that may be added over micro-batches, batches and ranks."""


@runtime_checkable
class Task(Protocol):
    """What is learned."""

    @property
    def metric(self) -> str:
        """The name of what decides which checkpoint is best: `loss`, or a key of `metrics`."""

    @property
    def better(self) -> Literal["lower", "higher"]:
        """Which values of `metric` are better."""

    @property
    def num_labels(self) -> int:
        """Outputs of the model's classification head; 0 asks for a language model."""

    def count(self, rows: BatchSlice) -> int:
        """How many units these rows hold whose mean is the loss: labels that count, or labelled rows."""

    def targets(self, rows: TaskRows, weight: float) -> Targets:
        """Targets of a micro-batch.

        Args:
            rows: as delivered; a masked row must add nothing to the loss.
            weight: the step's weight w = dp · micro-batches / N over the N units of the global batch.
        """

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Loss of one micro-batch, a scalar in fp32: w times the sum of the losses of its units.

        Runs inside of the model's forward pass; it must be differentiable, and finite where no row counts.
        """

    def zeros(self) -> Sums:
        """The sums before the first row of an evaluation, on the CPU; empty where there are no metrics."""

    def observe(self, outputs: Outputs, targets: Targets) -> Sums:
        """What one micro-batch of an evaluation adds to the sums: the keys and shapes of `zeros`. No gradients."""

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Metrics of a whole evaluation, of the sums over all of its rows."""
