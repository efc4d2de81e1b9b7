"""`stormjib prepare FILE`: turn the sources into a dataset, in this process."""

import argparse

from cluster.commands.arguments import add_run_file, config_of

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE and overrides."""
    add_run_file(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Prepare and print what came out."""
    config = config_of(arguments)
    from cluster.console import RunConsole
    from data_service.prepare import prepare

    console = RunConsole(total_steps=0)
    manifest = prepare(config.data, config.dataset_uri, progress=console.prepare)
    for name, split in manifest.splits.items():
        print(f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens, {split.num_shards} shards")
    print(
        f"rejected: {manifest.num_rejects:,} records"
        + (f", see {config.dataset_uri}/rejects.jsonl" if manifest.num_rejects else "")
    )
    print(f"dataset {manifest.digest} at {config.dataset_uri}")
    return 0
