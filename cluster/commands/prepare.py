"""`stormjib prepare FILE`: turn the sources into a dataset, on the CPUs of this machine."""

import argparse

from cluster.commands.arguments import add_run_file, config_of

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE and overrides."""
    add_run_file(parser)
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes that read and encode (default: one a CPU)"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Prepare and print what came out."""
    config = config_of(arguments)
    from cluster.console import RunConsole
    from data_service.errors import ConfigError
    from data_service.manifest import SPLITS
    from data_service.mapping import ProcessMapper
    from data_service.prepare import prepare

    if arguments.processes is not None and arguments.processes < 1:
        raise ConfigError(f"--processes={arguments.processes}: at least one process is needed. Raise it.")
    console = RunConsole(total_steps=0)
    with ProcessMapper(arguments.processes) as mapper:
        manifest = prepare(config.data, config.dataset_uri, mapper=mapper, progress=console.prepare)
    for split in SPLITS:
        num_shards = sum(part.num_shards for part in manifest.parts(split))
        documents, tokens = manifest.num_documents(split), manifest.num_tokens(split)
        print(f"{split}: {documents:,} documents, {tokens:,} tokens, {num_shards} shards")
    print(
        f"left out: {manifest.num_duplicates:,} duplicates; rejected: {manifest.num_rejects:,} records"
        + (f", see {config.dataset_uri}/rejects*.jsonl" if manifest.num_rejects else "")
    )
    print(f"dataset {manifest.digest}, generation {manifest.generation}, at {config.dataset_uri}")
    return 0
