"""What a prepared dataset holds, and what a run will draw from it.

    stats.json (counts per source) + manifest + plan ─ describe ─▶ Statistics

Owns these figures. Reads no shard: it costs the same at any scale. Refuses to print.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_service.counts import SourceCounts, SplitCounts
from data_service.manifest import SPLITS, DatasetManifest
from data_service.mixture import counts_before
from data_service.plan import Plan

__all__ = ["Lengths", "MixtureShares", "SegmentShares", "SourceStatistics", "SplitStatistics", "Statistics", "describe"]

_QUANTILES = (("p50", 0.50), ("p95", 0.95), ("p99", 0.99))


@dataclass(frozen=True)
class Lengths:
    """Documents by length in tokens, end token included. Lengths of 64 and more are known to 3 %, the mean exactly."""

    min: int
    mean: float
    p50: int
    p95: int
    p99: int
    max: int
    histogram: tuple[tuple[int, int], ...]
    """(power of two, documents of that length and more, below the next power), ascending, without gaps."""


@dataclass(frozen=True)
class SplitStatistics:
    """A source in one split."""

    documents: int
    tokens: int
    """In the shards, end tokens included."""
    cut_tokens: int
    """Of chats and labelled texts, behind the end of their row."""
    bytes: int
    """Of text, in UTF-8."""
    rows: int
    padding: float
    """Share of the rows' places that hold no token; stream rows have some at the ends of their shards alone."""
    lengths: Lengths | None
    """None where there is no document."""
    labels: Mapping[str, int]
    """Class → documents."""


@dataclass(frozen=True)
class SourceStatistics:
    """One source."""

    source: str
    files: int
    records: int
    rejects: int
    reject_reasons: Mapping[str, int]
    duplicates: int
    truncated: int
    """Chats and labelled texts that lost their end."""
    left_out: Mapping[str, int]
    """Reason → good documents that are in no row."""
    splits: Mapping[str, SplitStatistics]


@dataclass(frozen=True)
class SegmentShares:
    """Global batches with one set of weights."""

    first_batch: int
    end_batch: int | None
    """The batch behind the last; None for the last set of weights."""
    shares: Mapping[str, float]
    """Source → share of the rows."""
    rows: Mapping[str, int]
    """Source → rows that the run draws here, skipped batches left out."""


@dataclass(frozen=True)
class MixtureShares:
    """What a run of so many steps draws."""

    steps: int
    rows: Mapping[str, int]
    shares: Mapping[str, float]
    epochs: Mapping[str, float]
    """Source → rows drawn / rows it has."""
    skipped_batches: int
    """Before the last batch that is drawn."""
    segments: tuple[SegmentShares, ...]


@dataclass(frozen=True)
class Statistics:
    """Everything; field names are those of `stormjib data stats --json`."""

    dataset: str
    digest: str
    generation: int
    kind: str
    seq_len: int
    vocab_size: int
    sources: tuple[SourceStatistics, ...]
    mixture: MixtureShares

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def describe(
    dataset_uri: str,
    manifest: DatasetManifest,
    counts: Sequence[SourceCounts],
    plans: Mapping[str, Plan],
    steps: int,
) -> Statistics:
    """The statistics of a dataset under a run's plans.

    Args:
        dataset_uri: named in the result.
        manifest: a generation of the dataset.
        counts: of `read_counts` for the same generation.
        plans: split → plan; `train` must be there, `eval` where it has rows.
        steps: optimizer steps of the run.
    """
    sources = []
    for one in counts:
        splits: dict[str, SplitStatistics] = {split: _split(one, split, manifest, plans) for split in SPLITS}
        sources.append(
            SourceStatistics(
                source=one.source,
                files=one.num_files,
                records=one.num_records,
                rejects=one.num_rejects,
                reject_reasons=one.reject_reasons,
                duplicates=one.num_duplicates,
                truncated=one.num_truncated,
                left_out=one.left_out,
                splits=splits,
            )
        )
    return Statistics(
        dataset=dataset_uri,
        digest=manifest.digest,
        generation=manifest.generation,
        kind=manifest.rows,
        seq_len=plans["train"].seq_len,
        vocab_size=manifest.vocab_size,
        sources=tuple(sources),
        mixture=_mixture(plans["train"], steps),
    )


def _split(counts: SourceCounts, split: str, manifest: DatasetManifest, plans: Mapping[str, Plan]) -> SplitStatistics:
    found = counts.splits[split]
    plan = plans.get(split)
    rows = sum(part.num_rows for part in plan.parts if part.source == counts.source) if plan is not None else 0
    stored = sum(part.num_tokens for part in manifest.splits[split] if part.source == counts.source)
    # In a stream row the first token is the row before's last; the first row of a part has one of its own.
    places = 0 if plan is None else rows * (plan.seq_len + (manifest.rows != "stream"))
    return SplitStatistics(
        documents=found.documents,
        tokens=stored,
        cut_tokens=found.tokens - stored,
        bytes=found.num_bytes,
        rows=rows,
        padding=max(0.0, 1.0 - stored / places) if places else 0.0,
        lengths=_lengths(found),
        labels=dict(counts.labels.get(split, {})),
    )


def _lengths(counts: SplitCounts) -> Lengths | None:
    if not counts.documents:
        return None
    ordered = sorted(counts.lengths.items())
    quantiles = {}
    for name, share in _QUANTILES:
        wanted, passed = share * counts.documents, 0
        for length, documents in ordered:
            passed += documents
            if passed >= wanted:
                quantiles[name] = length
                break
    octaves: Counter[int] = Counter()
    for length, documents in ordered:
        octaves[length.bit_length() - 1] += documents
    histogram = tuple((2**power, octaves[power]) for power in range(min(octaves), max(octaves) + 1))
    return Lengths(
        min=ordered[0][0],
        mean=counts.tokens / counts.documents,
        max=ordered[-1][0],
        histogram=histogram,
        **quantiles,
    )


def _mixture(plan: Plan, steps: int) -> MixtureShares:
    """What the first `steps` steps draw; exact, by the closed form that the order itself uses."""
    names = [name for name, _ in plan.sources]
    sizes = {name: sum(plan.parts[index].num_rows for index in indices) for name, indices in plan.sources}
    end = plan.batch_at(steps - 1) + 1 if steps else 0
    ends = [*(segment.first_batch for segment in plan.segments[1:]), None]
    segments = []
    for segment, behind in zip(plan.segments, ends, strict=True):
        drawn = Counter(dict.fromkeys(names, 0))
        for first, last in _consumed(plan, segment.first_batch, end if behind is None else min(end, behind)):
            before, after = (
                counts_before(segment.weights, (batch - segment.first_batch) * plan.global_batch)
                for batch in (first, last)
            )
            drawn.update({name: a - b for name, a, b in zip(names, after, before, strict=True)})
        total = sum(segment.weights)
        shares = {name: weight / total for name, weight in zip(names, segment.weights, strict=True)}
        segments.append(SegmentShares(segment.first_batch, behind, shares, dict(drawn)))
    rows = {name: sum(segment.rows[name] for segment in segments) for name in names}
    total_rows = sum(rows.values())
    return MixtureShares(
        steps=steps,
        rows=rows,
        shares={name: count / total_rows if total_rows else 0.0 for name, count in rows.items()},
        epochs={name: count / sizes[name] for name, count in rows.items()},
        skipped_batches=end - steps,
        segments=tuple(segments),
    )


def _consumed(plan: Plan, first: int, end: int) -> list[tuple[int, int]]:
    """The ranges of batches in [first, end) that are not skipped."""
    ranges = []
    for low, high in plan.skip:
        if low >= end:
            break
        if first < low:
            ranges.append((first, low))
        first = max(first, high)
    if first < end:
        ranges.append((first, end))
    return ranges
