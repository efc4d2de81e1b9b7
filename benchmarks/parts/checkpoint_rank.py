"""One rank of `benchmarks.checkpoint`, in a process of its own; prints one line of JSON.

    python -m benchmarks.parts.checkpoint_rank train|load SPEC.json

`train` runs the training loop as every rank does, with the clock read at each report; `load` builds an engine on the
mesh of its specification, loads the checkpoint that this names, and stops.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.helpers.made_rows import MadeRows
from trainer.protocol import NoHooks, PartReport, ReadyReport, Report, StepReport, WorkerSpec, report_to_json


class _Clock(NoHooks):
    """Remembers what was reported and when."""

    def __init__(self) -> None:
        self.steps: dict[int, float] = {}
        self.parts: list[PartReport] = []
        self.phases: dict[str, float] = {}

    def report(self, report: Report) -> None:
        """Called by the loop, and for parts by the writing thread."""
        if isinstance(report, StepReport):
            self.steps[report.step] = time.perf_counter()
        elif isinstance(report, PartReport):
            self.parts.append(report)
        elif isinstance(report, ReadyReport):
            self.phases = report.phases


def _weights_digest(rank: Any) -> str:
    """Of the computing weights, which every dp rank holds whole at pp 1."""
    found = hashlib.blake2b(digest_size=8)
    for named in sorted(rank.engine.parameters, key=lambda one: one.name):
        found.update(named.parameter.detach().cpu().float().contiguous().view(-1).numpy().data)
    return found.hexdigest()


def main(action: str, spec: WorkerSpec) -> dict[str, Any]:
    """Be the rank."""
    from trainer import worker

    worker.preload(spec.device)
    from trainer.loop import train
    from trainer.process_group import close_process_group

    clock = _Clock()
    rank = worker.open_rank(spec, clock, MadeRows(spec.train.global_batch, spec.seq_len, spec.vocab_size))
    if action == "train":
        train(rank)
    told = {
        "rank": spec.rank,
        "steps": clock.steps,
        "parts": [json.loads(report_to_json(part)) for part in clock.parts],
        "phases": clock.phases,
        "weights": _weights_digest(rank),
        "state_bytes": sum(12 * view.numel for view in rank.engine.views),
    }
    close_process_group()
    return told


if __name__ == "__main__":
    specification = WorkerSpec.from_json(Path(sys.argv[2]).read_text(encoding="utf-8"))
    sys.stdout.write(json.dumps(main(sys.argv[1], specification)) + "\n")
    sys.stdout.flush()
    os._exit(0)
