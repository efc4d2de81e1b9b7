"""The committed-checkpoint contract: what a checkpoint is, and when it exists.

A step's folder `step_00000400/` holds parts that ranks wrote under `attempt_K/`, and `manifest.json`. A step without a
manifest does not exist. Only the controller commits a manifest, once every part's receipt is in and together they cover
every parameter exactly once; the first commit of a step stands, whatever other attempts write, unless a later attempt
had shut its writer out (`trainer.fences`). Values are read by `trainer.checkpoint`. No torch here, so that the
controller may import it.
"""

import contextlib
import json
import logging
import math
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_service import storage
from trainer.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointIncompleteError,
    CommitLostError,
    ManifestInvalidError,
)
from trainer.fences import read_fences
from trainer.fragments import BYTES_PER_ELEMENT, coverage_problems
from trainer.parts import (
    CHUNK_BYTES,
    PartReceipt,
    Slice,
    StoredRange,
    group_slices,
    in_order,
    part_file,
    plan_slices,
    read_slices,
    step_folder,
)
from trainer.train_state import EvalRecord, TrainState

__all__ = [
    "MANIFEST_NAME",
    "MANIFEST_VERSION",
    "EvalRecord",
    "Manifest",
    "PartReceipt",
    "Skipped",
    "StoredRange",
    "TrainState",
    "commit",
    "list_complete",
    "list_steps",
    "manifest_uri",
    "newest_complete",
    "read_manifest",
    "step_folder",
    "verify",
]

MANIFEST_VERSION = 1
MANIFEST_NAME = "manifest.json"
"""Of the file in a step's folder that makes the step exist."""

_LOG = logging.getLogger(__name__)
_REJECTED = "manifest.rejected.json"
_BEGIN = re.compile(rb'\{"step":\d+,"attempt":(\d+),')
_BEGIN_BYTES = 64
_COMMIT_TRIES = 3
_STEP_FOLDER = re.compile(r"step_(\d{8,})")


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
        # not dump_json, which writes a perplexity of infinity as null
        return json.dumps(_adapter(Manifest).dump_python(self, mode="json"), separators=(",", ":"))

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


@dataclass(frozen=True)
class Skipped:
    """A step that looks like a checkpoint and cannot be used."""

    step: int
    reason: str


def commit(
    checkpoints_uri: str, step: int, attempt: int, receipts: Iterable[PartReceipt], state: TrainState
) -> Manifest:
    """Make a step exist. Only the controller calls this, once it holds the receipts of all ranks.

    The first commit of a step stands. Repeating it with the same content is no error, so that a controller which died
    after the write can ask again. A manifest that is there but cannot be used (unreadable, or its parts are damaged) is
    set aside as `manifest.rejected.json` and replaced.

    Args:
        checkpoints_uri: the run's checkpoints.
        step: to commit.
        attempt: whose parts these are.
        receipts: of every rank of the attempt's mesh, in any order.
        state: what the run goes on from.

    Returns:
        The manifest that is now there.

    Raises:
        CheckpointIncompleteError: receipts do not belong to this step and attempt, do not cover every element of every
            kind exactly once, or a part is not where its receipt says.
        CommitLostError: another attempt, or other content, was committed first; or a later attempt has begun from an
            earlier step.
    """
    manifest = Manifest(step, attempt, state, tuple(sorted(receipts, key=lambda receipt: receipt.rank)))
    step_uri = storage.join(checkpoints_uri, step_folder(step))
    problems = [*_contradictions(manifest), *_missing_files(step_uri, manifest)]
    if problems:
        raise CheckpointIncompleteError(
            f"Step {step}, attempt {attempt} cannot be committed: {_some(problems)}. It does not exist; "
            "the run goes on from an older one."
        )
    _refuse_shut_out(checkpoints_uri, manifest)
    uri, text = manifest_uri(checkpoints_uri, step), manifest.to_json().encode()
    for _ in range(_COMMIT_TRIES):
        if storage.put_if_absent(uri, text):
            _refuse_shut_out(checkpoints_uri, manifest)  # a mark that came meanwhile rules out what was put
            return manifest
        try:
            standing = read_manifest(checkpoints_uri, step)
            if standing.to_json() == manifest.to_json():  # ours: a put was repeated after its answer got lost
                return manifest
            verify(checkpoints_uri, step)
            break
        except CheckpointError as error:
            _LOG.warning("Step %d has a manifest that cannot be used; it is replaced: %s", step, error)
            with contextlib.suppress(FileNotFoundError):
                storage.write_bytes(storage.join(step_uri, _REJECTED), storage.read_bytes(uri))
            storage.remove_file(uri)
    else:
        raise CommitLostError(
            f"Attempt {attempt} asked to commit step {step}, where others put manifests that cannot be used each time "
            "one is taken away. End the other controllers of this run."
        )
    raise CommitLostError(
        f"Attempt {attempt} asked to commit step {step}, which attempt {standing.attempt} has committed. What is there "
        "stands; go on from it, or with a higher step."
    )


def list_complete(checkpoints_uri: str) -> list[int]:
    """Steps that have a manifest which counts, ascending. Whether it can be used is `verify`'s to say."""
    fences = read_fences(checkpoints_uri)
    found = ((step, _attempt_of(checkpoints_uri, step)) for step in list_steps(checkpoints_uri))
    return [step for step, attempt in found if attempt is not None and fences.shut_out(attempt, step) is None]


def read_manifest(checkpoints_uri: str, step: int) -> Manifest:
    """The manifest of a step.

    Raises:
        CheckpointIncompleteError: the step was not committed.
        ManifestInvalidError: what is there is no manifest of this step, or contradicts itself.
    """
    uri = manifest_uri(checkpoints_uri, step)
    try:
        manifest = Manifest.from_json(storage.read_bytes(uri))
    except FileNotFoundError as error:
        raise CheckpointIncompleteError(
            f"{storage.join(checkpoints_uri, step_folder(step))} has no {MANIFEST_NAME}: its save was not finished. "
            "Use another step."
        ) from error
    except ManifestInvalidError as error:
        raise ManifestInvalidError(f"{uri}: {error}") from error
    problems = list(_contradictions(manifest))
    if manifest.step != step:
        problems.append(f"it is the manifest of step {manifest.step}")
    if problems:
        raise ManifestInvalidError(f"{uri} contradicts itself: {_some(problems)}. Use another step.")
    mark = read_fences(checkpoints_uri).shut_out(manifest.attempt, step)
    if mark is not None:
        raise CheckpointIncompleteError(
            f"{uri} was put by attempt {manifest.attempt} behind the back of attempt {mark[0]}, which had gone on from "
            f"step {mark[1]}: it does not count. Use another step."
        )
    return manifest


def verify(checkpoints_uri: str, step: int, deep: bool = True) -> Manifest:
    """Check that a step can be loaded.

    Args:
        checkpoints_uri: the run's checkpoints.
        step: to check.
        deep: read every byte and compare checksums; otherwise only look that each part is there in its full length.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: it cannot; the message names the file and what is wrong.
    """
    manifest = read_manifest(checkpoints_uri, step)
    step_uri = storage.join(checkpoints_uri, step_folder(step))
    missing = _missing_files(step_uri, manifest)
    if missing:
        raise CheckpointCorruptError(f"{step_uri}: {_some(missing)}. Use another step.")
    if deep:
        for _ in in_order(lambda group: len(read_slices(step_uri, group)), group_slices(_all_slices(manifest))):
            pass
    return manifest


def newest_complete(
    checkpoints_uri: str, deep: bool = True, trusted: Collection[int] = ()
) -> tuple[Manifest | None, list[Skipped]]:
    """The newest step that can be loaded.

    Args:
        checkpoints_uri: the run's checkpoints.
        deep: as of `verify`. Ranks verify what they load in any case; without it a damaged byte shows only there.
        trusted: steps of which it is enough to see that all parts are there in full length.

    Returns:
        Its manifest, or None when no step can be loaded; and the newer steps that were passed over, with reasons.
    """
    skipped: list[Skipped] = []
    for step in reversed(list_steps(checkpoints_uri)):
        try:
            return verify(checkpoints_uri, step, deep and step not in trusted), skipped
        except CheckpointError as error:
            skipped.append(Skipped(step, str(error)))
    return None, skipped


def manifest_uri(checkpoints_uri: str, step: int) -> str:
    """Where the manifest of a step lies, or would."""
    return storage.join(checkpoints_uri, step_folder(step), MANIFEST_NAME)


def _attempt_of(checkpoints_uri: str, step: int) -> int | None:
    """The attempt that a manifest names, from its first bytes; None without a manifest, all attempts if unreadable."""
    try:
        begin = storage.read_range(manifest_uri(checkpoints_uri, step), 0, _BEGIN_BYTES)
    except FileNotFoundError:
        return None
    found = _BEGIN.match(begin)
    return sys.maxsize if found is None else int(found[1])


def _refuse_shut_out(checkpoints_uri: str, manifest: Manifest) -> None:
    """Raise CommitLostError where a later attempt has begun from an earlier step."""
    mark = read_fences(checkpoints_uri).shut_out(manifest.attempt, manifest.step)
    if mark is not None:
        raise CommitLostError(
            f"Attempt {manifest.attempt} asked to commit step {manifest.step}, and attempt {mark[0]} has gone on from "
            f"step {mark[1]} meanwhile: another controller has taken the run over. This one ends."
        )


def list_steps(checkpoints_uri: str) -> list[int]:
    """Steps that have a folder, ascending; half-written ones are among them."""
    found = (_STEP_FOLDER.fullmatch(name) for name in storage.list_names(checkpoints_uri))
    return sorted(int(matched[1]) for matched in found if matched is not None)


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """What in a manifest cannot be true."""
    state = manifest.state
    if state.step != manifest.step:
        yield f"its state is of step {state.step}"
    ranks = [part.rank for part in manifest.parts]
    if ranks != list(range(state.dp * state.pp)):
        yield f"the {state.dp} x {state.pp} mesh wrote parts of ranks {ranks}"
    for part in manifest.parts:
        if (part.step, part.attempt) != (manifest.step, manifest.attempt):
            yield f"rank {part.rank} wrote step {part.step} of attempt {part.attempt}"
        if part.file != part_file(part.attempt, part.rank):
            yield f"rank {part.rank} names {part.file!r} as its file"
        for stored in part.ranges:
            num_bytes = stored.numel * BYTES_PER_ELEMENT
            if stored.offset < 0 or stored.offset + num_bytes > part.num_bytes:
                yield f"rank {part.rank}: {stored.kind} of {stored.name} lies beyond the end of its file"
            if len(stored.crcs) != -(-num_bytes // CHUNK_BYTES):
                yield f"rank {part.rank}: {stored.kind} of {stored.name} has {len(stored.crcs)} checksums"
    numels = {name: math.prod(shape) for name, shape in state.parameters.items()}
    ranges = (stored.range for part in manifest.parts for stored in part.ranges)
    yield from coverage_problems(ranges, numels, state.kinds)


def _missing_files(step_uri: str, manifest: Manifest) -> list[str]:
    """Parts that are not there in their full length."""
    problems = []
    for part in manifest.parts:
        try:
            size = storage.file_size(storage.join(step_uri, part.file))
        except FileNotFoundError:
            problems.append(f"{part.file} is not there")
            continue
        if size != part.num_bytes:
            problems.append(f"{part.file} has {size} of {part.num_bytes} bytes")
    return problems


def _all_slices(manifest: Manifest) -> Iterator[Slice]:
    for part in manifest.parts:
        for stored in part.ranges:
            yield from plan_slices(part.file, stored, stored.range)


def _some(problems: list[str]) -> str:
    return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
