"""Values of checkpoints: parts written by ranks, and any range of any parameter read back.

Writing and reading know nothing of meshes or of ZeRO: a rank writes the fragments it holds, and reads the ranges it
needs from whatever partition they were written in. Only `trainer.manifest` decides that a checkpoint exists.
"""

import itertools
from collections.abc import Iterable, Iterator

import torch

from data_service import storage
from trainer.errors import CheckpointIncompleteError
from trainer.fragments import Fragment, Range, merge
from trainer.manifest import Manifest
from trainer.parts import (
    PartReceipt,
    Slice,
    StoredRange,
    checksums,
    group_slices,
    in_order,
    part_file,
    plan_slices,
    read_slices,
    step_folder,
)
from trainer.safetensors_io import make_header

__all__ = ["load_ranges", "write_part"]


def write_part(checkpoints_uri: str, step: int, attempt: int, rank: int, fragments: Iterable[Fragment]) -> PartReceipt:
    """Write one rank's part; when this returns, the bytes are durable, but the checkpoint does not exist yet.

    Args:
        checkpoints_uri: the run's checkpoints.
        step: of the checkpoint.
        attempt: fencing token of the controller that started this rank.
        rank: of the writer.
        fragments: what it holds; live memory is fine, it is read during the call only.

    Returns:
        What `manifest.commit` needs to know.
    """
    held = list(fragments)
    names = [f"{fragment.name}:{fragment.kind}:{fragment.start}" for fragment in held]
    header, entries = make_header(
        [(name, "F32", (fragment.numel,)) for name, fragment in zip(names, held, strict=True)],
        {"step": str(step), "attempt": str(attempt), "rank": str(rank)},
    )
    file = part_file(attempt, rank)
    ranges: list[StoredRange] = []
    with storage.publish(storage.join(checkpoints_uri, step_folder(step), file)) as stream:
        stream.write(header)
        for fragment, entry in zip(held, entries, strict=True):
            assert fragment.data.shape == (fragment.numel,), (fragment.range, fragment.data.shape)
            assert fragment.data.dtype == torch.float32, (fragment.range, fragment.data.dtype)
            data = fragment.data.detach().cpu().contiguous().view(torch.uint8).numpy().data
            stream.write(data)
            ranges.append(
                StoredRange(fragment.name, fragment.kind, fragment.start, fragment.numel, entry.offset, checksums(data))
            )
    num_bytes = entries[-1].offset + entries[-1].num_bytes if entries else len(header)
    return PartReceipt(step, attempt, rank, file, num_bytes, tuple(ranges))


def load_ranges(checkpoints_uri: str, manifest: Manifest, wanted: Iterable[Range]) -> Iterator[Fragment]:
    """Read ranges of a committed checkpoint, whatever partition they were written in.

    Args:
        checkpoints_uri: the run's checkpoints.
        manifest: of the step to read.
        wanted: ranges in any order; they may overlap.

    Yields:
        Fragments of bounded size that together hold every wanted element exactly once, in no order to rely on. Their
        data are read-only by convention: copy, never write.

    Raises:
        CheckpointIncompleteError: the checkpoint does not hold some wanted element; raised before anything is read.
        CheckpointCorruptError: the bytes read do not match the manifest.
    """
    slices = _plan(manifest, wanted)
    step_uri = storage.join(checkpoints_uri, step_folder(manifest.step))

    def read(group: list[Slice]) -> list[Fragment]:
        return [
            Fragment(
                part.wanted.name,
                part.wanted.kind,
                part.wanted.start,
                part.wanted.numel,
                torch.frombuffer(data, dtype=torch.float32),
            )
            for part, data in zip(group, read_slices(step_uri, group), strict=True)
        ]

    return itertools.chain.from_iterable(in_order(read, group_slices(slices)))


def _plan(manifest: Manifest, wanted: Iterable[Range]) -> list[Slice]:
    """What to read."""
    stored_by_key: dict[tuple[str, str], list[tuple[str, StoredRange]]] = {}
    for part in manifest.parts:
        for stored in part.ranges:
            stored_by_key.setdefault((stored.name, stored.kind), []).append((part.file, stored))
    slices: list[Slice] = []
    for found in merge(wanted):
        own = [
            one
            for file, stored in stored_by_key.get((found.name, found.kind), [])
            for one in plan_slices(file, stored, found)
        ]
        reached = sum(one.wanted.numel for one in own)
        if reached != found.numel:
            raise CheckpointIncompleteError(
                f"Step {manifest.step} holds {reached} of the {found.numel} elements of {found.kind} of {found.name} "
                f"from {found.start}: it belongs to another model. Resume with the run's own configuration."
            )
        slices.extend(own)
    return slices
