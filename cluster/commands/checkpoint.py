"""`stormjib checkpoint list FILE`: the committed checkpoints of a run."""

import argparse
import json

from cluster.commands.arguments import add_run_file, config_of
from cluster.run_store import RunFolder

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The action, FILE, overrides and --json."""
    parser.add_argument("action", choices=["list"], help="list: committed checkpoints, oldest first")
    add_run_file(parser)
    parser.add_argument("--json", action="store_true", help="a JSON array instead of text")


def execute(arguments: argparse.Namespace) -> int:
    """Print the checkpoints."""
    from trainer import manifest

    folder = RunFolder(config_of(arguments).root)
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
