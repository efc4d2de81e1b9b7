"""Where a model is cut into pipeline stages, and what a stage calls its parameters.

Pure arithmetic over `trainer.architecture.layers`; loads neither torch nor DeepSpeed, so that a planner may ask.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from data_service.errors import ConfigError
from trainer.architecture import TransformerConfig, parameter_shapes

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LayerCosts", "NamedParameter", "stage_bounds"]


@dataclass(frozen=True)
class LayerCosts:
    """What the layers of a model cost, in any one unit."""

    embedding: float
    block: float
    head: float

    @classmethod
    def by_parameters(cls, config: TransformerConfig) -> Self:
        """Elements of the matrices: multiplications per token. The embedding is a look-up and costs nothing."""
        shapes = parameter_shapes(config)
        block = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("blocks.0."))
        return cls(0.0, float(block), float((config.num_labels or config.vocab_size) * config.d_model))


@dataclass(frozen=True)
class NamedParameter:
    """A trained parameter as this rank holds it."""

    name: str
    """Canonical name."""
    parameter: "nn.Parameter"
    counted: bool
    """False on the second copy of a tied matrix: the same numbers are written and clipped elsewhere."""


def stage_bounds(config: TransformerConfig, num_stages: int, costs: LayerCosts | None = None) -> tuple[int, ...]:
    """Where `layers(config)` is cut, so that the dearest stage is as cheap as can be. Every stage gets a block.

    Args:
        config: shape of the model.
        num_stages: pipeline stages.
        costs: of the layers; by default `LayerCosts.by_parameters`.

    Returns:
        `num_stages + 1` indices into `layers(config)`, from 0 to its length.

    Raises:
        ConfigError: there are fewer blocks than stages.
    """
    if num_stages > config.num_layers:
        raise ConfigError(
            f"train.parallel.pp={num_stages} with model.num_layers={config.num_layers}: a stage needs a block. "
            f"Set train.parallel.pp to {config.num_layers} or less."
        )
    costs = costs or LayerCosts.by_parameters(config)
    # best[s][b]: least possible cost of the dearest of s stages that hold the first b blocks, and its last cut.
    infinite = float("inf")
    best: list[list[tuple[float, int]]] = [[(infinite, 0)] * (config.num_layers + 1) for _ in range(num_stages + 1)]
    best[0][0] = (0.0, 0)
    for stage in range(1, num_stages + 1):
        extra = (costs.embedding if stage == 1 else 0.0) + (costs.head if stage == num_stages else 0.0)
        for stop in range(stage, config.num_layers + 1):
            best[stage][stop] = min(
                (max(best[stage - 1][start][0], (stop - start) * costs.block + extra), start)
                for start in range(stage - 1, stop)
            )
    cuts = [config.num_layers]
    for stage in range(num_stages, 0, -1):
        cuts.append(best[stage][cuts[-1]][1])
    inner = [block + 1 for block in reversed(cuts[1:-1])]
    return (0, *inner, config.num_layers + 2)
