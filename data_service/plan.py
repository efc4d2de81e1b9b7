"""The plan of a split: all that the order of rows depends on, and nothing else.

    OrderSpec (what a run asks for) + DatasetManifest ─ planning.make_plan ─▶ Plan ─ order.rows_of_batches ─▶ row ids

Owns `OrderSpec`, `Plan`, their JSON forms and digests. A plan is a few hundred bytes at any scale; it travels in every
ticket, so that data workers keep no state. Refuses to know files, ranks or workers.

A plan only ever grows behind what was consumed: a change of weights or a skipped range that begins later leaves
`digest_at` of the batches before it as it was, so a cursor taken before fits the longer plan.
"""

import hashlib
import json
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from data_service.config import DataConfig, RowKind
from data_service.errors import CursorMismatchError

__all__ = [
    "MAX_PARTS",
    "MAX_PLAN_BYTES",
    "PART_SHIFT",
    "PLAN_VERSION",
    "OrderSpec",
    "Plan",
    "PlanPart",
    "Segment",
    "Split",
    "part_of_rows",
    "row_id_of",
]

Split = Literal["train", "eval"]

PLAN_VERSION = 2
"""Changes whenever the same fields would mean another order."""
MAX_PARTS = 4096
MAX_PART_ROWS = 2**44
MAX_WEIGHT_SUM = 2**46
"""Of weights, and of rows where they stand for weights; see `mixture`."""
MAX_SHARDS = 2**32
"""Of a part."""
MAX_SEGMENTS = 257
MAX_SKIPS = 256
MAX_PLAN_BYTES = 2**17
"""Of its JSON: a plan travels in every ticket."""
PART_SHIFT = 48
_MIN_TEMPERATURE, _MAX_TEMPERATURE, _MAX_WEIGHT = 0.01, 1e6, 1e9
_BOUNDS = {
    "seed": (0, 2**63),
    "seq_len": (1, 2**24),
    "global_batch": (1, 2**31),
    "window_shards": (1, 2**20),
}
"""[least, one above the most) of what a run chooses; the configuration has these bounds or closer ones."""
_STRICT = ConfigDict(strict=True, extra="forbid")


def row_id_of(part: int, row: int) -> int:
    """The id of a row: its part in the upper 16 bits, its number in the part in the lower 48."""
    return part << PART_SHIFT | row


def part_of_rows(row_id: int) -> tuple[int, int]:
    """The inverse of `row_id_of`: (part, row)."""
    return row_id >> PART_SHIFT, row_id & ((1 << PART_SHIFT) - 1)


@checked_dataclass(frozen=True, config=_STRICT)
class OrderSpec:
    """What a run asks of the order of its rows."""

    seed: int
    seq_len: int
    global_batch: int
    window_shards: int
    isolate_documents: bool = False
    temperature: float = 1.0
    weights: tuple[tuple[int, tuple[tuple[str, float], ...]], ...] = ()
    """(first batch, ((source, weight), …)) in order; without an entry for batch 0 the sources' rows are the weights."""
    skip: tuple[tuple[int, int], ...] = ()
    """[first, end) of global batches that are never consumed."""

    def __post_init__(self) -> None:
        """Check what could not be computed with; the rest is checked where a plan is made of it.

        Raises:
            ValueError: for a number out of range, or a source that is named twice.
        """
        for name, (low, high) in _BOUNDS.items():
            if not low <= getattr(self, name) < high:
                raise ValueError(f"order: {name}={getattr(self, name)} is not in [{low}, {high}).")
        if not _MIN_TEMPERATURE <= self.temperature <= _MAX_TEMPERATURE:
            raise ValueError(f"order: temperature={self.temperature} is not in 0.01 … 1e6.")
        for first, weights in self.weights:
            if len({name for name, _ in weights}) != len(weights):
                raise ValueError(f"order: a source has two weights from global batch {first} on.")
            if not all(0 <= weight < _MAX_WEIGHT for _, weight in weights):
                raise ValueError(f"order: a weight from global batch {first} on is not in [0, 1e9).")

    @classmethod
    def from_config(cls, data: DataConfig, *, seed: int, global_batch: int) -> "OrderSpec":
        """What the `data` section, `run.seed` and `train.global_batch` ask for."""
        weights = []
        if data.sources[0].weight is not None:
            given = zip(data.source_names, data.sources, strict=True)
            weights.append((0, tuple((name, float(source.weight or 0.0)) for name, source in given)))
        for change in data.mixture.changes:
            weights.append((change.first_batch, tuple((name, change.weights[name]) for name in data.source_names)))
        return cls(
            seed=seed,
            seq_len=data.seq_len,
            global_batch=global_batch,
            window_shards=data.shuffle_window_shards,
            isolate_documents=data.isolate_documents,
            temperature=data.mixture.temperature,
            weights=tuple(weights),
            skip=tuple((one.first, one.end) for one in data.skip),
        )

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "OrderSpec":
        """Read a specification from the network.

        Raises:
            ValueError: when it is not one.
        """
        spec: OrderSpec = _parsed(_ORDER_SPEC, text, "order")
        return spec


@checked_dataclass(frozen=True, config=_STRICT)
class PlanPart:
    """Rows of one source that one preparation wrote."""

    source: str
    generation: int
    num_rows: int
    rows_per_shard: int
    """Row r lies in shard r // rows_per_shard of the part."""

    @property
    def num_shards(self) -> int:
        """Shards that hold the rows."""
        return -(-self.num_rows // self.rows_per_shard)


@checked_dataclass(frozen=True, config=_STRICT)
class Segment:
    """From a global batch on, these weights."""

    first_batch: int
    weights: tuple[int, ...]
    """One for each source, in the order in which sources first occur in `parts`; shares are weight / sum."""


@checked_dataclass(frozen=True, config=_STRICT)
class Plan:
    """A split, cut into rows and put in order.

    Global batches are numbered absolutely; those in `skip` are never consumed. Step index i (0-based) consumes batch
    `batch_at(i)`. Everything outside this module and `order` speaks of step indices.
    """

    version: int
    dataset_digest: str
    split: Split
    rows: RowKind
    seed: int
    seq_len: int
    """Tokens that a row feeds to the model; a row holds one more."""
    global_batch: int
    """Rows per optimizer step, on every mesh."""
    window_shards: int
    """Shards whose rows are shuffled together."""
    shuffle: bool
    """Whether rows are permuted and epochs repeat without end (train), or come once in file order (eval)."""
    isolate_documents: bool
    """Whether the label that is a document's first token is masked."""
    loss_masks: bool
    """Whether rows carry a mask of the labels that count."""
    num_labels: int
    """Classes; 0 where rows carry no label."""
    parts: tuple[PlanPart, ...]
    """In the manifest's order; none is empty."""
    segments: tuple[Segment, ...]
    """In order, the first at batch 0; exactly one in an eval plan."""
    skip: tuple[tuple[int, int], ...]
    """Disjoint ranges [first, end) in order; none in an eval plan."""

    def __post_init__(self) -> None:
        """Check what a ticket from the network could get wrong.

        Raises:
            ValueError: for a value out of range.
            CursorMismatchError: for another version of the order.
        """
        if self.version != PLAN_VERSION:
            raise CursorMismatchError(
                f"a plan of version {self.version} was asked for, this is version {PLAN_VERSION}: the order of rows "
                "would differ. Use the release that started the run."
            )
        bounds = {
            **{name: (getattr(self, name), low, high) for name, (low, high) in _BOUNDS.items()},
            "num_labels": (self.num_labels, 0, 2**20),
            "parts": (len(self.parts), 1, MAX_PARTS + 1),
            "segments": (len(self.segments), 1, MAX_SEGMENTS + 1),
            "skip": (len(self.skip), 0, MAX_SKIPS + 1),
            "the sum of parts.num_rows": (sum(part.num_rows for part in self.parts), 0, MAX_WEIGHT_SUM),
        }
        for number, part in enumerate(self.parts):
            bounds[f"parts.{number}.num_rows"] = (part.num_rows, 1, MAX_PART_ROWS)
            bounds[f"parts.{number}.rows_per_shard"] = (part.rows_per_shard, 1, 2**32)
            bounds[f"parts.{number}.num_shards"] = (part.num_rows // max(1, part.rows_per_shard), 0, MAX_SHARDS - 1)
        before = -1
        for number, segment in enumerate(self.segments):
            bounds[f"segments.{number}.first_batch"] = (segment.first_batch, before + 1, 2**40)
            bounds[f"segments.{number}.weights"] = (len(segment.weights), self.num_sources, self.num_sources + 1)
            bounds[f"the sum of segments.{number}.weights"] = (sum(segment.weights), 1, MAX_WEIGHT_SUM)
            bounds[f"the least of segments.{number}.weights"] = (min(segment.weights, default=0), 0, MAX_WEIGHT_SUM)
            before = segment.first_batch
        before = 0
        for number, (first, end) in enumerate(self.skip):
            bounds[f"skip.{number}"] = (first, before, 2**40)
            bounds[f"the end of skip.{number}"] = (end, first + 1, 2**40 + 1)
            before = end
        for name, (value, low, high) in bounds.items():
            if not low <= value < high:
                raise ValueError(f"plan: {name}={value} is not in [{low}, {high}).")
        if len({(part.source, part.generation) for part in self.parts}) < len(self.parts):
            raise ValueError("plan: a source comes twice in one generation; its rows would come in the same order.")
        if self.segments[0].first_batch != 0:
            raise ValueError("plan: the first segment does not begin at batch 0.")
        if not self.shuffle and (len(self.segments) > 1 or self.skip):
            raise ValueError("plan: rows in file order have neither changes of weights nor skipped batches.")

    def __hash__(self) -> int:
        """The digest stands for the plan: hashing costs once, however many parts there are."""
        return hash(self.digest)

    @cached_property
    def sources(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(source, its parts' indices), in the order in which sources first occur in `parts`."""
        found: dict[str, list[int]] = {}
        for index, part in enumerate(self.parts):
            found.setdefault(part.source, []).append(index)
        return tuple((name, tuple(indices)) for name, indices in found.items())

    @property
    def num_sources(self) -> int:
        """Distinct sources."""
        return len(self.sources)

    @cached_property
    def num_rows(self) -> int:
        """Rows of all parts: of one epoch, where no weights are set."""
        return sum(part.num_rows for part in self.parts)

    @property
    def num_batches(self) -> int:
        """Global batches of one pass over `num_rows`. An eval plan ends there, its last batch short."""
        return -(-self.num_rows // self.global_batch)

    def batch_at(self, step: int) -> int:
        """The absolute number of the global batch that step index `step` (0-based) consumes."""
        batch = step
        for first, end in self.skip:
            if batch < first:
                break
            batch += end - first
        return batch

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-128 of the canonical JSON, as hexadecimal digits."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def digest_at(self, consumed: int) -> str:
        """The digest of what decides the first `consumed` steps: later segments and skips are left out."""
        end = self.batch_at(consumed - 1) + 1 if consumed else 0
        segments = tuple(one for one in self.segments if one.first_batch < max(1, end))
        skip = tuple(one for one in self.skip if one[0] < end)
        return replace(self, segments=segments, skip=skip).digest

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Plan":
        """Read a plan, checking keys, types and bounds.

        Raises:
            ValueError: when it is not a plan.
            CursorMismatchError: when it is one of another version.
        """
        plan: Plan = _parsed(_PLAN, text, "plan")
        return plan


_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)
_ORDER_SPEC: TypeAdapter[OrderSpec] = TypeAdapter(OrderSpec)


def _parsed(adapter: TypeAdapter[Any], text: str | bytes, what: str) -> Any:
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"this is no {what}: {where}: {problem['msg']}"[:500]) from None
