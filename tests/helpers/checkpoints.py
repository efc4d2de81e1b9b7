"""Looking into checkpoints from tests."""

from dataclasses import replace
from pathlib import Path

import torch

from trainer import manifest
from trainer.checkpoint import load_ranges, write_part
from trainer.fragments import Fragment, Kind, Range

__all__ = ["read_state", "same_bytes", "without_moments"]


def read_state(folder: Path, step: int) -> dict[tuple[str, Kind], torch.Tensor]:
    """(canonical name, kind) to the whole flat fp32 tensor."""
    found = manifest.read_manifest(str(folder), step)
    wanted = [
        Range(name, kind, 0, torch.Size(shape).numel())
        for name, shape in found.state.parameters.items()
        for kind in found.state.kinds
    ]
    state = {(one.name, one.kind): torch.full((one.numel,), torch.nan) for one in wanted}
    for fragment in load_ranges(str(folder), found, wanted):
        state[fragment.name, fragment.kind][fragment.start : fragment.start + fragment.numel] = fragment.data
    return state


def same_bytes(one: dict[tuple[str, Kind], torch.Tensor], other: dict[tuple[str, Kind], torch.Tensor]) -> bool:
    """Whether both hold the same bytes, signs of zero and NaNs included."""
    return one.keys() == other.keys() and all(
        torch.equal(one[key].view(torch.int32), other[key].view(torch.int32)) for key in one
    )


def without_moments(source: Path, target: Path, step: int) -> None:
    """Write the same checkpoint with both moments zeroed."""
    found = manifest.read_manifest(str(source), step)
    fragments = [
        Fragment(name, kind, 0, values.numel(), values if kind == "master" else torch.zeros_like(values))
        for (name, kind), values in read_state(source, step).items()
    ]
    receipt = write_part(str(target), step, 1, 0, fragments)
    manifest.commit(str(target), step, 1, [receipt], replace(found.state, dp=1, pp=1))
