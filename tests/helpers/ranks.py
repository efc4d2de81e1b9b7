"""Ranks as processes on this machine: all of an attempt, with a deadline; a hang is a failure.

Ranks are forked from a server process that has imported torch and deepspeed, so that a mesh starts in well under a
second of CPU time. What they report is collected as JSON, as a node agent would.
"""

import contextlib
import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from trainer.protocol import (
    EvalReport,
    FinishedReport,
    PartReport,
    ReadyReport,
    Report,
    StepReport,
    StopAfter,
    WorkerSpec,
    report_from_json,
    report_to_json,
)

Program = Callable[[WorkerSpec, "QueueHooks"], Any]
"""What a rank runs; it must be importable, and what it returns must be JSON-like."""

DEADLINE_S = 90.0
GRACE_S = 2.0
"""After a first failure the other ranks get this long to tell theirs."""


class RanksFailedError(AssertionError):
    """Some rank failed, or all took too long."""

    def __init__(self, message: str, failures: dict[int, str]) -> None:
        super().__init__(message)
        self.failures = failures


class QueueHooks:
    """The hooks of a rank in a child process."""

    def __init__(self, spec: WorkerSpec, sent: Any, stop_after: int | None) -> None:
        self._spec, self._sent = spec, sent
        self._stop_after = stop_after
        self.snapshots: list[int] = []

    def report(self, report: Report) -> None:
        self._sent.put((self._spec.rank, "report", report_to_json(report)))

    def control(self) -> StopAfter | None:
        return None if self._stop_after is None else StopAfter(self._stop_after)

    def profile(self) -> None:
        return None

    def snapshot(self, step: int, fragments: Sequence[Any]) -> None:
        self.snapshots.append(step)

    def wants_snapshot(self, step: int) -> bool:
        return False


@dataclass
class Outcome:
    """What the ranks of one attempt said."""

    reports: dict[int, list[Report]] = field(default_factory=dict)
    returned: dict[int, Any] = field(default_factory=dict)
    wall_s: float = 0.0
    logs: list[Path] = field(default_factory=list)
    """What each rank wrote to its standard output and error."""

    def _all(self, kind: type) -> list[Any]:
        return [report for reports in self.reports.values() for report in reports if isinstance(report, kind)]

    @property
    def steps(self) -> dict[int, StepReport]:
        return {report.step: report for report in self._all(StepReport)}

    @property
    def evals(self) -> dict[int, EvalReport]:
        return {report.step: report for report in self._all(EvalReport)}

    @property
    def parts(self) -> dict[int, list[PartReport]]:
        found: dict[int, list[PartReport]] = {}
        for report in self._all(PartReport):
            found.setdefault(report.step, []).append(report)
        return found

    @property
    def ready(self) -> list[ReadyReport]:
        return self._all(ReadyReport)

    @property
    def finished(self) -> list[FinishedReport]:
        return self._all(FinishedReport)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def specs_of(spec: WorkerSpec) -> list[WorkerSpec]:
    """The specifications of all ranks of an attempt, from any one of them; a fresh rendezvous port."""
    port = free_port()
    return [
        replace(spec, rank=rank, local_rank=rank, world_size=spec.dp * spec.pp, master_port=port)
        for rank in range(spec.dp * spec.pp)
    ]


class RankServer:
    """Starts ranks; keep one for a test session."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.helpers.rank_preload"])
        self._runs = 0

    def run(
        self,
        program: Program,
        specs: Sequence[WorkerSpec],
        stop_after: dict[int, int] | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> Outcome:
        """Run a program on every rank and wait for all.

        Args:
            program: what each rank runs.
            specs: one for each rank.
            stop_after: rank -> step it is asked to stop after, from its first step on.
            deadline_s: ranks that are not done by then are killed.

        Raises:
            RanksFailedError: a rank raised, died or hung; the message holds every rank's story.
        """
        self._runs += 1
        sent = self._context.Queue()
        began = time.monotonic()
        children: list[ForkServerProcess] = []
        logs = [self._folder / f"run{self._runs:03d}-rank{spec.rank}.log" for spec in specs]
        for spec, log in zip(specs, logs, strict=True):
            stop = None if stop_after is None else stop_after.get(spec.rank)
            child = self._context.Process(target=_be_rank, args=(program, spec.to_json(), sent, str(log), stop))
            child.start()
            children.append(child)
        outcome, failures = Outcome(logs=logs), dict[int, str]()
        waiting = {spec.rank for spec in specs}
        try:
            while waiting and not failures:
                if time.monotonic() - began > deadline_s:
                    failures |= dict.fromkeys(waiting, f"not done after {deadline_s:g} s")
                    break
                try:
                    rank, kind, payload = sent.get(timeout=0.2)
                except queue.Empty:
                    for spec, child in zip(specs, children, strict=True):
                        if spec.rank in waiting and child.exitcode not in (None, 0):
                            failures[spec.rank] = f"exit code {child.exitcode}"
                    continue
                if kind == "report":
                    outcome.reports.setdefault(rank, []).append(report_from_json(payload))
                else:
                    waiting.discard(rank)
                    (failures if kind == "failed" else outcome.returned)[rank] = payload
            if failures:
                self._hear_the_others(sent, waiting, failures)
        finally:
            for child in children:
                child.join(timeout=5.0 if not failures else 0.1)
                if child.is_alive():
                    child.kill()
                    child.join()
        outcome.wall_s = time.monotonic() - began
        if failures:
            told = "\n".join(f"--- rank {rank}: {story}" for rank, story in sorted(failures.items()))
            said = "\n".join(f"--- {log.name}:\n{log.read_text()[-1500:]}" for log in logs if log.exists())
            raise RanksFailedError(f"ranks failed:\n{told}\n{said}", failures)
        return outcome

    @staticmethod
    def _hear_the_others(sent: Any, waiting: set[int], failures: dict[int, str]) -> None:
        """Give the other ranks a moment to say how they ended."""
        until = time.monotonic() + GRACE_S
        while waiting - failures.keys() and (left_s := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                rank, kind, payload = sent.get(timeout=left_s)
                if kind == "failed":
                    failures[rank] = payload


def _be_rank(program: Program, spec_json: str, sent: Any, log: str, stop_after: int | None) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    spec = WorkerSpec.from_json(spec_json)
    try:
        returned = program(spec, QueueHooks(spec, sent, stop_after))
    except BaseException as error:
        sent.put((spec.rank, "failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    else:
        sent.put((spec.rank, "returned", returned))
    sent.close()
    sent.join_thread()
