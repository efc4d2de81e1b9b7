"""`stormjib plan FILE`: mesh, batch, stages, sizes and data of a run, before any slot is taken."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.commands.arguments import add_run_file, config_of
from cluster.config import RunConfig

if TYPE_CHECKING:
    from data_service.manifest import DatasetManifest
    from data_service.plan import Plan

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, overrides and --json."""
    add_run_file(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def execute(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from trainer.deepspeed_config import resolve_precision
    from trainer.model import TransformerConfig
    from trainer.planner import plan_run

    config = config_of(arguments)
    dataset = _prepared(config)
    vocab_size = _vocab_size(config) if dataset is None else dataset.vocab_size
    data = None if dataset is None else _data(config, dataset)
    plan = plan_run(
        config.train,
        TransformerConfig.from_section(config.model, vocab_size, config.data.seq_len),
        seq_len=config.data.seq_len,
        slots=config.cluster.total_slots,
        precision=resolve_precision(config.train, "cuda" if config.cluster.node.gpus else "cpu"),
    )
    if arguments.json:
        print(json.dumps({**asdict(plan), "vocab_size": vocab_size, "data": data}))
        return 0
    print(f"mesh: dp {plan.dp} x pp {plan.pp} on {plan.slots} slots, ZeRO {plan.zero_stage}, {plan.precision}")
    print(f"model: {plan.parameters:,} parameters, vocabulary {vocab_size:,}")
    print(
        f"step: {plan.tokens_per_step:,} tokens, {plan.num_micro_batches} micro-batches of {plan.micro_batch} rows a "
        f"rank, {plan.masked_rows} masked rows, pipeline bubble {plan.bubble:.0%}"
    )
    for stage in plan.stages:
        sizes = [stage.weight_bytes, stage.gradient_bytes, stage.optimizer_bytes]
        weights, gradients, optimizer = (f"{size / 2**20:,.1f} MiB" for size in sizes)
        print(
            f"stage {stage.stage}: {stage.blocks} blocks; a rank keeps {weights} of weights, {gradients} of gradients, "
            f"{optimizer} of optimizer states"
        )
    if data is None:
        print("data: not prepared yet; `stormjib prepare` tells rows and epochs")
        return 0
    print(
        f"data: {data['rows']:,} rows of {config.data.seq_len:,} tokens, {data['batches']:,} global batches an epoch; "
        f"{config.train.steps:,} steps are {data['epochs']:.2f} epochs"
    )
    for name, epochs in data["sources"].items():
        print(f"source {name}: {epochs:.2f} epochs")
    return 0


def _prepared(config: RunConfig) -> "DatasetManifest | None":
    """The generation that the run would read; None before it is prepared."""
    from cluster.run_data import dataset_of_run
    from data_service.manifest import read_manifests

    found = read_manifests(config.dataset_uri)
    return dataset_of_run(config, found[-1]) if found else None


def _data(config: RunConfig, dataset: "DatasetManifest") -> dict[str, Any]:
    """Rows, batches and epochs of the run: over all sources, and of each with its weights."""
    from cluster.run_data import train_plan

    plan = train_plan(config, dataset)
    stop = plan.batch_at(config.train.steps - 1) + 1
    drawn = [0.0] * plan.num_sources
    for segment, after in zip(plan.segments, [*plan.segments[1:], None], strict=True):
        end = stop if after is None else min(stop, after.first_batch)
        rows = plan.global_batch * _consumed(plan, segment.first_batch, end)
        for number, weight in enumerate(segment.weights):
            drawn[number] += rows * weight / sum(segment.weights)
    sizes = [sum(plan.parts[part].num_rows for part in parts) for _, parts in plan.sources]
    return {
        "rows": plan.num_rows,
        "batches": plan.num_batches,
        "epochs": config.train.steps * plan.global_batch / plan.num_rows,
        "sources": {name: drawn[number] / sizes[number] for number, (name, _) in enumerate(plan.sources)},
    }


def _consumed(plan: "Plan", first: int, end: int) -> int:
    """Global batches of [first, end) that are not skipped."""
    skipped = sum(max(0, min(end, last) - max(first, begin)) for begin, last in plan.skip)
    return max(0, end - first - skipped)


def _vocab_size(config: RunConfig) -> int:
    """Of the tokenizer as it is asked for."""
    from data_service.tokenizer import read_tokenizer

    wanted = config.data.tokenizer.to_train
    if wanted is not None:
        return wanted.vocab_size
    assert config.data.tokenizer.path is not None, "a tokenizer is trained or read"
    return int(read_tokenizer(config.data.tokenizer.path).vocab_size)
