"""`stormjib status FILE`: where a run stands, read from its folder alone."""

import argparse
import json
from typing import Any, Literal

from cluster.commands.arguments import add_run_file, config_of
from cluster.evaluations import class_table, evaluation_line
from cluster.folder_lock import holder
from cluster.run_store import RunFolder
from cluster.states import RunState
from data_service import storage
from data_service.errors import ConfigError

__all__ = ["CONTROLLER_GONE", "add_arguments", "controller_of", "execute", "status_of"]

CONTROLLER_GONE = "its controller is gone; the same command goes on from its checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, overrides and --json."""
    add_run_file(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def execute(arguments: argparse.Namespace) -> int:
    """Print the status."""
    config = config_of(arguments)
    folder = RunFolder(config.root)
    if not folder.exists():
        raise ConfigError(f"{folder.root}: no run was started here. Start it with `stormjib run {arguments.file}`.")
    status = status_of(folder)
    if arguments.json:
        print(json.dumps(status, ensure_ascii=False))
        return 0
    print(f"{folder.root}: {status['state']}, step {status['step']} of {status['steps']}, attempt {status['attempt']}")
    if status["controller"] == "gone" and not RunState(status["state"]).is_terminal:
        print(CONTROLLER_GONE)
    if status["loss"] is not None:
        print(f"training loss {status['loss']:.4f} on dp {status['dp']} x pp {status['pp']}")
    for step, values in sorted(status["evals"].items(), key=lambda item: int(item[0])):
        print(evaluation_line(int(step), values))
    if status["evals"]:
        for line in class_table(status["evals"][max(status["evals"], key=int)]):
            print(line)
    print(f"checkpoints: {', '.join(map(str, status['checkpoints'])) or 'none'}")
    print(f"recoveries: {len(status['recoveries'])}")
    if status["exported"]:
        print(f"exported: {status['exported']}")
    if status["error"]:
        print(f"error: {status['error']}")
    return 0


def controller_of(folder: RunFolder) -> Literal["alive", "gone", "unknown"]:
    """Whether a process holds the run's folder; an object store cannot tell."""
    if not storage.is_local(folder.root):
        return "unknown"
    return "gone" if holder(folder.root) is None else "alive"


def status_of(folder: RunFolder) -> dict[str, Any]:
    """The status as plain data; the keys are part of the stable surface."""
    from trainer.manifest import list_complete

    events, history = folder.events(), folder.history()
    last = events[-1] if events else {}
    step = history.steps[-1] if history.steps else {}
    exported = [event["uri"] for event in events if event["event"] == "exported"]
    started = max((i for i, event in enumerate(events) if event["event"] == "run_started"), default=0)
    errors = [event["error"] for event in events[started:] if event["event"] == "run_ended" and event.get("error")]
    return {
        "run": folder.root,
        "state": last.get("state", "pending"),
        "controller": controller_of(folder),
        "attempt": last.get("attempt", 0),
        "step": history.last_step,
        "steps": folder.saved_config().get("train", {}).get("steps"),
        "loss": step.get("loss"),
        "dp": step.get("dp"),
        "pp": step.get("pp"),
        "evals": history.evals,
        "checkpoints": list_complete(folder.checkpoints_uri),
        "recoveries": [event for event in events if event["event"] == "recovered"],
        "exported": exported[-1] if exported else None,
        "error": errors[-1] if errors else None,
    }
