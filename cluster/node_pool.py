"""The nodes a run works on: their agents, what is known of them, and which are gone.

A node that was lost is never used again by this controller, whatever Ray still says of it. One that dies while it is
asked for something is lost like any other, and the rest goes on; one whose slots somebody else holds is asked again.
"""

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import ray
from ray.exceptions import RayError

from cluster.agent_events import AgentInfo
from cluster.config import RunConfig
from cluster.console import RunConsole
from cluster.errors import RunFailedError
from cluster.events import Event
from cluster.node_agent import LeaseKeeper, start_agent
from cluster.placement import Placement, place, share_slots
from cluster.ray_session import DATA_ROLE, ROLE_LABEL, Session
from cluster.run_store import RunWriter
from data_service import storage
from data_service.errors import ConfigError

__all__ = ["NodePool", "Rendezvous"]

_log = logging.getLogger(__name__)

AGENT_S = 60.0
"""An agent must come up, and answer, within this time."""
LOOK_EVERY_S = 1.0
"""How often a run that waits for nodes looks for new ones."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of an attempt meet."""

    host: str
    port: int


class NodePool:
    """Agents on the session's nodes."""

    def __init__(self, config: RunConfig, session: Session, writer: RunWriter, console: RunConsole) -> None:
        self._config = config
        self._session = session
        self._writer = writer
        self._console = console
        self._agents: dict[str, Any] = {}
        self._infos: dict[str, AgentInfo] = {}
        self._lost: set[str] = set()
        self._held: set[str] = set()
        self._meeting: Rendezvous | None = None
        self._lease: LeaseKeeper | None = None
        self.interface: str | None = "lo" if session.is_local else None

    def __enter__(self) -> Self:
        """Nothing is started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the agents and all their ranks."""
        if self._lease is not None:
            self._lease.stop()
        refs = [agent.shutdown.remote() for agent in self._agents.values()]
        if refs and ray.is_initialized():
            ray.wait(refs, num_returns=len(refs), timeout=5.0)
        for agent in self._agents.values():
            try:
                ray.kill(agent)
            except (RayError, ValueError):
                continue
        self._agents.clear()

    def start(self) -> None:
        """Start an agent on every node that has slots, and see that each can read the run's storage.

        Nodes whose slots are held by others are left out for now; `place` waits for them.

        Raises:
            ConfigError: a node cannot read `run.storage`.
        """
        self._lease = LeaseKeeper(self.agents, self._config.cluster.lease_s)
        if not self._start_agents(AGENT_S):
            self._announce()
        if self._held:
            self._console.say(f"{len(self._held)} nodes do not give their slots yet: others hold their CPUs or GPUs")

    def agents(self) -> Mapping[str, Any]:
        """Agents of the nodes that are left."""
        return dict(self._agents)

    def host_by_node(self) -> dict[str, str]:
        """Addresses of the nodes that are left."""
        return {node: info.host for node, info in self._infos.items()}

    def data_hosts(self) -> dict[str, str]:
        """Addresses of the nodes that data workers run on: those with that role, or else those that hold ranks.

        Nodes that are known to be dead are left out; where none is left at all it is the head, until others come.
        """
        live = {node.node_id: node for node in self._session.nodes() if node.alive and node.node_id not in self._lost}
        apart = {node_id: node.host for node_id, node in live.items() if node.labels.get(ROLE_LABEL) == DATA_ROLE}
        holders = {node_id: info.host for node_id, info in list(self._infos.items()) if node_id in live}
        return apart or holders or {node_id: node.host for node_id, node in live.items() if node.is_head}

    def head_node(self) -> str:
        """The node that Ray's head runs on."""
        return next(node.node_id for node in self._session.nodes() if node.is_head)

    def names(self) -> dict[str, str]:
        """Node id to a short name for people."""
        return self._session.names()

    def forget(self, node: str) -> None:
        """A node was lost."""
        self._lost.add(node)
        self._infos.pop(node, None)
        self._end_agent(node)

    def keep_warm(self) -> None:
        """Have as many standby processes on each node as it has slots; they start in the background."""
        for agent in self._agents.values():
            agent.warm.remote()

    def rendezvous(self, node: str) -> Rendezvous:
        """Where the ranks meet that were placed last: a port of rank 0's node that was free then."""
        assert self._meeting is not None, "ranks were placed"
        assert self._meeting.host == self._infos[node].host, "the ranks meet on the node of rank 0"
        return self._meeting

    def place(self, dp: int | Literal["auto"], pp: int, on_wait: Callable[[str], None]) -> Placement:
        """Slots for a mesh on the nodes that are left, fewer pipelines where elastic; waits where more may come.

        Raises:
            ConfigError: it does not fit, and nothing more can come in time.
            RunFailedError: the same, after nodes were lost.
        """
        cluster = self._config.cluster
        deadline = time.monotonic() + (0.0 if self._session.is_local else cluster.wait_s)
        told = False
        while True:
            slots = {node: info.slots for node, info in self._infos.items()}
            found = place(slots, dp, pp, at_least=self._fewest(dp, pp))
            if isinstance(found, Placement):
                if self._meet(found.node_of(0)):
                    return found
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._too_few(found.reason)
            if not told:
                told = True
                on_wait(f"{found.reason} Waiting up to {cluster.wait_s:.0f} s for nodes.")
            time.sleep(LOOK_EVERY_S)
            self._start_agents(min(AGENT_S, max(LOOK_EVERY_S, left)))

    def _meet(self, node: str) -> bool:
        """Ask the node for a free port; False when it is lost."""
        port = self._ask({node: self._agents[node].free_port.remote()}, AGENT_S).get(node)
        if port is None:
            self._lose(node)
            return False
        self._meeting = Rendezvous(self._infos[node].host, int(port))
        return True

    def _too_few(self, reason: str) -> ConfigError | RunFailedError:
        if self._held:
            reason += f" {len(self._held)} more nodes have slots whose CPUs or GPUs others hold."
        if self._lost:
            return RunFailedError(f"{len(self._lost)} nodes were lost: {reason}")
        return ConfigError(reason)

    def _lose(self, node: str) -> None:
        """A node went while it was asked for something."""
        self.forget(node)
        self._writer.events.write(Event.NODE_LOST, node_id=node)
        self._console.say(f"node {node[:8]} was lost before it held ranks")

    def _ask(self, refs: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Answers by node; a node that is gone, or silent for so long, gives none."""
        if not refs:
            return {}
        ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s)
        answers: dict[str, Any] = {}
        for node, ref in refs.items():
            if ref not in ready:
                continue
            try:
                answers[node] = ray.get(ref)
            except RayError as error:
                _log.warning("node %s did not answer: %s", node[:8], error)
        return answers

    def _fewest(self, dp: int | Literal["auto"], pp: int) -> int:
        """The smallest dp to go on with."""
        cluster = self._config.cluster
        if dp == "auto" or (cluster.elastic and self._lost):
            return max(1, cluster.min_nodes * cluster.node.slots // pp)
        return dp

    def _is_new(self, node: str) -> bool:
        return node not in self._agents and node not in self._lost

    def _mesh_slots(self) -> int:
        """Slots of the mesh that was asked for; one pipeline where dp is auto, all that a plan may use where pp is."""
        parallel = self._config.train.parallel
        if parallel.pp == "auto":
            return self._config.cluster.total_slots
        return parallel.pp * (1 if parallel.dp == "auto" else parallel.dp)

    def _start_agents(self, timeout_s: float) -> bool:
        """Start agents on new nodes, see that they read the run's storage, and announce them; False when none came.

        Raises:
            ConfigError: a node cannot read `run.storage`.
        """
        cluster = self._config.cluster
        run_id = f"{self._config.run.name}-{uuid.uuid4().hex[:8]}"
        wanted = share_slots(
            {node.node_id: node.slots for node in self._session.nodes() if node.alive and self._is_new(node.node_id)},
            taken=sum(info.slots for info in self._infos.values()),
            config=cluster,
            mesh_slots=self._mesh_slots(),
        )
        for node_id, slots in wanted.items():
            self._agents[node_id] = start_agent(
                node_id,
                run_id=run_id,
                slots=slots,
                cpus_per_slot=cluster.node.cpus_per_slot,
                gpus_per_slot=1 if cluster.node.gpus else 0,
                lease_s=cluster.lease_s,
                logs_uri=self._writer.folder.logs_uri,
            )
        hellos = {node: self._agents[node].hello.remote() for node in wanted}
        answers = self._ask(hellos, timeout_s)
        failed, _ = ray.wait(list(hellos.values()), num_returns=len(hellos), timeout=0.0) if hellos else ([], [])
        self._held = set()
        for node, hello in hellos.items():
            if node in answers:
                self._infos[node] = answers[node]
            elif hello in failed:
                self._lose(node)
            else:
                self._held.add(node)
                self._end_agent(node)
        if answers:
            self._check_storage(list(answers))
        come = [node for node in wanted if node in self._infos]
        if come:
            self._announce()
            for node in come:
                self._agents[node].warm.remote()
        return bool(come)

    def _announce(self) -> None:
        pids = self._session.pids()
        fields = [
            {"node_id": node, "host": info.host, "slots": info.slots, "pid": pids.get(node)}
            for node, info in self._infos.items()
        ]
        self._writer.events.write(Event.NODES_READY, fields={"nodes": fields})
        slots = sum(info.slots for info in self._infos.values())
        self._console.say(f"{len(self._infos)} nodes with {slots} slots are ready")

    def _end_agent(self, node: str) -> None:
        agent = self._agents.pop(node, None)
        if agent is not None:
            try:
                ray.kill(agent)
            except (RayError, ValueError) as error:
                _log.debug("the agent of node %s was gone already: %s", node[:8], error)

    def _check_storage(self, nodes: list[str]) -> None:
        """Every node must read what this process writes to `run.storage`; one that does not answer is lost."""
        uri = f"{self._writer.folder.root}/control/nonce"
        nonce = uuid.uuid4().hex
        storage.write_bytes(uri, nonce.encode())
        answers = self._ask({node: self._agents[node].check_storage.remote(uri, nonce) for node in nodes}, AGENT_S)
        for node in nodes:
            if node not in answers:
                self._lose(node)
            elif answers[node] is not None:
                raise ConfigError(
                    f"run.storage={self._config.run.storage}: node {node[:8]} ({self._infos[node].host}) cannot read "
                    f"what this process wrote to {uri}: {answers[node]}. Put run.storage on a file system that all "
                    "nodes mount, or on an object store (s3://bucket/prefix)."
                )
        storage.remove_file(uri)
