"""The committed-checkpoint contract: what a checkpoint is, and when it exists.

A step's folder `step_00000400/` holds parts that ranks wrote under `attempt_K/`, and `manifest.json`. A step without a
manifest does not exist. Only the controller commits a manifest, once every part's receipt is in and together they cover
every parameter exactly once; the first commit of a step stands, whatever other attempts write. Values are read by
`trainer.checkpoint`. No torch here, so that the controller may import it.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import JsonValue, TypeAdapter, ValidationError

from trainer.errors import ManifestInvalidError
from trainer.fragments import KINDS, Kind, Range

__all__ = [
    "MANIFEST_VERSION",
    "EvalRecord",
    "Manifest",
    "PartReceipt",
    "StoredRange",
    "TrainState",
    "step_folder",
]

MANIFEST_VERSION = 1

_STEP_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class StoredRange:
    """One fragment inside a part file."""

    name: str
    kind: Kind
    start: int
    numel: int
    offset: int
    """Of its first byte in the file."""
    crcs: tuple[int, ...]
    """CRC-32 of each `CHUNK_BYTES` of its bytes, so that a slice of it is verified without reading all of it."""

    @property
    def range(self) -> Range:
        """Where the values belong."""
        return Range(self.name, self.kind, self.start, self.numel)


@dataclass(frozen=True)
class PartReceipt:
    """What a rank says of the part it has written."""

    step: int
    attempt: int
    rank: int
    file: str
    """Path below the step's folder, such as `attempt_3/rank_00000.safetensors`."""
    num_bytes: int
    ranges: tuple[StoredRange, ...]


@dataclass(frozen=True)
class EvalRecord:
    """The evaluation at a checkpoint."""

    loss: float
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class TrainState:
    """What a run goes on from, beside the fragments."""

    step: int
    """Steps of the run: the checkpoint's name."""
    optimizer_steps: int
    """Updates that the optimizer has made: its bias correction goes on from here."""
    plan_digest: str
    """Of the training rows' plan; with `consumed_batches` the data cursor."""
    consumed_batches: int
    dataset_digest: str
    seed: int
    seq_len: int
    global_batch: int
    dp: int
    pp: int
    zero_stage: int
    precision: str
    model: dict[str, int | float | bool]
    """The fields of `trainer.model.TransformerConfig`."""
    parameters: dict[str, tuple[int, ...]]
    """Canonical name to shape of every trained parameter (`trainer.model.parameter_shapes`)."""
    config: dict[str, JsonValue]
    """The run's resolved configuration."""
    versions: dict[str, str]
    """Packages and their versions."""
    kinds: tuple[Kind, ...] = KINDS
    """What is stored of each parameter."""
    evaluation: EvalRecord | None = None


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint."""

    step: int
    attempt: int
    """The attempt whose parts it names."""
    state: TrainState
    parts: tuple[PartReceipt, ...]
    version: int = field(default=MANIFEST_VERSION, kw_only=True)

    def to_json(self) -> str:
        """One line of JSON."""
        return _adapter(Manifest).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """The inverse of `to_json`.

        Raises:
            ManifestInvalidError: the text is no manifest, or of a version that is not known here.
        """
        try:
            found: Manifest = _adapter(Manifest).validate_json(text)
        except ValidationError as error:
            raise ManifestInvalidError(f"This is no checkpoint manifest: {error}") from error
        if found.version != MANIFEST_VERSION:
            raise ManifestInvalidError(
                f"The manifest has version {found.version}, this release reads version {MANIFEST_VERSION}. "
                "Use the release that wrote it."
            )
        return found


def step_folder(step: int) -> str:
    """Name of a step's folder: `step_00000400`."""
    return f"step_{step:08d}"


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
