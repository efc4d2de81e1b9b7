"""The `sft` task: learn the answers of chats.

The loss is that of `causal_lm` on the tokens whose labels the dataset counts, which are the assistant's. Its metric
beside the loss is how many of those tokens the model would have chosen itself.

Shape letters: B rows, T tokens, D model width, V vocabulary, n tokens that count.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_service.errors import ConfigError
from trainer.layers import Projection
from trainer.losses import IGNORED
from trainer.tasks.base import Outputs, Sums, Targets
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.facts import TaskFacts

__all__ = ["SupervisedFineTuning"]

_CHUNK_TOKENS = 1024
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class SupervisedFineTuning(CausalLM):
    """Next-token prediction over the assistant's words."""

    @classmethod
    def of(cls, facts: TaskFacts) -> "SupervisedFineTuning":
        """The task on a dataset.

        Raises:
            ConfigError: its rows are no chats.
        """
        if not facts.loss_masks:
            raise ConfigError(
                "train.task=sft: the dataset does not say which tokens are answers. Name the chats with "
                "data.sources.N.messages, or set train.task=causal_lm."
            )
        return cls()

    def zeros(self) -> Sums:
        """Tokens that count, and those of them that the model would have chosen."""
        return {name: torch.zeros((), dtype=torch.int64) for name in ("right", "counted")}

    def observe(self, outputs: Outputs, targets: Targets) -> Sums:
        """Compare the likeliest token with the label, chunk by chunk."""
        labels_BT = targets[0]
        chosen_BT = labels_BT != IGNORED
        labels_n = labels_BT[chosen_BT]
        right = torch.zeros((), dtype=torch.int64, device=labels_BT.device)
        for begin in range(0, len(labels_n), _CHUNK_TOKENS):
            part = slice(begin, begin + _CHUNK_TOKENS)
            right += (_logits(outputs, chosen_BT, part).argmax(dim=-1) == labels_n[part]).sum()
        return {"right": right, "counted": chosen_BT.sum()}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """`token_accuracy`: the share of the answers' tokens that are the likeliest after what is before them."""
        return {"token_accuracy": int(sums["right"]) / max(1, int(sums["counted"]))}


def _logits(outputs: Outputs, chosen_BT: Tensor, part: slice) -> Tensor:
    """Logits of some of the chosen tokens, [n, V]."""
    assert isinstance(outputs, Projection), "a language model gives its projection"
    return replace(outputs, normed_BTD=outputs.normed_BTD[chosen_BT][part]).logits()
