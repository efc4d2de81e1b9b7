"""Which ranges of parameters and moments a rank holds, read and written in place.

Three readers give the same `StateView`s: the linked one follows DeepSpeed 0.19.8's `_hp_mapping` from a parameter to
this rank's piece of the flat fp32 partition (ZeRO 1 and 2, with and without a pipeline); the partitioned one walks the
flat fp32 sub-groups of ZeRO 3, where each parameter is cut evenly over the ranks; the plain one serves ZeRO 0, where
every rank holds everything and each writes an equal share. A view is memory of the optimizer: reading copies
nothing, loading writes through it. Knows canonical names only; file formats belong to `trainer.checkpoint`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from trainer.adapters import Lora, trained_shapes
from trainer.errors import CheckpointIncompleteError
from trainer.fragments import Fragment, Kind, Range
from trainer.initialise import initial_tensor
from trainer.model import TransformerConfig, parameter_shapes
from trainer.stages import NamedParameter

__all__ = [
    "StateView",
    "fill_initial",
    "frozen_views",
    "linked_views",
    "load_fragments",
    "partitioned_views",
    "plain_views",
    "read_fragments",
    "refresh_partitions",
    "wanted_ranges",
]


STATE_KINDS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What an optimizer of `trainer.optim` may keep of a parameter beside its master."""


@dataclass(frozen=True, eq=False)
class StateView:
    """A range of one parameter as this rank's optimizer holds it."""

    name: str
    """Canonical name."""
    start: int
    numel: int
    tensors: dict[Kind, Tensor]
    """1-D fp32 views of `numel` elements into the optimizer's memory: the master and what the optimizer keeps of it."""
    written: tuple[int, int]
    """[first, last) elements of the view that this rank writes into checkpoints; empty where another rank does."""


def _tensors(flat: Tensor, state: Mapping[str, Any], start: int, numel: int) -> dict[Kind, Tensor]:
    """Elements [start, start + numel) of a stepped tensor and of all that the optimizer keeps of it, as flat views."""
    found: dict[Kind, Tensor] = {"master": flat.detach().view(-1).narrow(0, start, numel)}
    for kind in STATE_KINDS:
        if kind in state:
            found[kind] = state[kind].view(-1).narrow(0, start, numel)
    return found


def linked_views(
    parameters: Iterable[NamedParameter], optimizer: torch.optim.Optimizer, param_groups: Sequence[dict[str, Any]]
) -> list[StateView]:
    """The views of a rank under ZeRO 1 or 2.

    Args:
        parameters: all parameters of this rank.
        optimizer: steps the flat partitions; its state is allocated.
        param_groups: of the ZeRO optimizer; each holds one flat partition.
    """
    views: list[StateView] = []
    for named in parameters:
        mapping = getattr(named.parameter, "_hp_mapping", None)
        if mapping is None:
            continue  # none of this parameter lies in this rank's partition
        (flat,) = param_groups[mapping.param_group_index]["params"]
        held, within = mapping.hp_fragment_address, mapping.lp_fragment_address
        tensors = _tensors(flat, optimizer.state[flat], held.start, held.numel)
        written = (0, held.numel) if named.counted else (0, 0)
        views.append(StateView(named.name, within.start, held.numel, tensors, written))
    return views


def partitioned_views(parameters: Iterable[NamedParameter], zero: Any) -> list[StateView]:
    """The views of a rank under ZeRO 3: the local partitions, in place; nothing is gathered.

    A sub-group's flat fp32 tensor holds this rank's partition of each of its parameters, one after another. Partitions
    of a parameter are of equal size; the last ones end in padding, which no view holds.

    Args:
        parameters: all parameters of this rank.
        zero: DeepSpeed's ZeRO 3 optimizer, 0.19.8; the state of the optimizer within is allocated.
    """
    names = {id(named.parameter): named.name for named in parameters}
    views: list[StateView] = []
    for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        state = zero.optimizer.state[flat]
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            start = size * zero._get_param_partition_rank(parameter)
            numel = min(size, parameter.ds_numel - start)
            if numel > 0:
                tensors = _tensors(flat, state, offset, numel)
                views.append(StateView(names[id(parameter)], start, numel, tensors, (0, numel)))
            offset += size
    return views


def frozen_views(parameters: Iterable[NamedParameter]) -> list[StateView]:
    """The values of parameters that are not trained, in the dtype that computes; no checkpoint holds them.

    Args:
        parameters: all parameters of this rank, as an engine has left them.
    """
    views: list[StateView] = []
    for named in parameters:
        parameter: Any = named.parameter
        if parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):  # ZeRO 3
            start = parameter.partition_numel() * dist.get_rank(parameter.ds_process_group)
            numel = min(parameter.partition_numel(), parameter.ds_numel - start)
            held = parameter.ds_tensor
        else:
            start, numel, held = 0, parameter.numel(), parameter.detach().view(-1)
        if numel > 0:
            views.append(StateView(named.name, start, numel, {"master": held.narrow(0, 0, numel)}, (0, 0)))
    return views


def refresh_partitions(zero: Any) -> None:
    """Bring the computing partitions of ZeRO 3 in line with fp32 masters that were written through views.

    A collective where small weights are kept whole on every rank: they are gathered again.

    Args:
        zero: DeepSpeed's ZeRO 3 optimizer, 0.19.8.
    """
    zero._partition_all_parameters()
    for index in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def plain_views(
    parameters: Sequence[NamedParameter], optimizer: torch.optim.Optimizer, dp_index: int, dp: int
) -> list[StateView]:
    """The views of a rank without ZeRO: whole parameters, of which it writes the dp index's share of all elements."""
    total = sum(named.parameter.numel() for named in parameters)
    first, last = total * dp_index // dp, total * (dp_index + 1) // dp
    views: list[StateView] = []
    offset = 0
    for named in parameters:
        numel = named.parameter.numel()
        tensors = _tensors(named.parameter, optimizer.state[named.parameter], 0, numel)
        low, high = max(first - offset, 0), min(last - offset, numel)
        views.append(StateView(named.name, 0, numel, tensors, (low, high) if low < high else (0, 0)))
        offset += numel
    return views


def read_fragments(views: Iterable[StateView]) -> Iterator[Fragment]:
    """What this rank writes into a checkpoint; over all ranks every element of every kind exactly once.

    The data are views of live memory: use or copy them before the next step.
    """
    for view in views:
        low, high = view.written
        if low < high:
            for kind, tensor in view.tensors.items():
                yield Fragment(view.name, kind, view.start + low, high - low, tensor[low:high])


def wanted_ranges(views: Iterable[StateView]) -> list[Range]:
    """What this rank needs from a checkpoint, tied copies included."""
    return [Range(view.name, kind, view.start, view.numel) for view in views for kind in view.tensors]


def load_fragments(views: Sequence[StateView], fragments: Iterable[Fragment]) -> None:
    """Write fragments into the optimizer's memory, wherever they overlap its views.

    Args:
        views: of this rank.
        fragments: in any order and cut; ranges and kinds outside the views are skipped.

    Raises:
        CheckpointIncompleteError: some element of a view was in no fragment.
    """
    by_name: dict[str, list[StateView]] = {}
    for view in views:
        by_name.setdefault(view.name, []).append(view)
    missing = {(id(view), kind): view.numel for view in views for kind in view.tensors}
    with torch.no_grad():
        for fragment in fragments:
            for view in by_name.get(fragment.name, ()):
                low = max(view.start, fragment.start)
                high = min(view.start + view.numel, fragment.start + fragment.numel)
                if low < high and fragment.kind in view.tensors:
                    target = view.tensors[fragment.kind][low - view.start : high - view.start]
                    target.copy_(fragment.data[low - fragment.start : high - fragment.start])
                    missing[id(view), fragment.kind] -= high - low
    lacking = [f"{kind} of {view.name}" for view in views for kind in view.tensors if missing[id(view), kind] != 0]
    if lacking:
        raise CheckpointIncompleteError(
            f"This rank needs {len(missing)} ranges; the checkpoint did not give all of {', '.join(lacking[:5])}. "
            "Resume from another step."
        )


def fill_initial(
    views: Iterable[StateView], seed: int, config: TransformerConfig, folder: str | None, lora: Lora | None = None
) -> None:
    """Set masters to their initial values: pure in (seed, canonical name), or from a Hugging Face folder.

    What a classifier or adapters have and the folder lacks starts as without a folder. Masters get the fp32 values
    themselves, not what is left of them after a cast to bf16.
    """
    given: Mapping[str, Tensor] = {}
    if folder is not None:
        from trainer.hf import open_weights  # reading a folder is rare

        given = open_weights(folder, config)
    shapes = parameter_shapes(config) | trained_shapes(config, lora)
    with torch.no_grad():
        for view in views:
            name = view.name
            whole = given[name] if name in given else initial_tensor(name, shapes[name], seed, config)
            view.tensors["master"].copy_(whole.reshape(-1)[view.start : view.start + view.numel])
