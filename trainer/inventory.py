"""What lies in a run's checkpoints, step by step, and whether it can be used. Reads only; no torch here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trainer.errors import CheckpointError
from trainer.manifest import Manifest, list_complete, list_steps, read_manifest, verify

__all__ = ["Depth", "StepRecord", "inventory", "look_at"]

Depth = Literal["manifest", "sizes", "bytes"]
"""How closely to look: that the manifest can be read, that each part is there in its length, or at every byte."""


@dataclass(frozen=True)
class StepRecord:
    """One step."""

    step: int
    status: Literal["committed", "damaged", "half-written"]
    """`half-written` was never committed: a save under way, one that was cut short, or one that was shut out."""
    reason: str | None
    """Why it cannot be used."""
    manifest: Manifest | None
    """None where it cannot be read."""


def look_at(checkpoints_uri: str, step: int, depth: Depth, is_committed: bool) -> StepRecord:
    """Look at one step; what is wrong with it is told and not raised."""
    manifest = None
    try:
        manifest = read_manifest(checkpoints_uri, step)
        if depth != "manifest":
            verify(checkpoints_uri, step, deep=depth == "bytes")
    except CheckpointError as error:
        return StepRecord(step, "damaged" if is_committed else "half-written", str(error), manifest)
    return StepRecord(step, "committed", None, manifest)


def inventory(checkpoints_uri: str, depth: Depth) -> Iterator[StepRecord]:
    """All steps that have a folder, ascending, each looked at when it is asked for."""
    committed = set(list_complete(checkpoints_uri))
    for step in list_steps(checkpoints_uri):
        yield look_at(checkpoints_uri, step, depth, step in committed)
