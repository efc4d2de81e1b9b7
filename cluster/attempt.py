"""One attempt: ranks on their agents from start to end, whichever end it is.

Starts the ranks, follows the agents' events, records steps and evaluations, commits checkpoints, passes a stop on, and
notices the first loss. It ends what is left of the attempt itself; what comes next is the controller's decision.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.agent_events import AgentEvent, ExitPayload
from cluster.checkpoint_commits import CheckpointCommitter
from cluster.console import RunConsole
from cluster.evaluations import evaluation_line, evaluation_record
from cluster.events import Event
from cluster.policies import Failure, RankExit, classify_failure
from cluster.run_store import RunWriter
from cluster.states import RunState
from cluster.watch import RunWatch
from data_service.audit import SampleAudit
from data_service.errors import DataUnavailableError, StormjibError
from trainer.protocol import (
    EvalReport,
    FinishedReport,
    PartReport,
    ReadyReport,
    Report,
    StepReport,
    WorkerSpec,
    report_from_json,
)

__all__ = ["Attempt", "AttemptOutcome", "AttemptTiming"]

_log = logging.getLogger(__name__)

POLL_S = 1.0
"""An agent answers a poll within this time, with or without events."""
SILENT_S = 8.0
"""An agent whose poll is out for longer is taken for lost."""
STOP_S = 3.0
"""Agents get this long to end their ranks after a loss; one that does not answer is taken for lost."""
AUDIT_S = 600.0
"""The audit of the last steps may take so long after the ranks have ended."""
START_S = 300.0
"""All ranks must be ready within this time."""


@dataclass
class AttemptTiming:
    """Moments of an attempt on the monotonic clock, in seconds; None until they come."""

    started: float
    ready: float | None = None
    first_step: float | None = None
    lost: float | None = None
    stopped: float | None = None


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended."""

    kind: Literal["finished", "stopped", "lost"]
    last_step: int
    progressed: bool
    failure: Failure | None
    timing: AttemptTiming


@dataclass
class _Watch:
    """What is known of one agent."""

    handle: Any
    after: int = 0
    asked: float = field(default_factory=time.monotonic)


class Attempt:
    """One set of rank processes."""

    def __init__(
        self,
        agents: Mapping[str, Any],
        ranks_by_node: Mapping[str, Sequence[WorkerSpec]],
        writer: RunWriter,
        committer: CheckpointCommitter,
        console: RunConsole,
        audit: SampleAudit | None,
        watch: RunWatch,
        *,
        resume_step: int,
        best_step_before: int,
        stop_requested: Callable[[], bool],
        on_idle_node_lost: Callable[[str], None],
        watch_data: Callable[[], None],
        on_first_step: Callable[[int, AttemptTiming], None],
    ) -> None:
        self._agents = dict(agents)
        self._ranks_by_node = ranks_by_node
        self._writer = writer
        self._committer = committer
        self._console = console
        self._audit = audit
        self._watch = watch
        self._number = writer.events.attempt
        self._world_size = sum(len(specs) for specs in ranks_by_node.values())
        self._best_step_before = best_step_before
        self._stop_requested = stop_requested
        self._on_idle_node_lost = on_idle_node_lost
        self._watch_data = watch_data
        self._idle_lost: set[str] = set()
        self._on_first_step = on_first_step
        self._ready: dict[int, dict[str, float]] = {}
        self._finished: dict[int, FinishedReport] = {}
        self._exits: dict[int, RankExit] = {}
        self._lost_nodes: set[str] = set()
        self._told_empty = False
        self._stop_sent = False
        self._stopped_early = False
        self._last_step = resume_step
        self.timing = AttemptTiming(started=time.monotonic())

    def run(self) -> AttemptOutcome:
        """Start the ranks and follow them to the end of the attempt."""
        starts = {
            node: self._agents[node].start_attempt.remote(self._number, [spec.to_json() for spec in specs])
            for node, specs in self._ranks_by_node.items()
        }
        self._await_starts(starts)
        self._watch.attempt(next(iter(self._ranks_by_node.values()))[0])
        watches = {node: _Watch(handle) for node, handle in self._agents.items()}
        try:
            self._follow(watches)
        except BaseException:
            self._end_ranks(watches)
            raise
        return self._outcome(watches)

    def _await_starts(self, starts: Mapping[str, Any]) -> None:
        """See that every agent has taken its ranks; one that has not is lost.

        Raises:
            StormjibError: what an agent says is wrong with the ranks.
        """
        ray.wait(list(starts.values()), num_returns=len(starts), timeout=START_S)
        for node, ref in starts.items():
            try:
                ray.get(ref, timeout=0.1)
            except RayTaskError as error:
                if isinstance(error.cause, StormjibError):
                    raise error.cause from None
                raise
            except RayError as error:
                _log.warning("node %s did not start its ranks: %s", node[:8], error)
                self._lost_nodes.add(node)

    def _follow(self, watches: Mapping[str, _Watch]) -> None:
        """Take the agents' events until the attempt is over.

        Raises:
            DeliveryError: the ranks consumed other rows than the plan's.
            CheckpointError: a checkpoint could not be committed.
        """
        polls = {self._poll(watch): node for node, watch in watches.items()}
        while not self._is_over():
            self._pass_on_stop()
            self._pass_on_trace()
            self._watch_data()
            self._commit()
            ray.wait(list(polls), num_returns=1, timeout=0.2)
            answered, silent = ray.wait(list(polls), num_returns=len(polls), timeout=0.0)
            for ref in silent:  # before the answered are asked again: this loop may have been busy for long
                if time.monotonic() - watches[polls[ref]].asked > SILENT_S:
                    self._lose(polls.pop(ref))
            for ref in answered:
                node = polls.pop(ref)
                if self._take(ref, node, watches[node]):
                    polls[self._poll(watches[node])] = node
            if self.timing.ready is None and time.monotonic() - self.timing.started > START_S:
                break

    def _commit(self) -> None:
        """Look at the audit, and commit what it has found right."""
        if self._audit is not None:
            self._audit.raise_problem()
        for step in self._committer.commit_audited():
            self._console.checkpoint(step)

    def _poll(self, watch: _Watch) -> Any:
        watch.asked = time.monotonic()
        return watch.handle.poll.remote(watch.after, POLL_S)

    def _take(self, ref: Any, node: str, watch: _Watch) -> bool:
        """Handle one answered poll; False when the agent is gone."""
        try:
            events: list[AgentEvent] = ray.get(ref)
        except RayError:
            self._lose(node)
            return False
        for event in events:
            watch.after = max(watch.after, event.seq)
            if event.attempt == self._number:
                self._handle(event, node)
        return True

    def _lose(self, node: str) -> None:
        if self._ranks_by_node.get(node):
            self._lost_nodes.add(node)
        elif node not in self._idle_lost:
            self._idle_lost.add(node)
            self._on_idle_node_lost(node)

    def _handle(self, event: AgentEvent, node: str) -> None:
        if event.kind == "report":
            self._handle_report(report_from_json(event.payload))
        elif event.kind == "exit" and event.rank not in self._finished:
            ended = ExitPayload.from_json(event.payload)
            self._exits[event.rank] = RankExit(
                rank=event.rank,
                node_id=node,
                code=ended.code,
                error=ended.error,
                error_type=ended.error_type,
                retryable=ended.retryable,
            )

    def _handle_report(self, report: Report) -> None:
        if isinstance(report, ReadyReport):
            self._ready[report.rank] = report.phases
            self._watch.ready(report)
            if len(self._ready) == self._world_size:
                self._all_ready()
        elif isinstance(report, StepReport):
            self._step(report)
        elif isinstance(report, EvalReport):
            self._watch.evaluation(report)
            values = evaluation_record(report)
            self._writer.append_metrics({"step": report.step, "eval": values})
            self._console.say(evaluation_line(report.step, values))
        elif isinstance(report, PartReport):
            self._committer.add(report)
        else:
            self._finished[report.rank] = report
            self._last_step = max(self._last_step, report.step)

    def _all_ready(self) -> None:
        self.timing.ready = time.monotonic()
        slowest: dict[str, float] = {}
        for phases in self._ready.values():
            for phase, seconds in phases.items():
                slowest[phase] = round(max(slowest.get(phase, 0.0), seconds), 3)
        self._writer.events.enter(RunState.RUNNING)
        self._writer.events.write(Event.ATTEMPT_RUNNING, fields={"phases": slowest})

    def _step(self, report: StepReport) -> None:
        spec = next(iter(self._ranks_by_node.values()))[0]
        self._last_step = report.step
        record = {
            "step": report.step,
            "batch": report.batch,
            "loss": report.loss,
            "tokens": report.tokens,
            "sample_hash": report.sample_hash,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "dp": spec.dp,
            "pp": spec.pp,
            "attempt": self._number,
            "step_s": round(report.step_s, 5),
            "data_wait_s": round(report.data_wait_s, 5),
            "memory_bytes": report.memory_bytes,
        }
        if report.skipped:
            record["skipped"] = True
            self._console.say(f"step {report.step} (global batch {report.batch}) made no update: train.guard, or fp16")
        self._writer.append_metrics(record)
        if report.loss is None and not report.skipped and not self._told_empty:
            self._told_empty = True
            self._console.say(
                f"step {report.step}: its rows hold no token to learn, so its loss is null; look at them with "
                f"`stormjib data show FILE --step {report.step}`"
            )
        self._watch.step(report)
        if self._audit is not None:
            self._audit.submit(report.step, report.sample_hash)
        self._console.step(report.step, report.loss, report.tokens / max(report.step_s, 1e-9))
        if self.timing.first_step is None:
            self.timing.first_step = time.monotonic()
            self._on_first_step(report.step, self.timing)

    def _pass_on_stop(self) -> None:
        """Ask all ranks to leave at the next step boundary, once. Before they are ready there is nothing to save."""
        if self._stop_sent or not self._stop_requested():
            return
        self._stop_sent = True
        self._writer.events.write(Event.STOP_REQUESTED)
        if self.timing.ready is None:
            self._stopped_early = True
            return
        self._writer.events.enter(RunState.DRAINING)
        for node in self._ranks_by_node:
            self._agents[node].control.remote(self._number, self._last_step + 1)

    def _pass_on_trace(self) -> None:
        """Hand a new request for a trace to all ranks."""
        request = self._watch.wanted_trace()
        if request is not None:
            for node in self._ranks_by_node:
                self._agents[node].profile.remote(self._number, request)

    def _is_over(self) -> bool:
        return bool(self._lost_nodes or self._exits or self._stopped_early) or len(self._finished) == self._world_size

    def _outcome(self, watches: Mapping[str, _Watch]) -> AttemptOutcome:
        if self._stopped_early:
            self._end_ranks(watches)
            return AttemptOutcome("stopped", self._last_step, False, None, self.timing)
        if len(self._finished) == self._world_size and not self._lost_nodes:
            reason = next(iter(self._finished.values())).reason
            self._end_ranks(watches)
            self._await_commits()
            kind: Literal["finished", "stopped"] = "finished" if reason == "steps" else "stopped"
            return AttemptOutcome(kind, self._last_step, True, None, self.timing)
        self.timing.lost = time.monotonic()
        self._writer.events.enter(RunState.RECOVERING)
        self._end_ranks(watches)
        self.timing.stopped = time.monotonic()
        self._commit()
        failure = classify_failure(
            sorted(self._exits.values(), key=lambda item: item.rank), frozenset(self._lost_nodes)
        )
        for item in self._exits.values():
            fields = {"rank": item.rank, "exit_code": item.code, "error": item.error_type, "reason": item.error[-2000:]}
            self._writer.events.write(Event.RANK_LOST, node_id=item.node_id, fields=fields)
        for node in sorted(self._lost_nodes):
            self._writer.events.write(Event.NODE_LOST, node_id=node)
        self._writer.events.write(Event.ATTEMPT_STOPPED, fields={"reason": failure.reason})
        progressed = self._last_step > self._best_step_before
        return AttemptOutcome("lost", self._last_step, progressed, failure, self.timing)

    def _await_commits(self) -> None:
        """All steps are done; the last checkpoint may still wait for the audit.

        Raises:
            DataUnavailableError: the audit did not end in time.
        """
        deadline = time.monotonic() + AUDIT_S
        self._commit()
        while self._committer.is_waiting:
            if time.monotonic() > deadline:
                raise DataUnavailableError(
                    f"the rows of the last steps could not be audited within {AUDIT_S:.0f} s, and their checkpoint was "
                    "not committed: the dataset is slow to read from here. Start the run again to go on from the "
                    "newest checkpoint, or set data.service.audit=false."
                )
            time.sleep(0.05)
            self._commit()

    def _end_ranks(self, watches: Mapping[str, _Watch]) -> None:
        """SIGKILL every rank of the attempt; agents that do not answer in time are lost. Takes their last events."""
        stops = {
            watches[node].handle.stop_attempt.remote(self._number): node
            for node in watches
            if node not in self._lost_nodes and node not in self._idle_lost
        }
        answered, silent = ray.wait(list(stops), num_returns=len(stops), timeout=STOP_S) if stops else ([], [])
        for ref in answered:
            node = stops[ref]
            try:
                ray.get(ref)
                events: list[AgentEvent] = ray.get(
                    watches[node].handle.poll.remote(watches[node].after, 0.0), timeout=1.0
                )
            except RayError:
                self._lose(node)
                continue
            for event in events:
                if event.attempt == self._number:
                    self._handle_late(event, node)
        for ref in silent:
            self._lose(stops[ref])

    def _handle_late(self, event: AgentEvent, node: str) -> None:
        """What was on its way when the ranks were ended: how they ended, and what they had done by then."""
        if event.kind == "exit":
            self._handle(event, node)
        elif event.kind == "report" and self.timing.first_step is not None:
            report = report_from_json(event.payload)
            if isinstance(report, StepReport | EvalReport | PartReport):
                self._handle_report(report)
