"""The optimizer and the learning rate as a function of the step.

Owns which parameters form a group, what an optimizer keeps of a parameter, and the schedules. Stepping, clipping and
partitioning belong to the engine.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.config import OptimizerConfig, TrainConfig
from trainer.fragments import Kind

__all__ = [
    "GroupKey",
    "allocate_state",
    "group_key",
    "group_parameters",
    "is_decayed",
    "lr_at",
    "make_optimizer",
    "set_lr",
    "set_optimizer_steps",
    "state_kinds",
]


@dataclass(frozen=True, order=True)
class GroupKey:
    """What the parameters of a group have in common."""

    lr_scale: float
    """Their learning rate over the run's."""
    weight_decay: float


def is_decayed(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies by default: to matrices, not to norms and biases."""
    return parameter.ndim >= 2


def group_key(name: str, parameter: nn.Parameter, config: OptimizerConfig) -> GroupKey:
    """The group of a parameter: the last of `train.optimizer.groups` that matches its canonical name, or none."""
    weight_decay = config.weight_decay if is_decayed(parameter) else 0.0
    for group in reversed(config.groups):
        if fnmatch.fnmatchcase(name, group.match):
            return GroupKey(group.lr_scale, weight_decay if group.weight_decay is None else group.weight_decay)
    return GroupKey(1.0, weight_decay)


def state_kinds(config: OptimizerConfig) -> tuple[Kind, ...]:
    """What is kept of each trained parameter: its fp32 master and what the optimizer remembers."""
    if config.name == "sgd":
        return ("master", "momentum_buffer") if config.momentum else ("master",)
    return ("master", "exp_avg", "exp_avg_sq")


def group_parameters(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> dict[GroupKey, list[nn.Parameter]]:
    """Trained parameters by group.

    Args:
        named: (canonical name, parameter); a repeated name, as of tied copies, counts once, a frozen one not at all.
        config: the `train.optimizer` section.

    Returns:
        No group is empty.
    """
    groups: dict[GroupKey, list[nn.Parameter]] = {}
    for name, parameter in dict(named).items():
        if parameter.requires_grad:
            groups.setdefault(group_key(name, parameter, config), []).append(parameter)
    return groups


def make_optimizer(groups: Mapping[GroupKey, Sequence[nn.Parameter]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of one rank's trained parameters.

    AdamW is Loshchilov and Hutter 2019, algorithm 2; Adam is Kingma and Ba 2015, algorithm 1, and SGD is Sutskever et
    al. 2013, section 2, both with the decay added to the gradient. Dampening is 0, so that a momentum that starts at 0
    is the same as one that starts with the first gradient.

    Args:
        groups: parameters by group; an empty one would break ZeRO's flat buffers.
        config: the `train.optimizer` section.

    Returns:
        A fused optimizer, its groups in the order of their keys, each with its `lr_scale`.
    """
    made = [
        {"params": list(groups[key]), "weight_decay": key.weight_decay, "lr_scale": key.lr_scale}
        for key in sorted(groups, reverse=True)
    ]
    if config.name == "sgd":
        return torch.optim.SGD(made, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    adam = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return adam(made, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def allocate_state(optimizer: torch.optim.Optimizer, stepped: Iterable[Tensor], kinds: Sequence[Kind]) -> None:
    """Give an optimizer its state before its first step, so that loading and linking need no dummy step.

    DeepSpeed 0.19.8 links moments to parameters after the first group's first step, when the other groups have none
    yet; with the state there from the start all are linked.

    Args:
        optimizer: a fused one of `make_optimizer`.
        stepped: the fp32 tensors that it steps; ZeRO 3 keeps them out of its parameter groups between steps.
        kinds: of `state_kinds`.
    """
    for held in stepped:
        state = optimizer.state[held]
        for kind in kinds:
            if kind != "master" and kind not in state:
                state[kind] = torch.zeros_like(held, memory_format=torch.preserve_format, requires_grad=False)
        if "exp_avg" in kinds and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=held.device)


def set_optimizer_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Set how many updates Adam or AdamW has made; its bias correction goes on from there. SGD does not count."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(steps))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of a step in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def lr_at(step: int, train: TrainConfig) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: steps done before it: 0 for the first.
        train: the `train` section.

    Returns:
        A rise (step + 1) / warmup_steps of the peak in the warm-up. Then the peak (`constant`), a half cosine
        (Loshchilov and Hutter 2017, equation 5), a straight fall (`linear`), the peak until a linear fall over the last
        `decay_fraction` of all steps (`wsd`, Hu et al. 2024, section 4), or sqrt(w / (step + 1)) of the peak with w =
        max(warmup_steps, 1) (`inverse_sqrt`, Vaswani et al. 2017, equation 3). Falls aim at `min_lr_ratio` of the peak
        right after the last step, so that no step is spent at 0; `inverse_sqrt` does not fall below it.
    """
    schedule, peak = train.schedule, train.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    if schedule.name == "inverse_sqrt":
        return peak * max(schedule.min_lr_ratio, math.sqrt(max(schedule.warmup_steps, 1) / (step + 1)))
    if schedule.name == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * _share(step, schedule.warmup_steps, train.steps)))
    elif schedule.name == "linear":
        left = 1.0 - _share(step, schedule.warmup_steps, train.steps)
    else:
        first_falling = max(schedule.warmup_steps, train.steps - round(schedule.decay_fraction * train.steps))
        left = 1.0 - _share(step, first_falling, train.steps)
    return peak * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * left)


def _share(step: int, first: int, last: int) -> float:
    """Part of [first, last) that lies before `step`, from 0 to 1."""
    return min(1.0, max(0.0, (step - first) / max(1, last - first)))
