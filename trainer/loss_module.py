"""The model and its loss as one module, so that an engine sees one forward pass from tokens to a scalar.

ZeRO 3 gathers a weight for the module that holds it and releases it right after; the matrix of the output is read
outside of its own module (by the loss, and by a tied head), so it is gathered for the whole pass. Pipelines have a loss
of their own (`trainer.pipeline`).
"""

from collections.abc import Callable, Iterator

import torch
from deepspeed import zero
from torch import Tensor, nn

from trainer.model import Transformer
from trainer.stages import NamedParameter
from trainer.tasks.base import Outputs, Targets, Task

__all__ = ["LossModule", "Observe"]

Observe = Callable[[Outputs, Targets], None]
"""Looks at the outputs and targets of one micro-batch."""


class LossModule(nn.Module):
    """From the inputs and targets of a micro-batch to its loss."""

    def __init__(self, model: Transformer, task: Task) -> None:
        """Wrap a model.

        Args:
            model: as a whole, in one process.
            task: what is learned.
        """
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, inputs: tuple[Tensor, ...], targets: Targets, observe: Observe | None = None) -> Tensor:
        """The task's loss, a scalar in fp32.

        Args:
            inputs: (tokens, positions) or (tokens, positions, doc_ids), int64 [B, T].
            targets: the task's.
            observe: is shown outputs and targets, without gradients, while all weights are there.
        """
        tokens_BT, positions_BT, *documents = inputs
        outputs = self.model.outputs(tokens_BT, positions_BT, documents[0] if documents else None)
        if observe is not None:
            with torch.no_grad():
                observe(outputs, targets)
        return self.task.loss(outputs, targets)

    def gather_output_matrix(self) -> None:
        """Under ZeRO 3: keep what a language model's `Projection` refers to gathered for the whole pass."""
        held = dict(self.model.named_parameters())
        if self.model.config.num_labels == 0:
            for name in ("embedding.weight" if self.model.config.tie_embeddings else "head.weight", "head.bias"):
                if name in held:
                    zero.register_external_parameter(self, held[name])

    def named_model_parameters(self) -> Iterator[NamedParameter]:
        """Every parameter with its canonical name."""
        for name, parameter in self.model.named_parameters():
            yield NamedParameter(name, parameter, counted=True)
