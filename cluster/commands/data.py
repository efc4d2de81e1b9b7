"""`stormjib data stats FILE` and `stormjib data show FILE --step N`: what a dataset holds, what a step is fed."""

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluster.commands.arguments import add_run_file, config_of
from cluster.config import RunConfig
from data_service.errors import ConfigError

if TYPE_CHECKING:
    from data_service.manifest import DatasetManifest
    from data_service.plan import Plan
    from data_service.row_view import ShownRow, TextPiece
    from data_service.stats import Lengths, MixtureShares, Statistics

__all__ = ["add_arguments", "execute"]

_BAR = 40
_SHOWN_CHARACTERS = 240
_SHOWN_LABEL = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The action, FILE, overrides and what to show."""
    parser.add_argument(
        "action",
        choices=["stats", "show"],
        help="stats: what the dataset holds and what the run draws from it; show: the rows of a step",
    )
    add_run_file(parser)
    parser.add_argument("--step", type=int, metavar="N", help="show: the step, from 1, as in metrics.jsonl")
    parser.add_argument("--split", choices=["train", "eval"], help="show: of which rows (default: train)")
    parser.add_argument("--slots", metavar="A:B", help="show: the rows [A, B) of the global batch (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def execute(arguments: argparse.Namespace) -> int:
    """Print what was asked for."""
    config = config_of(arguments)
    from cluster.run_data import dataset_of_run
    from data_service.manifest import read_manifest

    if arguments.action == "show":
        _check_show(arguments)
    elif unused := [name for name in ("step", "split", "slots") if getattr(arguments, name) is not None]:
        raise ConfigError(f"--{unused[0]} was given with stats; it goes with `stormjib data show`. Leave it out.")
    dataset = dataset_of_run(config, read_manifest(config.dataset_uri))
    if arguments.action == "stats":
        _stats(config, dataset, as_json=arguments.json)
    else:
        _show(config, dataset, arguments)
    return 0


def _plan(config: RunConfig, dataset: "DatasetManifest", split: str) -> "Plan":
    from cluster.run_data import order_of
    from data_service.planning import make_plan

    return make_plan(dataset, "eval" if split == "eval" else "train", order_of(config))


def _stats(config: RunConfig, dataset: "DatasetManifest", *, as_json: bool) -> None:
    from data_service.counts import read_counts
    from data_service.stats import describe

    plans = {"train": _plan(config, dataset, "train")}
    if dataset.num_tokens("eval") > 1:
        plans["eval"] = _plan(config, dataset, "eval")
    counts = read_counts(config.dataset_uri, dataset.generation)
    found = describe(config.dataset_uri, dataset, counts, plans, config.train.steps)
    if as_json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
        return
    for line in _stats_lines(found):
        print(line)


def _stats_lines(found: "Statistics") -> Iterator[str]:
    yield f"dataset {found.digest}, generation {found.generation}, at {found.dataset}"
    yield f"{found.kind} rows of {found.seq_len} tokens; vocabulary of {found.vocab_size:,}"
    for one in found.sources:
        yield ""
        yield (
            f"{one.source}: {one.files:,} files, {one.records:,} records; left out: {one.duplicates:,} duplicates, "
            f"{one.rejects:,} rejected; {one.truncated:,} lost their end"
        )
        for reason, count in sorted(one.reject_reasons.items(), key=lambda item: (-item[1], item[0])):
            yield f"  rejected {count:>10,}  {reason}"
        for reason, count in one.left_out.items():
            yield f"  left out {count:>10,}  {reason}"
        for name, split in one.splits.items():
            if split.lengths is None:
                yield f"  {name}: no documents"
                continue
            per_token = split.bytes / (split.tokens + split.cut_tokens)
            cut = f" and {split.cut_tokens:,} cut off" * bool(split.cut_tokens)
            yield (
                f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens{cut} ({per_token:.2f} bytes each), "
                f"{split.rows:,} rows, {split.padding:.1%} of them padding"
            )
            for label, count in split.labels.items():
                yield f"    class {_label(label)}: {count:,}"
            yield from _length_lines(split.lengths)
    yield ""
    yield from _mixture_lines(found.mixture)


def _length_lines(lengths: "Lengths") -> Iterator[str]:
    yield (
        f"    tokens a document: min {lengths.min:,}, mean {lengths.mean:,.1f}, p50 {lengths.p50:,}, "
        f"p95 {lengths.p95:,}, p99 {lengths.p99:,}, max {lengths.max:,}"
    )
    most = max(count for _, count in lengths.histogram)
    for least, count in lengths.histogram:
        bar = "#" * round(_BAR * count / most) or ("." if count else "")
        yield f"    {f'{least:,} … {2 * least - 1:,}':>23} {count:>12,} {bar}"


def _mixture_lines(mixture: "MixtureShares") -> Iterator[str]:
    skipped = f", {mixture.skipped_batches:,} batches skipped" if mixture.skipped_batches else ""
    yield f"{mixture.steps:,} steps draw {sum(mixture.rows.values()):,} rows{skipped}"
    width = max(map(len, mixture.rows))
    for name, rows in mixture.rows.items():
        yield f"  {name:<{width}} {rows:>14,} rows, {mixture.shares[name]:>7.2%}, {mixture.epochs[name]:,.2f} epochs"
    if len(mixture.segments) > 1:
        for segment in mixture.segments:
            end = "on" if segment.end_batch is None else f"to {segment.end_batch - 1:,}"
            shares = ", ".join(f"{name} {share:.2%}" for name, share in segment.shares.items())
            yield f"  batches {segment.first_batch:,} {end}: {shares}"


def _check_show(arguments: argparse.Namespace) -> None:
    if arguments.step is None:
        raise ConfigError("`stormjib data show` shows the rows of a step. Name it with --step N, from 1.")
    if arguments.step < 1:
        raise ConfigError(f"--step {arguments.step} was asked for; steps count from 1, as in metrics.jsonl.")


def _slots(text: str | None, size: int) -> tuple[int, int]:
    """The range that --slots names, within a batch of `size` rows."""
    if text is None:
        return 0, size
    first, colon, last = text.partition(":")
    try:
        low, high = int(first or 0), int(last) if last else (size if colon else int(first) + 1)
    except ValueError:
        low, high = 0, 0
    if not 0 <= low < high <= size:
        raise ConfigError(
            f"--slots {text} was asked for; the batch has the slots 0 to {size - 1}. Give a range A:B of them (B is "
            "the one behind the last), or one slot."
        )
    return low, high


def _show(config: RunConfig, dataset: "DatasetManifest", arguments: argparse.Namespace) -> None:
    from data_service.hashing import sample_hash
    from data_service.row_view import rows_of_step

    split = arguments.split or "train"
    plan = _plan(config, dataset, split)
    index = arguments.step - 1
    if split == "train" and arguments.step > config.train.steps:
        raise ConfigError(
            f"--step {arguments.step} was asked for, train.steps={config.train.steps}. Name a step of the run, or "
            f"raise it (train.steps={arguments.step})."
        )
    if split == "eval" and index >= plan.num_batches:
        raise ConfigError(
            f"--step {arguments.step} was asked for, the evaluation split has {plan.num_batches} batches of up to "
            f"{plan.global_batch} rows. Name one of them."
        )
    size = min(plan.global_batch, plan.num_rows - index * plan.global_batch) if split == "eval" else plan.global_batch
    slots = _slots(arguments.slots, size)
    rows = rows_of_step(config.dataset_uri, dataset, plan, index, slots)
    head = {"step": arguments.step, "split": split, "batch": plan.batch_at(index), "dataset": dataset.digest}
    if arguments.json:
        import numpy as np

        shown = list(rows)
        if slots == (0, size):
            ids = np.array([row.row_id for row in shown], dtype=np.uint64)
            head["sample_hash"] = sample_hash(ids, np.array([row.crc for row in shown], dtype=np.uint32))
        print(json.dumps({**head, "rows": [row.to_dict() for row in shown]}, ensure_ascii=False))
        return
    print(f"step {head['step']} ({split}): global batch {head['batch']}, slots {slots[0]} to {slots[1] - 1} of {size}")
    for row in rows:
        for line in _row_lines(row):
            print(line)


def _row_lines(row: "ShownRow") -> Iterator[str]:
    label = "" if row.label is None else f", class {_label(row.label)}"
    yield (
        f"slot {row.slot}: row {row.row} of {row.source}, generation {row.generation} ({row.shard}, id "
        f"{row.row_id:#x}), {row.length} tokens, {row.num_labels} labels{label}"
    )
    masked = any(not piece.counts for piece in row.pieces)
    for piece in row.pieces:
        yield f"  {piece.first:>6} {_mark(piece, masked)} {_shortened(_printable(piece.text))}"


def _mark(piece: "TextPiece", masked: bool) -> str:
    """How a piece is marked: `|` where a document begins, and in rows with masked parts `+` or `-`: counts or not."""
    return ("|" if piece.starts_document else " ") + (("+" if piece.counts else "-") if masked else "")


def _printable(text: str) -> str:
    """Text without anything that a terminal would act on."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _label(text: str) -> str:
    """A class's name on one line of a terminal."""
    shown = _printable(text)
    return shown if len(shown) <= _SHOWN_LABEL else f"{shown[:_SHOWN_LABEL]}…"


def _shortened(text: str) -> str:
    left = len(text) - _SHOWN_CHARACTERS
    return text if left <= 0 else f"{text[:_SHOWN_CHARACTERS]}… ({left:,} characters more, see --json)"
