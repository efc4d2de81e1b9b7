"""`stormjib plan FILE`: mesh, batch, stages and sizes of a run, before any slot is taken."""

import argparse
import json
from dataclasses import asdict

from cluster.commands.arguments import add_run_file, config_of
from cluster.config import RunConfig

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
    vocab_size = _vocab_size(config)
    plan = plan_run(
        config.train,
        TransformerConfig.from_section(config.model, vocab_size, config.data.seq_len),
        seq_len=config.data.seq_len,
        slots=config.cluster.total_slots,
        precision=resolve_precision(config.train, "cuda" if config.cluster.node.gpus else "cpu"),
    )
    if arguments.json:
        print(json.dumps({**asdict(plan), "vocab_size": vocab_size}))
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
    return 0


def _vocab_size(config: RunConfig) -> int:
    """Of the prepared dataset; before that, of the tokenizer as it is asked for."""
    from data_service import storage
    from data_service.shards import manifest_uri, read_manifest
    from data_service.tokenizer import read_tokenizer

    if storage.exists(manifest_uri(config.dataset_uri)):
        return read_manifest(config.dataset_uri).vocab_size
    wanted = config.data.tokenizer.to_train
    if wanted is not None:
        return wanted.vocab_size
    assert config.data.tokenizer.path is not None, "a tokenizer is trained or read"
    return int(read_tokenizer(config.data.tokenizer.path).vocab_size)
