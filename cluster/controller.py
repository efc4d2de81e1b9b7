"""The control loop: nodes, data, attempts, recovery, until all steps are done or nothing more can be.

The controller runs in the process the user started and owns no rank. It decides with `policies` and `placement`, acts
through agents and the data service, and writes everything that happens to the run's folder.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from cluster.attempt import Attempt, AttemptOutcome, AttemptTiming
from cluster.checkpoint_commits import CheckpointCommitter
from cluster.config import LaidOutConfig
from cluster.console import RunConsole
from cluster.data_actors import DataServiceHandle
from cluster.errors import RunFailedError
from cluster.events import Event
from cluster.node_pool import NodePool
from cluster.placement import Placement
from cluster.policies import FailureBudget, decide_recovery
from cluster.run_data import check_cursor, order_of, running_service, task_facts, train_plan
from cluster.run_store import RunWriter
from cluster.states import RunState
from cluster.stop_signal import StopSignal
from cluster.watch import RunWatch
from data_service.access import DataAccess
from data_service.audit import SampleAudit
from data_service.errors import ConfigError
from data_service.manifest import DatasetManifest
from trainer import manifest as checkpoints
from trainer.adapters import Base, base_of
from trainer.fences import raise_fence
from trainer.protocol import WorkerSpec

__all__ = ["Controller", "TrainOutcome"]


@dataclass(frozen=True)
class TrainOutcome:
    """How training ended: all steps done, or stopped on request with a checkpoint."""

    reason: Literal["finished", "stopped"]
    step: int


@dataclass
class _Loss:
    """A recovery under way."""

    lost_step: int
    resume_step: int
    timing: AttemptTiming
    placed: float = 0.0


class Controller:
    """Trains one run on a pool of nodes."""

    def __init__(
        self,
        config: LaidOutConfig,
        pool: NodePool,
        writer: RunWriter,
        console: RunConsole,
        dataset: DatasetManifest,
        stop: StopSignal,
    ) -> None:
        self._config = config
        self._pool = pool
        self._writer = writer
        self._console = console
        self._dataset = dataset
        self._stop = stop
        self._budget = FailureBudget()
        self._best_step = writer.folder.history().last_step
        self._loss: _Loss | None = None
        self._data: DataServiceHandle | None = None
        self._access: DataAccess | None = None
        self._told_skipped: set[int] = set()
        self._sound: set[int] = set()
        self._base: Base | None = None
        self._audit = self._make_audit()
        self._watch = RunWatch(config, dataset, writer, console)

    def train(self) -> TrainOutcome:
        """Train to `train.steps`, through losses.

        Raises:
            RunFailedError: a program fault, or more losses than the policies allow.
            ConfigError: the mesh does not fit the machines, or the newest checkpoint not this order of rows.
        """
        steps = self._config.train.steps
        found = self._newest_checkpoint()
        if found is not None and found.step >= steps:
            self._console.say(f"step {found.step} of {steps} is done already; raise train.steps to train on")
            return TrainOutcome("finished", found.step)
        if found is not None:
            check_cursor(self._config, self._dataset, found.state)
        self._base = self._read_base()
        self._start_data()
        try:
            while True:
                outcome = self._attempt()
                if outcome.kind == "lost":
                    self._recover(outcome)
                    continue
                self._console.stop()
                return TrainOutcome("finished" if outcome.kind == "finished" else "stopped", outcome.last_step)
        finally:
            self._console.stop()
            if self._data is not None:
                self._data.stop()
            if self._audit is not None:
                self._audit.close()
            self._watch.close()

    def _read_base(self) -> Base | None:
        """What adapters are trained on, named by its content: read once, and not by ranks, whose peers would wait."""
        folder = self._config.model.from_
        if self._config.train.lora is None or folder is None:
            return None
        self._console.say(f"reading {folder}, which train.lora adapts, to name it by its content")
        return base_of(folder)

    def _make_audit(self) -> SampleAudit | None:
        config = self._config
        if not config.data.service.audit:
            return None
        plan = train_plan(config, self._dataset)
        service = config.data.service
        return SampleAudit(
            config.dataset_uri, plan, self._dataset, cache_bytes=service.cache_bytes, cache_dir=service.cache_dir
        )

    def _start_data(self) -> None:
        config = self._config
        if config.data.service.address:
            self._access = running_service(config, self._dataset)
            self._writer.events.write(Event.DATA_SERVICE_READY, fields={"workers": [], "control": self._access.control})
            return
        self._data = DataServiceHandle(
            config.dataset_uri,
            config.data.service,
            order=order_of(config),
            dataset_digest=self._dataset.digest,
            host_by_node=self._pool.data_hosts(),
            head_node=self._pool.head_node(),
        )
        self._access = self._data.start()
        self._writer.events.write(Event.DATA_SERVICE_READY, fields={"workers": self._data.describe()})

    def _repair_data(self) -> None:
        """Replace what died of the data service; ranks of the attempt that runs have others to read from meanwhile."""
        if self._data is None:
            return  # others run it
        self._access = self._data.repair(self._pool.data_hosts())
        self._writer.events.write(Event.DATA_SERVICE_READY, fields={"workers": self._data.describe()})

    def _attempt(self) -> AttemptOutcome:
        config, events = self._config, self._writer.events
        placement = self._place()
        events.enter(RunState.PLACING)
        attempt_number = self._writer.next_attempt()
        newest = self._newest_checkpoint()
        resume = None if newest is None else newest.step
        raise_fence(self._writer.folder.checkpoints_uri, attempt_number, resume or 0)
        self._writer.discard_after(-1 if resume is None else resume)
        if self._audit is not None:
            self._audit.forget()
        if self._data is not None:
            self._data.end_superseded()
        if self._loss is not None:
            self._loss.placed, self._loss.resume_step = time.monotonic(), resume or 0
        mesh = placement.mesh
        events.write(
            Event.ATTEMPT_STARTED,
            fields={"dp": mesh.dp, "pp": mesh.pp, "resume_step": resume, "ranks": placement.describe()},
        )
        self._console.say(
            f"attempt {events.attempt}: dp {mesh.dp} x pp {mesh.pp} on {placement.describe_text(self._pool.names())}, "
            + _origin(resume, config.model.from_)
        )
        specs = self._specs(placement, resume)
        committer = CheckpointCommitter(self._writer, config, mesh.world_size, self._audit)
        attempt = Attempt(
            self._pool.agents(),
            specs,
            self._writer,
            committer,
            self._console,
            self._audit,
            self._watch,
            resume_step=resume or 0,
            best_step_before=self._best_step,
            stop_requested=self._stop,
            on_idle_node_lost=self._lose_idle_node,
            watch_data=self._watch_data,
            on_first_step=self._first_step,
        )
        with self._stop.deferred():
            outcome = attempt.run()
        self._sound |= committer.committed
        self._best_step = max(self._best_step, outcome.last_step)
        return outcome

    def _place(self) -> Placement:
        """Slots for the ranks; waits for machines where more can come.

        Raises:
            RunFailedError: nodes were lost, and too few are left.
            ConfigError: the mesh does not fit, and nothing more can come.
        """
        parallel = self._config.train.parallel
        return self._pool.place(parallel.dp, parallel.pp, on_wait=self._wait_for_nodes)

    def _wait_for_nodes(self, reason: str) -> None:
        self._writer.events.enter(RunState.PENDING)
        self._console.say(reason)

    def _specs(self, placement: Placement, resume: int | None) -> Mapping[str, list[WorkerSpec]]:
        config, mesh = self._config, placement.mesh
        assert self._access is not None, "data are served before the first attempt"
        first = self._pool.rendezvous(placement.node_of(0))
        spec = WorkerSpec(
            attempt=self._writer.events.attempt,
            rank=0,
            world_size=mesh.world_size,
            dp=mesh.dp,
            pp=mesh.pp,
            local_rank=0,
            device=self._device(),
            master_addr=first.host,
            master_port=first.port,
            seed=config.run.seed,
            seq_len=config.data.seq_len,
            vocab_size=self._dataset.vocab_size,
            model=config.model,
            train=config.train,
            data=self._access,
            checkpoints_uri=self._writer.folder.checkpoints_uri,
            resume_step=resume,
            facts=task_facts(config, self._dataset),
            threads=max(1, int(config.cluster.node.cpus_per_slot)),
            interface=self._pool.interface,
            samples=self._watch.sample_wishes(),
            base=self._base,
        )
        by_node: dict[str, list[WorkerSpec]] = {}
        for rank in range(mesh.world_size):
            node = placement.node_of(rank)
            local = by_node.setdefault(node, [])
            local.append(replace(spec, rank=rank, local_rank=len(local)))
        return by_node

    def _device(self) -> Literal["cpu", "cuda"]:
        if self._config.train.device == "auto":
            return "cuda" if self._config.cluster.node.gpus else "cpu"
        return self._config.train.device

    def _newest_checkpoint(self) -> checkpoints.Manifest | None:
        """The checkpoint to go on from: the newest whose every byte is right.

        What this process has read whole before, or committed itself, is not read again: ranks compare all that they
        load with its checksums, and when one finds damage, nothing is trusted any more.

        Raises:
            ConfigError: steps were committed, and none of them can be loaded.
        """
        uri = self._writer.folder.checkpoints_uri
        found, skipped = checkpoints.newest_complete(uri, trusted=self._sound)
        if found is not None:
            self._sound.add(found.step)
        for item in skipped:
            if item.step not in self._told_skipped:
                self._told_skipped.add(item.step)
                self._writer.events.write(Event.CHECKPOINT_SKIPPED, fields={"step": item.step, "reason": item.reason})
                self._console.say(f"checkpoint of step {item.step} is left out: {item.reason}")
        committed = checkpoints.list_complete(uri) if found is None else []
        if committed:
            raise ConfigError(
                f"{uri}: steps {', '.join(map(str, committed))} were committed, and none can be loaded. Restore "
                "one from a backup, or move the folder away to train from the beginning. Nothing was changed."
            )
        return found

    def _recover(self, outcome: AttemptOutcome) -> None:
        """Decide whether the run goes on; repairs the data service for the next attempt."""
        failure = outcome.failure
        assert failure is not None, "a lost attempt names its failure"
        self._console.stop()
        self._console.say(f"step {outcome.last_step}: {failure.reason}")
        cluster = self._config.cluster
        decision = decide_recovery(
            failure,
            self._budget,
            progressed=outcome.progressed,
            elastic=cluster.elastic,
            max_program_failures=cluster.max_program_failures,
        )
        self._budget = decision.budget
        for node in failure.lost_nodes:
            self._pool.forget(node)
        if failure.damaged_checkpoint:
            self._sound.clear()
        if decision.action == "fail":
            raise RunFailedError(f"the run failed at step {outcome.last_step}: {decision.reason}")
        if self._loss is None:
            self._loss = _Loss(outcome.last_step, 0, outcome.timing)
        if failure.lost_nodes:
            self._repair_data()

    def _lose_idle_node(self, node: str) -> None:
        """A node without ranks went: the ranks go on, and the data service gets a new worker."""
        self._pool.forget(node)
        self._writer.events.write(Event.NODE_LOST, node_id=node)
        self._console.say(f"node {node[:8]} was lost; it held no rank")
        self._repair_data()

    def _watch_data(self) -> None:
        """Replace data workers that died on a node that lives; the ranks have others to read from meanwhile."""
        if self._data is not None and self._data.watch():
            self._writer.events.write(Event.DATA_WORKER_LOST)
            self._console.say("a process of the data service died and is replaced")
            self._repair_data()

    def _first_step(self, step: int, timing: AttemptTiming) -> None:
        """The first step of an attempt: what a recovery took is known now."""
        self._pool.keep_warm()
        loss, self._loss = self._loss, None
        if loss is None or loss.timing.lost is None or loss.timing.stopped is None:
            return
        assert timing.ready is not None and timing.first_step is not None, "a step follows readiness"  # noqa: PT018
        phases = {
            "stop_s": loss.timing.stopped - loss.timing.lost,
            "place_s": loss.placed - loss.timing.stopped,
            "start_s": timing.ready - loss.placed,
            "step_s": timing.first_step - timing.ready,
        }
        total = timing.first_step - loss.timing.lost
        self._writer.events.write(
            Event.RECOVERED,
            fields={
                "lost_step": loss.lost_step,
                "resume_step": loss.resume_step,
                "step": step,
                "seconds": round(total, 3),
                "phases": {name: round(seconds, 3) for name, seconds in phases.items()},
            },
        )
        self._console.say(
            f"recovered in {total:.1f} s: step {loss.resume_step + 1} again, {loss.lost_step - loss.resume_step} steps "
            "recomputed, no row lost or repeated"
        )


def _origin(resume: int | None, folder: str | None) -> str:
    """What an attempt starts from, for people."""
    if resume is not None:
        return f"from the checkpoint of step {resume}"
    return "from initial weights" if folder is None else f"from the weights in {folder}"
