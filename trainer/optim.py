"""The optimizer and the learning rate as a function of the step.

Owns which parameters are decayed and the schedules. Stepping, clipping and partitioning belong to the engine.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from trainer.config import OptimizerConfig, TrainConfig

__all__ = ["is_decayed", "lr_at", "make_optimizer"]


def is_decayed(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to the vectors of norms."""
    return parameter.ndim >= 2


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) over one rank's parameters.

    Args:
        named: (canonical name, parameter); a repeated name, as of tied copies, counts once.
        config: the `train.optimizer` section.

    Returns:
        An optimizer with the decayed parameters in its first group and the others in its last. A stage that holds only
        one sort has one group: an empty group would break ZeRO's flat buffers.
    """
    once = dict(named)
    decayed = [parameter for parameter in once.values() if is_decayed(parameter)]
    others = [parameter for parameter in once.values() if not is_decayed(parameter)]
    groups = [
        {"params": members, "weight_decay": weight_decay}
        for members, weight_decay in ((decayed, config.weight_decay), (others, 0.0))
        if members
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def lr_at(step: int, train: TrainConfig) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: steps done before it: 0 for the first.
        train: the `train` section.

    Returns:
        A rise (step + 1) / warmup_steps of the peak in the warm-up; then the peak (`constant`), a half cosine
        (Loshchilov and Hutter 2017, equation 5) or the peak until a linear fall over the last `decay_fraction` of all
        steps (`wsd`, Hu et al. 2024, section 4). Both falls aim at `min_lr_ratio` of the peak right after the last
        step, so that no step is spent at 0.
    """
    schedule, peak = train.schedule, train.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    if schedule.name == "cosine":
        done = _share(step, schedule.warmup_steps, train.steps)
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        first_falling = max(schedule.warmup_steps, train.steps - round(schedule.decay_fraction * train.steps))
        left = 1.0 - _share(step, first_falling, train.steps)
    return peak * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * left)


def _share(step: int, first: int, last: int) -> float:
    """Part of [first, last) that lies before `step`, from 0 to 1."""
    return min(1.0, max(0.0, (step - first) / max(1, last - first)))
