"""`stormjib checkpoint list|verify|export|drop FILE`: the checkpoints of a run, as they lie in its folder."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from cluster.commands import export
from cluster.commands.arguments import add_run_file, config_of
from cluster.config import RunConfig
from cluster.run_store import RunFolder
from data_service.errors import ConfigError

if TYPE_CHECKING:
    from trainer.inventory import Depth, StepRecord

__all__ = ["add_arguments", "execute"]

_OPTIONS = {
    "list": ("json",),
    "verify": ("json", "step", "shallow"),
    "export": ("step", "out", "dtype"),
    "drop": ("after",),
}
_FLAGS = {"json": False, "step": None, "shallow": False, "out": None, "dtype": None, "after": None}
"""Every option, and what it is when it was not given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The action, FILE, overrides, and the options of the actions."""
    parser.add_argument(
        "action",
        choices=list(_OPTIONS),
        help="list: what is there, oldest first; verify: compare every byte with its checksum (exit code 1 when a "
        "committed step is damaged); export: write one as a Hugging Face folder; drop: move those behind step N to "
        "checkpoints/superseded, so that the run goes on from an older one",
    )
    add_run_file(parser)
    parser.add_argument("--json", action="store_true", help="with list and verify: a JSON array instead of text")
    parser.add_argument("--shallow", action="store_true", help="with verify: look at the lengths of files only")
    parser.add_argument("--after", type=int, metavar="N", help="with drop: the newest step to keep")
    export.add_options(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Do what was asked; verify exits with 1 when a committed step is damaged, or none is there."""
    for name, absent in _FLAGS.items():
        if getattr(arguments, name) != absent and name not in _OPTIONS[arguments.action]:
            takes = ", ".join(f"--{option}" for option in _OPTIONS[arguments.action])
            raise ConfigError(f"checkpoint {arguments.action} --{name}: it takes {takes}. Leave --{name} out.")
    if arguments.action == "export":
        return export.execute(arguments)
    config = config_of(arguments)
    if arguments.action == "drop":
        return _drop(config, arguments.after)
    return _list(config, arguments.json) if arguments.action == "list" else _verify(config, arguments)


def _list(config: RunConfig, as_json: bool) -> int:
    from trainer.inventory import inventory

    folder = RunFolder(config.root)
    scores = folder.history().evals
    rows = [_row(folder, record, scores.get(record.step)) for record in inventory(folder.checkpoints_uri, "manifest")]
    if as_json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(_line(row))
    if not rows:
        print(f"{folder.checkpoints_uri}: no checkpoint")
    return 0


def _verify(config: RunConfig, arguments: argparse.Namespace) -> int:
    from trainer.inventory import inventory, look_at
    from trainer.manifest import list_complete

    folder = RunFolder(config.root)
    uri = folder.checkpoints_uri
    depth: Depth = "sizes" if arguments.shallow else "bytes"
    if arguments.step is None:
        records = inventory(uri, depth)
    else:
        step = arguments.step
        if step not in (committed := list_complete(uri)):
            found = ", ".join(map(str, committed)) or "none"
            raise ConfigError(
                f"{uri}: no checkpoint of step {step}; committed: {found}. Name one of those with --step."
            )
        records = iter([look_at(uri, step, depth, is_committed=True)])
    rows = []
    for record in records:
        rows.append(_row(folder, record, None))
        if not arguments.json:
            print(_verdict(rows[-1], depth), flush=True)  # a large one takes a while
    if arguments.json:
        print(json.dumps(rows))
    elif not any(row["status"] != "half-written" for row in rows):
        print(f"{uri}: no committed checkpoint")
    statuses = {row["status"] for row in rows}
    return 0 if "committed" in statuses and "damaged" not in statuses else 1


def _row(folder: RunFolder, record: "StepRecord", evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """One step as JSON."""
    found = record.manifest
    return {
        "step": record.step,
        "status": record.status,
        "reason": record.reason,
        "attempt": found and found.attempt,
        "dp": found and found.state.dp,
        "pp": found and found.state.pp,
        "zero_stage": found and found.state.zero_stage,
        "bytes": found and sum(receipt.num_bytes for receipt in found.parts),
        "eval_loss": evaluation and evaluation["loss"],
        "uri": f"{folder.checkpoints_uri}/step_{record.step:08d}",
    }


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "committed":
        return f"step {row['step']:>8}  {row['status']}: {row['reason']}"
    loss = f"held-out loss {row['eval_loss']:.4f}" if row["eval_loss"] is not None else "not evaluated"
    mesh = f"dp {row['dp']} x pp {row['pp']} zero {row['zero_stage']}"
    return f"step {row['step']:>8}  {mesh}  {row['bytes'] / 2**20:,.1f} MiB  {loss}"


def _verdict(row: dict[str, Any], depth: str) -> str:
    if row["status"] != "committed":
        return f"step {row['step']:>8}  {row['status']}: {row['reason']}"
    looked = "every byte is right" if depth == "bytes" else "every part has its length"
    return f"step {row['step']:>8}  whole: {looked} ({row['bytes'] / 2**20:,.1f} MiB)"


def _drop(config: RunConfig, after: int | None) -> int:
    """Set the checkpoints behind a step aside."""
    from cluster.rewind import rewind

    if after is None:
        raise ConfigError("checkpoint drop: which step is the newest to keep? Add --after N.")
    step, moved = rewind(config, after)
    told = f"steps {', '.join(map(str, moved))} were moved to {RunFolder(config.root).checkpoints_uri}/superseded"
    print(f"{told if moved else 'no checkpoint lies behind it'}; the run goes on from step {step}")
    return 0
