"""`stormjib checkpoint list FILE`: the committed checkpoints of a run; `checkpoint drop FILE --after N`: go back."""

import argparse
import json

from cluster.commands.arguments import add_run_file, config_of
from cluster.config import RunConfig
from cluster.run_store import RunFolder
from data_service.errors import ConfigError

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The action, FILE, overrides, --json and --after."""
    parser.add_argument(
        "action",
        choices=["list", "drop"],
        help="list: committed checkpoints, oldest first; drop: move those behind step N to checkpoints/superseded, so "
        "that the run goes on from an older one",
    )
    add_run_file(parser)
    parser.add_argument("--after", type=int, metavar="N", help="with drop: the newest step to keep")
    parser.add_argument("--json", action="store_true", help="a JSON array instead of text")


def execute(arguments: argparse.Namespace) -> int:
    """Print the checkpoints, or move the newest aside."""
    config = config_of(arguments)
    if arguments.action == "drop":
        return _drop(config, arguments.after)
    if arguments.after is not None:
        raise ConfigError("checkpoint list --after: only `checkpoint drop` takes a step. Leave it out.")
    from trainer import manifest

    folder = RunFolder(config.root)
    losses = {step: values["loss"] for step, values in folder.history().evals.items()}
    rows = []
    for step in manifest.list_complete(folder.checkpoints_uri):
        found = manifest.read_manifest(folder.checkpoints_uri, step)
        rows.append(
            {
                "step": step,
                "attempt": found.attempt,
                "dp": found.state.dp,
                "pp": found.state.pp,
                "bytes": sum(receipt.num_bytes for receipt in found.parts),
                "eval_loss": losses.get(step),
                "uri": f"{folder.checkpoints_uri}/step_{step:08d}",
            }
        )
    if arguments.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        loss = f"held-out loss {row['eval_loss']:.4f}" if row["eval_loss"] is not None else "not evaluated"
        size = f"{int(row['bytes'] or 0) / 2**20:,.1f} MiB"
        print(f"step {row['step']:>8}  dp {row['dp']} x pp {row['pp']}  {size}  {loss}")
    if not rows:
        print(f"{folder.checkpoints_uri}: no committed checkpoint")
    return 0


def _drop(config: RunConfig, after: int | None) -> int:
    """Set the checkpoints behind a step aside."""
    from cluster.rewind import rewind

    if after is None:
        raise ConfigError("checkpoint drop: which step is the newest to keep? Add --after N.")
    step, moved = rewind(config, after)
    told = f"steps {', '.join(map(str, moved))} were moved to {RunFolder(config.root).checkpoints_uri}/superseded"
    print(f"{told if moved else 'no checkpoint lies behind it'}; the run goes on from step {step}")
    return 0
