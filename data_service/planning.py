"""From a prepared dataset and what a run asks for to a plan; and whether a plan fits a dataset.

Owns how many rows a part has, and how weights become integers. Refuses to know the order that follows from them.
"""

from collections.abc import Sequence

from pydantic import ValidationError

from data_service.errors import ConfigError, CursorMismatchError, EmptySplitError
from data_service.manifest import DatasetManifest, PartInfo, sources_without_rows
from data_service.plan import MAX_PLAN_BYTES, PLAN_VERSION, OrderSpec, Plan, PlanPart, Segment, Split

__all__ = ["check_plan", "make_plan"]

_WEIGHT_UNITS = 10**9


def make_plan(manifest: DatasetManifest, split: Split, spec: OrderSpec) -> Plan:
    """The plan of a split of a prepared dataset.

    Raises:
        EmptySplitError: when the split holds no row.
        ConfigError: when rows were prepared for another length, weights name other sources, or there are more parts,
            rows or shards than a plan can hold.
    """
    if manifest.row_tokens and manifest.row_tokens != spec.seq_len + 1:
        raise ConfigError(
            f"data.seq_len={spec.seq_len} was asked for, the dataset's {manifest.rows} rows were prepared for "
            f"data.seq_len={manifest.row_tokens - 1}. Set it back, or prepare into another data.dataset."
        )
    parts = _parts_of(manifest, split, spec.seq_len)
    if not parts:
        raise EmptySplitError(
            f"the {split} split was asked for, it holds no documents. "
            + ("Set data.split.eval above 0 and prepare again." if split == "eval" else "Add text to data.sources.")
        )
    shuffled = split == "train"
    try:
        plan = Plan(
            version=PLAN_VERSION,
            dataset_digest=manifest.digest,
            split=split,
            rows=manifest.rows,
            seed=spec.seed,
            seq_len=spec.seq_len,
            global_batch=spec.global_batch,
            window_shards=spec.window_shards,
            shuffle=shuffled,
            isolate_documents=spec.isolate_documents,
            loss_masks=manifest.loss_masks,
            num_labels=_num_labels(manifest),
            parts=parts,
            segments=_segments(manifest, parts, spec) if shuffled else _natural(parts, 1.0),
            skip=_joined(spec.skip) if shuffled else (),
        )
    except ValidationError as error:
        raise ConfigError(
            f"dataset {manifest.digest} cannot be put in this order: {error.errors()[0]['msg']} Change what is "
            "named there; for fewer parts name fewer data.sources, or prepare all files at once into another "
            "data.dataset; for fewer shards raise data.shard_tokens."
        ) from error
    if len(plan.to_json()) > MAX_PLAN_BYTES:
        raise ConfigError(
            f"the plan of {len(parts)} parts (sources times the preparations that added files) with "
            f"{len(plan.segments)} sets of weights and {len(plan.skip)} skipped ranges takes {len(plan.to_json())} "
            f"bytes, at most {MAX_PLAN_BYTES} travel with every read. Name fewer data.sources or "
            "data.mixture.changes, or prepare all files at once into another data.dataset."
        )
    return plan


def check_plan(plan: Plan, manifest: DatasetManifest) -> None:
    """Check that a plan fits a dataset, so that what its rows ask for is there.

    Raises:
        CursorMismatchError: when it does not.
    """
    fits = (
        plan.dataset_digest == manifest.digest
        and plan.rows == manifest.rows
        and plan.loss_masks == manifest.loss_masks
        and plan.num_labels == _num_labels(manifest)
        and manifest.row_tokens in (0, plan.seq_len + 1)
        and plan.parts == _parts_of(manifest, plan.split, plan.seq_len)
    )
    if not fits:
        raise CursorMismatchError(
            f"rows of plan {plan.digest} of dataset {plan.dataset_digest} were asked for, this is dataset "
            f"{manifest.digest}, or the plan does not fit it. Ask the workers of that dataset."
        )


def _num_labels(manifest: DatasetManifest) -> int:
    return len(manifest.labels) if manifest.rows == "document" else 0


def _parts_of(manifest: DatasetManifest, split: Split, seq_len: int) -> tuple[PlanPart, ...]:
    """The parts that have rows."""
    parts = (_plan_part(manifest, part, seq_len) for part in manifest.splits[split])
    return tuple(part for part in parts if part.num_rows)


def _joined(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges in order, with those joined that follow each other: equal skips make equal plans."""
    joined: list[tuple[int, int]] = []
    for first, end in ranges:
        if joined and first == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return tuple(joined)


def _plan_part(manifest: DatasetManifest, part: PartInfo, seq_len: int) -> PlanPart:
    """Rows of a part. Stream rows: a shard of S tokens and one more has ceil(S / seq_len) rows.

    The last shard of a part has no token behind it, so S tokens there give S - 1 labels.
    """
    if manifest.rows != "stream":
        return PlanPart(part.source, part.generation, part.num_rows, manifest.shard_rows)
    rows_per_shard = -(-manifest.shard_tokens // seq_len)
    if part.num_shards == 0:
        return PlanPart(part.source, part.generation, 0, rows_per_shard)
    last_tokens = part.num_tokens - (part.num_shards - 1) * manifest.shard_tokens
    last_rows = -(-(last_tokens - 1) // seq_len)
    return PlanPart(part.source, part.generation, (part.num_shards - 1) * rows_per_shard + last_rows, rows_per_shard)


def _rows_by_source(parts: Sequence[PlanPart]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for part in parts:
        rows[part.source] = rows.get(part.source, 0) + part.num_rows
    return rows


def _natural(parts: Sequence[PlanPart], temperature: float) -> tuple[Segment, ...]:
    """Shares by rows; exact at temperature 1, so that an epoch takes every row of every source once."""
    rows = _rows_by_source(parts)
    if temperature == 1.0:
        return (Segment(0, tuple(rows.values())),)
    return (Segment(0, _units([float(count) for count in rows.values()], temperature)),)


def _units(weights: Sequence[float], temperature: float) -> tuple[int, ...]:
    """Shares weight ** (1 / temperature) in billionths, largest remainders rounded up; a weight above 0 stays so."""
    powers = [(weight / max(weights)) ** (1.0 / temperature) if weight else 0.0 for weight in weights]
    exact = [power / sum(powers) * _WEIGHT_UNITS for power in powers]
    units = [max(int(share), 1 if weight else 0) for share, weight in zip(exact, weights, strict=True)]
    positive = [index for index, weight in enumerate(weights) if weight]
    by_remainder = sorted(positive, key=lambda index: (int(exact[index]) - exact[index], index))
    for index in by_remainder[: max(0, _WEIGHT_UNITS - sum(units))]:
        units[index] += 1
    return tuple(units)


def _segments(manifest: DatasetManifest, parts: Sequence[PlanPart], spec: OrderSpec) -> tuple[Segment, ...]:
    names = list(_rows_by_source(parts))
    given = []
    for first, weights in spec.weights:
        wanted = dict(weights)
        if missing := [name for name in names if name not in wanted]:
            raise ConfigError(
                f"weights from global batch {first} on are given for {', '.join(wanted)}, the dataset also holds "
                f"{', '.join(missing)}. Give each source of data.sources a weight."
            )
        absent = [name for name, weight in wanted.items() if weight and name not in names]
        if absent:
            whys = sources_without_rows(manifest)
            told = "; ".join(f"{name}: {whys.get(name, 'the dataset holds no row of it')}" for name in absent[:8])
            raise ConfigError(
                f"weights from global batch {first} on are above 0 for {', '.join(absent[:8])}, of which no row can be "
                f"drawn ({told}). Mend the source and prepare into another data.dataset, or remove it."
            )
        if not any(wanted[name] for name in names):
            raise ConfigError(
                f"weights from global batch {first} on are 0 for every source with rows. Set one of them above 0."
            )
        given.append(Segment(first, _units([wanted[name] for name in names], spec.temperature)))
    if not given or given[0].first_batch:
        given = [*_natural(parts, spec.temperature), *given]
    return tuple(given)
