"""Checkpoints for tests of the file layer: values that tell where they belong, cut over ranks in any way."""

import math
import random
from collections.abc import Mapping, Sequence

import torch

from trainer.checkpoint import write_part
from trainer.fragments import KINDS, Fragment, Kind, Range
from trainer.manifest import Manifest, PartReceipt, TrainState, commit

__all__ = ["commit_whole", "cut", "expected", "fragments_of", "make_state", "write_parts"]

Shapes = Mapping[str, tuple[int, ...]]


def expected(name: str, kind: Kind, numel: int, step: int) -> torch.Tensor:
    """The flat values of a parameter at a step."""
    seed = int.from_bytes(f"{name}/{kind}/{step}".encode(), "little") % (2**31 - 1)
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def cut(shapes: Shapes, num_ranks: int, seed: int | None) -> list[list[Range]]:
    """Ranges of each rank: the parameters end to end, cut like ZeRO's flat partition.

    Args:
        shapes: canonical name to shape.
        num_ranks: how many pieces.
        seed: cuts at random places; None cuts evenly.
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    if seed is None:
        bounds = [total * rank // num_ranks for rank in range(num_ranks + 1)]
    else:
        draws = random.Random(seed)
        bounds = [0, *sorted(draws.randrange(total + 1) for _ in range(num_ranks - 1)), total]
    ranges: list[list[Range]] = []
    for first, last in zip(bounds, bounds[1:], strict=False):
        own: list[Range] = []
        begin = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            low, high = max(first, begin), min(last, begin + numel)
            if low < high:
                own.extend(Range(name, kind, low - begin, high - low) for kind in KINDS)
            begin += numel
        ranges.append(own)
    return ranges


def fragments_of(ranges: Sequence[Range], shapes: Shapes, step: int) -> list[Fragment]:
    """Fragments that hold `expected` values."""
    return [
        Fragment(
            found.name,
            found.kind,
            found.start,
            found.numel,
            expected(found.name, found.kind, math.prod(shapes[found.name]), step)[found.start : found.stop],
        )
        for found in ranges
    ]


def make_state(shapes: Shapes, step: int, dp: int = 1, pp: int = 1, **fields: object) -> TrainState:
    """A state with plausible values."""
    plain: dict[str, object] = {
        "step": step,
        "optimizer_steps": step,
        "plan_digest": "0123",
        "consumed_batches": step,
        "dataset_digest": "4567",
        "seed": 0,
        "seq_len": 16,
        "global_batch": 8,
        "dp": dp,
        "pp": pp,
        "zero_stage": 1,
        "precision": "fp32",
        "model": {},
        "parameters": dict(shapes),
        "config": {"run": {"name": "t"}},
        "versions": {"torch": torch.__version__},
    }
    return TrainState(**(plain | fields))  # type: ignore[arg-type]


def write_parts(
    uri: str, step: int, attempt: int, shapes: Shapes, num_ranks: int = 2, seed: int | None = None
) -> list[PartReceipt]:
    """Every rank's part of a step."""
    return [
        write_part(uri, step, attempt, rank, fragments_of(own, shapes, step))
        for rank, own in enumerate(cut(shapes, num_ranks, seed))
    ]


def commit_whole(uri: str, step: int, attempt: int, shapes: Shapes, num_ranks: int = 2) -> Manifest:
    """Write and commit a step."""
    receipts = write_parts(uri, step, attempt, shapes, num_ranks)
    return commit(uri, step, attempt, receipts, make_state(shapes, step, dp=num_ranks))
