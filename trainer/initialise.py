"""Initial weights, each a pure function of (seed, canonical name).

Whichever rank holds a parameter, and in whichever order, it starts with the same bytes, so that step 0 is equal on
every mesh. Also fills parameters from a Hugging Face folder. Draws from numpy's Philox, which depends on neither
threads nor the processor's instruction set.
"""

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from trainer.model import TransformerConfig, parameter_shapes

__all__ = ["initial_tensor", "initialise"]

_RESIDUAL_OUTPUTS = (".attention.out.weight", ".feed_forward.down.weight")


def initial_tensor(name: str, shape: tuple[int, ...], seed: int, config: TransformerConfig) -> Tensor:
    """The initial value of one parameter.

    Norms start at 1. Matrices are normal with `init_std`; those that write into the residual stream are scaled by
    1 / sqrt(2 · num_layers) (Radford et al. 2019, section 2.3).

    Args:
        name: canonical name.
        shape: of the parameter.
        seed: of the run.
        config: shape of the model.

    Returns:
        A new fp32 tensor on the CPU.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    std = config.init_std
    if name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * config.num_layers)
    key = int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest(), "little")
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).mul_(std)


def initialise(
    named: Iterable[tuple[str, nn.Parameter]], seed: int, config: TransformerConfig, folder: str | None = None
) -> None:
    """Fill parameters in place, in their own dtype and on their own device.

    Args:
        named: (canonical name, parameter) of any part of the model; tied copies may each be named.
        seed: of the run.
        config: shape of the model.
        folder: a Hugging Face folder (`model.from`) to take the values from instead.

    Raises:
        ConfigError: the folder lacks a parameter or holds it in another shape.
    """
    if folder is not None:
        from trainer.hf import open_weights  # reading a folder is rare

        weights = open_weights(folder, config)
    shapes = parameter_shapes(config)
    with torch.no_grad():
        for name, parameter in named:
            found = initial_tensor(name, shapes[name], seed, config) if folder is None else weights[name]
            parameter.copy_(found)
