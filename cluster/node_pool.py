"""The nodes a run works on: their agents, what is known of them, and which are gone.

A node that was lost is never used again by this controller, whatever Ray still says of it.
"""

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
from cluster.events import Event
from cluster.node_agent import LeaseKeeper, start_agent
from cluster.placement import Placement, place, share_slots
from cluster.ray_session import DATA_ROLE, ROLE_LABEL, Session
from cluster.run_store import RunWriter
from data_service import storage
from data_service.errors import ConfigError

__all__ = ["NodePool", "Rendezvous"]

AGENT_S = 60.0
"""An agent must come up within this time."""
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

        Raises:
            ConfigError: a node cannot read `run.storage`.
        """
        self._start_agents()
        self._lease = LeaseKeeper(self.agents, self._config.cluster.lease_s)
        self._check_storage()
        pids = self._session.pids()
        fields = [
            {"node_id": node, "host": info.host, "slots": info.slots, "pid": pids.get(node)}
            for node, info in self._infos.items()
        ]
        self._writer.events.write(Event.NODES_READY, fields={"nodes": fields})
        slots = sum(info.slots for info in self._infos.values())
        self._console.say(f"{len(self._infos)} nodes with {slots} slots are ready")
        self.keep_warm()

    def agents(self) -> Mapping[str, Any]:
        """Agents of the nodes that are left."""
        return dict(self._agents)

    def host_by_node(self) -> dict[str, str]:
        """Addresses of the nodes that are left."""
        return {node: info.host for node, info in self._infos.items()}

    def data_hosts(self) -> dict[str, str]:
        """Addresses of the nodes that data workers run on: those with that role, or else those that hold ranks."""
        apart = {
            node.node_id: node.host
            for node in self._session.nodes()
            if node.alive and node.labels.get(ROLE_LABEL) == DATA_ROLE
        }
        return apart or self.host_by_node()

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
        agent = self._agents.pop(node, None)
        if agent is not None:
            try:
                ray.kill(agent)
            except (RayError, ValueError):
                return

    def keep_warm(self) -> None:
        """Have as many standby processes on each node as it has slots; they start in the background."""
        for agent in self._agents.values():
            agent.warm.remote()

    def rendezvous(self, node: str) -> Rendezvous:
        """A free port on a node, for the ranks to meet at."""
        port = ray.get(self._agents[node].free_port.remote(), timeout=AGENT_S)
        return Rendezvous(self._infos[node].host, int(port))

    def place(self, dp: int | Literal["auto"], pp: int, on_wait: Callable[[str], None]) -> Placement:
        """Slots for a mesh on the nodes that are left, fewer pipelines where elastic; waits where more may come.

        Raises:
            ConfigError: it does not fit, and nothing more can come in time.
        """
        cluster = self._config.cluster
        deadline = time.monotonic() + (0.0 if self._session.is_local else cluster.wait_s)
        told = False
        while True:
            slots = {node: info.slots for node, info in self._infos.items()}
            found = place(slots, dp, pp, at_least=self._fewest(dp, pp))
            if isinstance(found, Placement):
                return found
            if time.monotonic() >= deadline:
                raise ConfigError(found.reason)
            if not told:
                told = True
                on_wait(f"{found.reason} Waiting up to {cluster.wait_s:.0f} s for nodes.")
            time.sleep(LOOK_EVERY_S)
            self._start_agents()

    def _fewest(self, dp: int | Literal["auto"], pp: int) -> int:
        """The smallest dp to go on with."""
        cluster = self._config.cluster
        if dp == "auto" or (cluster.elastic and self._lost):
            return max(1, cluster.min_nodes * cluster.node.slots // pp)
        return dp

    def _is_new(self, node: str) -> bool:
        return node not in self._agents and node not in self._lost

    def _mesh_slots(self) -> int:
        """Slots of the mesh that was asked for; one pipeline where dp is auto."""
        parallel = self._config.train.parallel
        return parallel.pp * (1 if parallel.dp == "auto" else parallel.dp)

    def _start_agents(self) -> None:
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
        for node_id in wanted:
            self._infos[node_id] = ray.get(self._agents[node_id].hello.remote(), timeout=AGENT_S)

    def _check_storage(self) -> None:
        """Every node must read what this process writes to `run.storage`."""
        uri = f"{self._writer.folder.root}/control/nonce"
        nonce = uuid.uuid4().hex
        storage.write_bytes(uri, nonce.encode())
        for node, agent in self._agents.items():
            problem = ray.get(agent.check_storage.remote(uri, nonce), timeout=AGENT_S)
            if problem is not None:
                raise ConfigError(
                    f"run.storage={self._config.run.storage}: node {node[:8]} ({self._infos[node].host}) cannot read "
                    f"what this process wrote to {uri}: {problem}. Put run.storage on a file system that all nodes "
                    "mount, or on an object store (s3://bucket/prefix)."
                )
        storage.remove_file(uri)
