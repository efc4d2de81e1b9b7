"""How every ZeRO stage lays a model over a mesh, rebuilt without DeepSpeed: views of each rank on memory of its own.

Arithmetic of DeepSpeed 0.19.8: ZeRO 1 and 2 put a group's parameters end to end, pad to 2 · dp elements and cut
evenly; ZeRO 3 cuts each parameter evenly; ZeRO 0 keeps all. That real engines do the same is for `tests/ranks` to show.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from trainer.config import OptimizerConfig
from trainer.fragment_readers import StateView, linked_views, partitioned_views, plain_views
from trainer.fragments import Kind
from trainer.model import TransformerConfig, layers, parameter_shapes
from trainer.optim import allocate_state, group_parameters, make_optimizer
from trainer.stages import NamedParameter, stage_bounds

__all__ = ["GRID", "Layout", "views_of"]


@dataclass(frozen=True)
class Layout:
    """A mesh and a ZeRO stage."""

    zero: int
    dp: int
    pp: int = 1

    def __str__(self) -> str:
        return f"zero{self.zero}dp{self.dp}pp{self.pp}"


GRID = (
    *(Layout(zero, dp) for zero in (0, 1, 2, 3) for dp in (1, 2, 3)),
    *(Layout(1, dp, pp) for dp in (1, 2) for pp in (2, 4)),
)
"""What the product promises: ZeRO 0 to 3 on one stage, ZeRO 1 over pipelines."""


def views_of(layout: Layout, config: TransformerConfig, kinds: Sequence[Kind]) -> list[list[StateView]]:
    """Views of each rank, in the order of the ranks; all zeros."""
    return [
        _views(layout, dp_index, _held(config, layout.pp, stage), kinds)
        for dp_index in range(layout.dp)
        for stage in range(layout.pp)
    ]


def _held(config: TransformerConfig, pp: int, stage: int) -> list[NamedParameter]:
    """The parameters of a stage; the last stage has a second copy of a tied matrix, which it does not write."""
    bounds = stage_bounds(config, pp)
    own = layers(config)[bounds[stage] : bounds[stage + 1]]
    prefixes = tuple(f"blocks.{one.index}." if one.kind == "block" else f"{one.kind}." for one in own)
    shapes = parameter_shapes(config)
    names = [name for name in shapes if name.startswith(prefixes)]
    found = [NamedParameter(name, nn.Parameter(torch.zeros(shapes[name])), True) for name in names]
    if config.tie_embeddings and pp > 1 and stage == pp - 1:
        found.append(NamedParameter("embedding.weight", nn.Parameter(torch.zeros(shapes["embedding.weight"])), False))
    return found


def _views(layout: Layout, dp_index: int, held: list[NamedParameter], kinds: Sequence[Kind]) -> list[StateView]:
    section = OptimizerConfig()
    groups = group_parameters(((one.name, one.parameter) for one in held), section)
    optimizer = make_optimizer(groups, section)
    if layout.zero == 0:
        allocate_state(optimizer, [one.parameter for one in held], kinds)
        return plain_views(held, optimizer, dp_index, layout.dp)
    flats = []
    for index, group in enumerate(optimizer.param_groups):
        members: list[Any] = group["params"]
        if layout.zero == 3:
            sizes = [_cut_alone(one, layout.dp, dp_index) for one in members]
            flat = torch.zeros(sum(sizes))
        else:
            flat = torch.zeros(_cut_end_to_end(members, index, layout.dp, dp_index))
            group["params"] = [flat]
        flats.append(flat)
    allocate_state(optimizer, flats, kinds)
    if layout.zero == 3:
        zero = SimpleNamespace(
            fp32_partitioned_groups_flat=flats,
            fp16_groups=[group["params"] for group in optimizer.param_groups],
            optimizer=optimizer,
            _get_param_partition_rank=lambda _: dp_index,
        )
        return partitioned_views(held, zero)
    return linked_views(held, optimizer, optimizer.param_groups)


def _cut_alone(parameter: Any, dp: int, dp_index: int) -> int:
    """ZeRO 3: the elements of one rank's partition, padding included."""
    size: int = -(-parameter.numel() // dp)
    parameter.ds_numel = parameter.numel()
    parameter.partition_numel = lambda: size
    return size


def _cut_end_to_end(members: list[Any], group: int, dp: int, dp_index: int) -> int:
    """ZeRO 1 and 2: the elements of one rank's partition, padding included; each parameter told its piece of it."""
    total = sum(one.numel() for one in members)
    size = -(-total // (2 * dp)) * 2
    first, last, begin = size * dp_index, size * (dp_index + 1), 0
    for parameter in members:
        low, high = max(first, begin), min(last, begin + parameter.numel())
        if low < high:
            parameter._hp_mapping = SimpleNamespace(
                param_group_index=group,
                hp_fragment_address=SimpleNamespace(start=low - first, numel=high - low),
                lp_fragment_address=SimpleNamespace(start=low - begin, numel=high - low),
            )
        begin += parameter.numel()
    return size
