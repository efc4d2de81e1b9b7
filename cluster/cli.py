"""The command line: parses arguments, loads the one command that is wanted, turns errors into messages and exit codes.

Exit 0: done. 1: the run failed. 2: the user's mistake (argparse uses 2 as well). 130: interrupted.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from data_service.errors import StormjibError

__all__ = ["main"]

_COMMANDS: dict[str, str] = {
    "run": "prepare, train, promote and serve, until Ctrl-C",
    "prepare": "turn the sources into a dataset",
    "train": "prepare and train, then export",
    "serve": "serve the promoted checkpoint of a run",
    "generate": "complete a prompt with a model folder or a run",
    "export": "write a checkpoint as a Hugging Face folder",
    "checkpoint": "list checkpoints",
    "status": "tell where a run stands",
    "logs": "print the log of a run's ranks",
    "stop": "ask a run to write a checkpoint and end",
    "doctor": "look for what would keep a run from working here",
    "config": "check a run file, or show every key with its value",
    "k8s": "render a run for KubeRay",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(arguments[0] if arguments else None)
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help()
        return 2
    try:
        return int(parsed.execute(parsed))
    except StormjibError as error:
        print(f"stormjib {parsed.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"stormjib {parsed.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser; only the wanted command's module is imported, the others are listed by name."""
    parser = argparse.ArgumentParser(prog="stormjib", description="From a CSV of text to a streaming endpoint.")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == wanted:
            module = importlib.import_module(f"cluster.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(command=name, execute=module.execute)
    return parser
