"""`stormjib export FILE`: write a committed checkpoint as a Hugging Face folder."""

import argparse
from typing import Literal

from cluster.commands.arguments import add_run_file, config_of
from cluster.run_store import RunFolder
from data_service import storage
from data_service.errors import ConfigError

__all__ = ["add_arguments", "add_options", "execute"]

_DTYPES: dict[str, Literal["F32", "BF16"]] = {"fp32": "F32", "bf16": "BF16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, overrides, the step, the folder and the dtype."""
    add_run_file(parser)
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which step, where to, and in what dtype."""
    parser.add_argument("--step", type=int, help="the checkpoint; by default the one `serve.promote` asks for")
    parser.add_argument("--out", metavar="DIR", help="the folder to write; by default export/ in the run's folder")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="of the written weights; by default fp32, as trained")


def execute(arguments: argparse.Namespace) -> int:
    """Export and print where."""
    from cluster.policies import choose_promotion
    from cluster.promotion import export_step
    from trainer import manifest

    config = config_of(arguments)
    folder = RunFolder(config.root)
    complete = manifest.list_complete(folder.checkpoints_uri)
    scores = folder.history().scores
    step = arguments.step if arguments.step is not None else choose_promotion(complete, scores, config.serve.promote)
    if step is None or step not in complete:
        found = ", ".join(map(str, complete)) or "none"
        asked = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise ConfigError(f"{folder.checkpoints_uri}: {asked}; committed: {found}. Name one of those with --step.")
    out = _absolute(arguments.out) if arguments.out else folder.export_uri(step)
    print(export_step(config, step, out, _DTYPES.get(arguments.dtype, "F32")).uri)
    return 0


def _absolute(out: str) -> str:
    """A path of this machine without its relative parts; a URI as it is."""
    return str(storage.local_path(out).expanduser().resolve()) if storage.is_local(out) else out
