"""Loads a checkpoint as a rank does, and prints what memory that took; a process of its own, whose peak is its own.

    python -m tests.helpers.load_memory CHECKPOINTS STEP FIRST LAST

The rank holds parameters FIRST to LAST of the checkpoint's, whole, with their moments.
"""

import json
import re
import sys
from pathlib import Path

import torch

from trainer.checkpoint import load_ranges
from trainer.fragment_readers import StateView, load_fragments, wanted_ranges
from trainer.fragments import BYTES_PER_ELEMENT, KINDS
from trainer.manifest import read_manifest


def memory_bytes(field: str) -> int:
    """A field of /proc/self/status; `ru_maxrss` would count the process that started this one."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(uri: str, step: int, first: int, last: int) -> None:
    """Load and print one line of JSON."""
    torch.set_num_threads(1)
    manifest = read_manifest(uri, step)
    numels = {name: torch.Size(shape).numel() for name, shape in manifest.state.parameters.items()}
    views = [
        StateView(name, 0, numel, {kind: torch.empty(numel) for kind in KINDS}, (0, numel))
        for name, numel in list(numels.items())[first:last]
    ]
    before = memory_bytes("VmRSS")
    load_fragments(views, load_ranges(uri, manifest, wanted_ranges(views)))
    peak = memory_bytes("VmHWM")
    state = sum(len(KINDS) * BYTES_PER_ELEMENT * view.numel for view in views)
    sys.stdout.write(json.dumps({"taken_bytes": peak - before, "state_bytes": state}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], *(int(argument) for argument in sys.argv[2:5]))
