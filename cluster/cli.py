"""The command line: parses arguments, loads the one command that is wanted, turns errors into messages and exit codes.

Exit 0: done. 1: the run failed. 2: the user's mistake (argparse uses 2 as well). 130: interrupted.
"""

import argparse
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from data_service.errors import StormjibError

__all__ = ["main"]

_LOG = logging.getLogger(__name__)
_HINTS = {
    errno.ENOSPC: "Free some space, or set run.storage (and TMPDIR) to another disk",
    errno.EDQUOT: "Free some space, or set run.storage (and TMPDIR) to another disk",
    errno.EACCES: "Choose a place that this user may write",
    errno.EPERM: "Choose a place that this user may write",
    errno.EROFS: "Choose a place that this user may write",
    errno.ENOENT: "Check the path",
    errno.EADDRINUSE: "Choose another port, or 0 for a free one",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
}
_COMMANDS: dict[str, str] = {
    "run": "prepare, train, promote and serve, until Ctrl-C",
    "plan": "tell mesh, batch, stages and sizes of a run before any slot is taken",
    "prepare": "turn the sources into a dataset",
    "train": "prepare and train, then export",
    "serve": "serve the promoted checkpoint of a run",
    "data": "tell what a dataset holds, or show the rows of a step",
    "generate": "complete a prompt with a model folder or a run",
    "export": "write a checkpoint as a Hugging Face folder",
    "checkpoint": "list, verify or export checkpoints, or go back to an older one",
    "status": "tell where a run stands",
    "logs": "print the log of a run's ranks",
    "profile": "ask a run for a trace of its next steps",
    "stop": "ask a run to write a checkpoint and end",
    "doctor": "look for what would keep a run from working here",
    "config": "check a run file, or show every key with its value",
    "k8s": "render a run for KubeRay",
}


_ALL_LINES = "(?s).*"
"""Ray 2.60 prints what raylets complain of to the driver's terminal although no logs were asked for: forty lines for a
node that was lost, which the run reports itself. Its own setting for lines to leave out keeps them in its log files."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _ALL_LINES)
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, command = _parser(arguments[0] if arguments else None)
    if command is None:
        parser.parse_args(arguments)
        parser.print_help()
        return 2
    parsed = command.parse_intermixed_args(arguments[1:])  # overrides may stand after options
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
    except Exception as error:
        text = _environment_failure(error)
        if text is None:
            raise
        _LOG.debug("%s failed", parsed.command, exc_info=error)
        print(f"stormjib {parsed.command}: {text}", file=sys.stderr)
        return 1


def _environment_failure(error: Exception) -> str | None:
    """One line for a failure of the machine, the store or Ray; None for what is a fault of the program."""
    ray = sys.modules.get("ray.exceptions")  # without it loaded, nothing of Ray can have been raised
    kind, text = type(error).__name__, str(error).strip().rstrip(".")
    if isinstance(error, OSError):
        return f"{kind}: {text}. {_HINTS.get(error.errno or 0, 'Check the path or address, and try again')}."
    if ray is not None and isinstance(error, ray.RayError):
        # the end of a remote traceback names the cause
        return f"{kind}: {text.splitlines()[-1] if text else 'Ray failed'}. See `stormjib logs` and `stormjib doctor`."
    return None


def _parser(wanted: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None]:
    """The parser of everything, and that of the wanted command, whose module alone is imported."""
    parser = argparse.ArgumentParser(prog="stormjib", description="From a CSV of text to a streaming endpoint.")
    commands = parser.add_subparsers(metavar="COMMAND")
    found = None
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == wanted:
            module = importlib.import_module(f"cluster.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(command=name, execute=module.execute)
            found = command
    return parser, found
