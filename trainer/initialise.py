"""Initial weights, each a pure function of (seed, canonical name).

Whichever rank holds a parameter, and in whichever order, it starts with the same bytes, so that step 0 is equal on
every mesh. Draws from numpy's Philox, which depends on neither threads nor the processor's instruction set. Filling an
engine with them is `trainer.fragment_readers.fill_initial`.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from trainer.architecture import TransformerConfig

__all__ = ["initial_tensor"]

_RESIDUAL_OUTPUTS = (".attention.out.weight", ".feed_forward.down.weight")


def initial_tensor(name: str, shape: tuple[int, ...], seed: int, config: TransformerConfig) -> Tensor:
    """The initial value of one parameter.

    Norms start at 1, biases at 0. Matrices are normal with `init_std`; those that write into the residual stream are
    scaled by 1 / sqrt(2 · num_layers) where nothing normalises it on the way (Radford et al. 2019, section 2.3). Of an
    adapter, B is 0 and A uniform within 1 / sqrt(in), as `peft` draws it, so that it begins by changing nothing.

    Args:
        name: canonical name.
        shape: of the parameter.
        seed: of the run.
        config: shape of the model.

    Returns:
        A new fp32 tensor on the CPU.
    """
    if name.endswith(".lora_b"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    std = config.init_std
    if config.norm_place == "before" and name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * config.num_layers)
    draw = _generator(seed, name)
    if name.endswith(".lora_a"):
        bound = 1 / math.sqrt(shape[1])
        return torch.from_numpy(draw.random(shape, dtype=np.float32)).mul_(2 * bound).sub_(bound)
    return torch.from_numpy(draw.standard_normal(shape, dtype=np.float32)).mul_(std)


def _generator(seed: int, name: str) -> np.random.Generator:
    key = int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
