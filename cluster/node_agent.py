"""The agent of a node: the one parent of all rank processes there, and the controller's hand on them.

A named, detached Ray actor that holds the node's slots as its own resources. It keeps a nursery, a process that has
loaded what ranks need and forks them, so that ranks of a new attempt start in milliseconds. Ranks die when it does,
whatever ends it, and it ends them and itself when no controller has renewed its lease for `lease_s`.

How a controller calls it. Every method returns soon, `poll` after `wait_s` at most; none is retried by Ray
(`max_task_retries=0`), so that a dead agent shows as `ray.exceptions.ActorDiedError` or `ActorUnavailableError` on the
call, a fraction of a second after its process was killed, and some 1.5 s after its whole node was (local nodes). A
host that vanishes without a word shows only as silence: use `ray.wait` with a timeout on all calls, never a bare
`ray.get`, and take an agent that is silent beyond a deadline for lost. `LeaseKeeper` keeps agents alive through the
phases of a run in which nobody polls.
"""

import asyncio
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from cluster.agent_events import AgentEvent, AgentInfo, ExitPayload
from cluster.errors import StaleAttemptError
from cluster.lease import Lease
from cluster.rank_child import Nursery, RankChild
from data_service import storage
from data_service.errors import ConfigError, StormjibError
from trainer.protocol import ProfileSteps, WorkerSpec

__all__ = ["AgentEvent", "AgentInfo", "ExitPayload", "LeaseKeeper", "NodeAgent", "start_agent"]

_log = logging.getLogger(__name__)

KILL_S = 20.0
"""A SIGKILLed rank must be gone within this time; one that is not hangs in the kernel."""
_LOG_BYTES = 4 * 2**20
"""Most bytes of a rank's log that go to an object store."""
_MAX_CALLS = 64
"""Calls an agent works on at a time; polls wait, everything else is quick."""


class NodeAgent:
    """Ranks of one node. A plain class: `start_agent` makes it an actor; tests run it on an event loop of their own.

    All methods run on one event loop, whose thread is the parent of the nurseries.
    """

    def __init__(
        self,
        node_id: str,
        host: str | None,
        *,
        slots: int,
        threads: int,
        device: Literal["cpu", "cuda"],
        lease_s: float,
        logs_uri: str,
    ) -> None:
        """Start without ranks; the lease runs from now.

        Args:
            node_id: Ray's node id in hex.
            host: address of the node; None asks Ray.
            slots: most ranks at a time.
            threads: CPU threads of the ranks' libraries.
            device: what the node's ranks run on.
            lease_s: seconds without a call of the controller after which agent and ranks end.
            logs_uri: folder for the ranks' logs, `attempt_K/rank_N.log`; on an object store they are written when a
                rank ends, the last 4 MiB of each.
        """
        self._node_id = node_id
        self._host = host
        self._slots = slots
        self._threads = threads
        self._device = device
        self._logs_uri = logs_uri
        self._lease = Lease(lease_s)
        self._nursery: Nursery | None = None
        self._ranks: dict[RankChild, asyncio.Event] = {}
        self._uploads: set[asyncio.Task[None]] = set()
        self._events: deque[AgentEvent] = deque()
        self._num_events = 0
        self._news = asyncio.Event()
        self._newest_attempt = 0
        self._over_attempt = 0
        threading.Thread(target=self._watch_lease, name="agent-lease", daemon=True).start()

    async def hello(self) -> AgentInfo:
        """Who this is. Renews the lease, as all calls do."""
        self._lease.renew()
        if self._host is None:
            import ray

            self._host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if self._device == "cuda" else ""
        gpu_ids = tuple(name for name in visible.split(",") if name)
        return AgentInfo(self._node_id, self._host, os.getpid(), self._slots, gpu_ids)

    async def renew(self) -> None:
        """Renew the lease."""
        self._lease.renew()

    async def free_port(self) -> int:
        """A TCP port that nothing on this node listens on now."""
        self._lease.renew()
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    async def check_storage(self, uri: str, expected: str) -> str | None:
        """Read a file that the controller wrote; returns what is wrong, None when it holds `expected`."""
        self._lease.renew()
        try:
            found = await asyncio.to_thread(storage.read_bytes, uri)
        except (OSError, StormjibError) as error:
            return f"{type(error).__name__}: {error}"
        return None if found == expected.encode() else "it holds something else; an older file is there"

    async def warm(self) -> None:
        """Start loading what ranks need, unless it is loaded; `start_attempt` would do it too, and wait for it."""
        self._lease.renew()
        self._warm_nursery()

    async def start_attempt(self, attempt: int, specs: list[str]) -> None:
        """Start ranks of an attempt; ranks of earlier attempts are killed first. Returns before they are ready.

        Args:
            attempt: a number above those of all attempts before.
            specs: JSON of the `WorkerSpec` of each rank of this node.

        Raises:
            StaleAttemptError: the attempt was stopped, has ranks here already, or a later one was started.
            ConfigError: a specification is malformed, or is for a device that this agent does not have.
        """
        self._lease.renew()
        if attempt <= max(self._over_attempt, self._newest_attempt):
            raise StaleAttemptError(
                f"Attempt {attempt} was to start on node {self._node_id[:8]}, where attempt {self._newest_attempt} was "
                f"started and {self._over_attempt} stopped. Start a later one."
            )
        parsed = [(WorkerSpec.from_json(text), text) for text in specs]
        for spec, _ in parsed:
            if spec.device != self._device:
                raise ConfigError(
                    f"Rank {spec.rank} is to run on {spec.device}, and node {self._node_id[:8]} was reserved for "
                    f"{self._device}. Set train.device=auto, or cluster.node.gpus to the GPUs of a node."
                )
        self._newest_attempt = attempt
        await self._kill([child for child in self._ranks if child.attempt < attempt])
        loop = asyncio.get_running_loop()
        nursery = self._warm_nursery()
        for spec, text in parsed:
            child = nursery.fork(
                attempt,
                spec.rank,
                on_message=lambda child, message: _hand_over(loop, self._take_message, child, message),
                on_exit=lambda child, code: _hand_over(loop, self._take_exit, child, code),
            )
            self._ranks[child] = asyncio.Event()
            child.start(text, self._log_path(attempt, spec.rank))

    async def stop_attempt(self, attempt: int) -> None:
        """SIGKILL all ranks of this attempt and of those before; returns when they are gone.

        They send no exit event; what they reported before is there for the next `poll`. The attempt cannot be started
        any more.
        """
        self._lease.renew()
        self._over_attempt = max(self._over_attempt, attempt)
        await self._kill([child for child in self._ranks if child.attempt <= attempt])

    async def control(self, attempt: int, stop_after: int) -> None:
        """Pass `StopAfter(stop_after)` to the ranks of the attempt."""
        self._lease.renew()
        for child in self._ranks:
            if child.attempt == attempt:
                child.stop_after(stop_after)

    async def profile(self, attempt: int, request: ProfileSteps) -> None:
        """Pass a request for a trace to the ranks of the attempt."""
        self._lease.renew()
        for child in self._ranks:
            if child.attempt == attempt:
                child.profile(request)

    async def poll(self, after: int, wait_s: float) -> list[AgentEvent]:
        """Events with a number above `after`, oldest first; waits for one up to `wait_s` (at most half the lease).

        Events up to `after` are forgotten.
        """
        self._lease.renew()
        deadline = time.monotonic() + min(wait_s, self._lease.seconds / 2)
        while self._events and self._events[0].seq <= after:
            self._events.popleft()
        while not self._events:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            try:
                await asyncio.wait_for(self._news.wait(), remaining)
            except TimeoutError:
                break
        return [event for event in self._events if event.seq > after]

    async def shutdown(self) -> None:
        """End all ranks and the nursery, then the actor; the caller sees it die."""
        await self._kill(list(self._ranks))
        if self._uploads:
            await asyncio.wait(self._uploads, timeout=KILL_S)
        if self._nursery is not None:
            self._nursery.kill()
        import ray.actor

        ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    def _warm_nursery(self) -> Nursery:
        if self._nursery is None or self._nursery.gone:
            self._nursery = Nursery(self._device, self._threads)
        return self._nursery

    async def _kill(self, children: list[RankChild]) -> None:
        waits = [asyncio.ensure_future(self._ranks[child].wait()) for child in children]
        for child in children:
            child.kill()
        if waits:
            _, hanging = await asyncio.wait(waits, timeout=KILL_S)
            for wait in hanging:
                wait.cancel()
                _log.error("a rank process of node %s is still there %s s after SIGKILL", self._node_id[:8], KILL_S)

    def _take_message(self, child: RankChild, message: dict[str, Any]) -> None:
        if message["is"] == "report":  # also of a rank that was killed since: a part that is durable stays so
            self._emit("report", child.attempt, child.rank, message["payload"])

    def _take_exit(self, child: RankChild, code: int) -> None:
        self._ranks.pop(child).set()
        if not storage.is_local(self._logs_uri):
            task = asyncio.ensure_future(asyncio.to_thread(self._upload_log, child))
            self._uploads.add(task)
            task.add_done_callback(self._uploads.discard)
        if child.killed and code < 0:
            return
        tail = child.log_tail()
        error = child.error or {"message": "\n".join(tail) if code else "", "type": None, "retryable": False}
        payload = ExitPayload(code, str(error["message"]), error["type"], bool(error["retryable"]), tail)
        self._emit("exit", child.attempt, child.rank, payload.to_json())

    def _emit(self, kind: Literal["report", "exit", "log"], attempt: int, rank: int, payload: str) -> None:
        self._num_events += 1
        self._events.append(AgentEvent(self._num_events, kind, attempt, rank, payload, time.time()))
        self._news.set()
        self._news = asyncio.Event()

    def _log_name(self, attempt: int, rank: int) -> str:
        return storage.join(self._logs_uri, f"attempt_{attempt}", f"rank_{rank:05d}.log")

    def _log_path(self, attempt: int, rank: int) -> Path | None:
        uri = self._log_name(attempt, rank)
        return storage.local_path(uri) if storage.is_local(uri) else None

    def _upload_log(self, child: RankChild) -> None:
        try:
            storage.write_bytes(self._log_name(child.attempt, child.rank), child.output(_LOG_BYTES))
        except (OSError, StormjibError):
            _log.exception("the log of rank %d could not be written", child.rank)

    def _watch_lease(self) -> None:
        """Runs in a thread, so that a busy event loop cannot keep an abandoned agent alive."""
        while not self._lease.expired:
            time.sleep(min(0.5, self._lease.remaining_s()) + 0.01)
        _log.warning("no controller for %s s: node %s ends its ranks", self._lease.seconds, self._node_id[:8])
        for child in list(self._ranks):
            child.kill()
        os._exit(1)


class LeaseKeeper:
    """Renews the leases of a controller's agents from a thread, for as long as its process lives.

    Without it agents end themselves while the controller prepares data, repairs the data service or exports.
    """

    def __init__(self, agents: Callable[[], Mapping[str, Any]], lease_s: float) -> None:
        """Start renewing.

        Args:
            agents: the agents to renew, by node id; called from the thread.
            lease_s: their lease; it is renewed four times in that time.
        """
        self._agents = agents
        self._period_s = lease_s / 4
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Renew no more; agents end themselves when their lease has run out."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._period_s):
            for agent in self._agents().values():
                agent.renew.remote()


def start_agent(
    node_id: str,
    *,
    run_id: str,
    slots: int,
    cpus_per_slot: float,
    gpus_per_slot: int,
    lease_s: float,
    logs_uri: str,
) -> Any:
    """Start the agent of a node and return its actor handle at once; `hello` tells when it is up.

    It is named `agent:RUN_ID:NODE_ID` in the session's namespace, runs on that node or not at all, and holds
    slots · cpus_per_slot CPUs and slots · gpus_per_slot GPUs for as long as it lives.

    Args:
        node_id: Ray's node id in hex.
        run_id: one name for all agents of a controller.
        slots: most ranks at a time.
        cpus_per_slot: logical CPUs a rank takes; rounded down, at least 1, also the threads of its libraries.
        gpus_per_slot: GPUs a rank takes, 0 or 1. All ranks see all of the agent's GPUs; rank i of the node drives the
            i-th (`WorkerSpec.local_rank`).
        lease_s: see `NodeAgent`.
        logs_uri: see `NodeAgent`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.ray_session import NAMESPACE

    options = ray.remote(NodeAgent).options(
        name=f"agent:{run_id}:{node_id}",
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=slots * cpus_per_slot,
        num_gpus=slots * gpus_per_slot,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=_MAX_CALLS,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    )
    return options.remote(
        node_id,
        None,
        slots=slots,
        threads=max(1, int(cpus_per_slot)),
        device="cuda" if gpus_per_slot else "cpu",
        lease_s=lease_s,
        logs_uri=logs_uri,
    )


def _hand_over(loop: asyncio.AbstractEventLoop, take: Callable[..., None], child: RankChild, what: object) -> None:
    """Call `take` on the loop's thread; a loop that has been closed needs no more news."""
    try:
        loop.call_soon_threadsafe(take, child, what)
    except RuntimeError:
        _log.debug("rank %d spoke after its agent had ended", child.rank)
