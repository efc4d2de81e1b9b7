"""Initial weights in the parameters of a plain module, by way of what fills an engine."""

from collections.abc import Iterable

from torch import nn

from trainer.fragment_readers import StateView, fill_initial
from trainer.model import TransformerConfig

__all__ = ["initialise"]


def initialise(
    named: Iterable[tuple[str, nn.Parameter]], seed: int, config: TransformerConfig, folder: str | None = None
) -> None:
    """Fill parameters, given by canonical name, in place and in their own dtype."""
    fill_initial(
        [StateView(name, 0, one.numel(), {"master": one.detach().view(-1)}, written=(0, 0)) for name, one in named],
        seed,
        config,
        folder,
    )
