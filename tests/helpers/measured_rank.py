"""Ranks in processes of their own that tell how much memory they took: what predictions are compared with.

    python -m tests.helpers.measured_rank SPEC.json

A rank imports everything, forgets its peak so far (clear_refs of proc(5)), trains and writes a checkpoint as every rank
does, and prints one line of JSON: resident bytes after the imports, and the peak since. On a GPU it is the allocator's
peak.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.ranks import specs_of
from trainer.protocol import NoHooks, WorkerSpec

__all__ = ["Measured", "measure"]

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Measured:
    """What one rank took."""

    rank: int
    imported_bytes: int
    """Resident after the imports."""
    peak_bytes: int
    """At most from then on, less what the imports took; on GPUs the allocator's peak."""
    step_s: float
    """Seconds of the last step."""


def measure(spec: WorkerSpec, timeout_s: float = 170.0) -> list[Measured]:
    """Run all ranks of an attempt on this machine; returns what each took.

    Raises:
        RuntimeError: a rank failed; the message holds the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="stormjib-measure-") as folder:
        children = []
        for one in specs_of(spec):
            file = Path(folder, f"rank{one.rank}.json")
            file.write_text(one.to_json(), encoding="utf-8")
            log = Path(folder, f"rank{one.rank}.log").open("w+b")  # noqa: SIM115
            command = [sys.executable, "-m", "tests.helpers.measured_rank", str(file)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(one.threads)}
            children.append(
                (log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=_ROOT, env=environment))
            )
        found = []
        try:
            for log, child in children:
                out, _ = child.communicate(timeout=timeout_s)
                if child.returncode:
                    log.seek(0)
                    raise RuntimeError(f"a rank ended with {child.returncode}: {log.read()[-3000:].decode()}")
                found.append(Measured(**json.loads(out.decode().splitlines()[-1])))
        finally:
            for log, child in children:
                child.kill()
                child.wait()
                log.close()
        return sorted(found, key=lambda one: one.rank)


class _Timed(NoHooks):
    """Keeps the seconds of the last step."""

    step_s = 0.0

    def report(self, report: object) -> None:
        self.step_s = getattr(report, "step_s", self.step_s)


def _be_measured(spec: WorkerSpec) -> Measured:
    from tests.helpers.made_rows import MadeRows
    from trainer import worker

    worker.preload(spec.device)
    import torch

    from trainer.device_memory import peak_bytes, resident_bytes
    from trainer.loop import train
    from trainer.process_group import close_process_group

    device = torch.device(spec.device, spec.local_rank) if spec.device == "cuda" else torch.device("cpu")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    imported = resident_bytes()
    hooks = _Timed()
    rank = worker.open_rank(spec, hooks, MadeRows(spec.train.global_batch, spec.seq_len, spec.vocab_size))
    train(rank)
    peak = peak_bytes(device)
    close_process_group()
    return Measured(spec.rank, imported, peak - (imported if spec.device == "cpu" else 0), hooks.step_s)


if __name__ == "__main__":
    measured = _be_measured(WorkerSpec.from_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
    sys.stdout.write(json.dumps(measured.__dict__) + "\n")
    sys.stdout.flush()
    os._exit(0)
