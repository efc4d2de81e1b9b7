"""Which Ray a run uses: the one it is part of, one whose address it is given, or nodes it starts on this machine.

Owns `ray.init` and what has to be undone after it, and `NodeView`, what the runtime knows of a node. There is no client
mode (`ray://`): remote use goes through Ray's Jobs API.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.local_nodes import HEAD_RESOURCE, SLOT_RESOURCE, LocalCluster
from cluster.node_request import requested_nodes
from cluster.ray_auth import shown_token
from cluster.sections import ClusterConfig
from data_service.errors import ConfigError
from data_service.storage import s3_environment
from serve.config import ServeConfig

__all__ = ["DATA_ROLE", "NAMESPACE", "RANKS_ROLE", "ROLE_LABEL", "NodeView", "Session", "open_session"]

NAMESPACE = "stormjib"
"""Ray namespace of everything the product names."""
ROLE_LABEL = "stormjib/role"
"""Node label of what a node is for; rendered Kubernetes groups carry it."""
RANKS_ROLE = "ranks"
"""The role of nodes that hold ranks; a node with another role holds none."""
DATA_ROLE = "data"
"""The role of nodes that are there for the data service and the preparation."""

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in the entrypoint of a submitted Ray job (Ray 2.60, dashboard/modules/job/job_supervisor.py)."""
_REACH_S = 10.0
"""A head that is to be joined must take a connection within this time."""
_HEAD_SPARE_CPUS = 2.0
"""Logical CPUs of a local head beyond those of the engine replicas: Serve's own actors, tasks of a preparation."""


@dataclass(frozen=True)
class NodeView:
    """A node as placement sees it."""

    node_id: str
    """Ray's node id in hex."""
    host: str
    """Address at which other nodes reach it."""
    alive: bool
    slots: int
    """Ranks it may hold; 0 for a node that holds none."""
    is_head: bool
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's node labels."""


@dataclass(frozen=True)
class Session:
    """A Ray that this process is connected to."""

    cluster: ClusterConfig
    address: str
    """`host:port` of Ray's head."""
    in_job: bool
    """Whether this process is the entrypoint of a submitted Ray job; what it deploys outlives it."""
    local: LocalCluster | None
    """The nodes of this machine, where the session started them."""

    @property
    def is_local(self) -> bool:
        """Whether all nodes are on this machine because the session started them."""
        return self.local is not None

    def nodes(self) -> list[NodeView]:
        """All nodes Ray knows, dead ones too; local ones in the order of their start, others by address and id.

        A node of a local session holds the slots it was started with, the head none. Elsewhere a node holds as many
        slots as its resource `stormjib_slot` says, none where its role is another, or else as many as its CPUs and
        GPUs allow; a head with CPUs counts like any other.
        """
        views = [self._view(record) for record in ray.nodes()]  # type: ignore[no-untyped-call]
        return sorted(views, key=lambda view: (_host_key(view.host), view.node_id))

    def pids(self) -> dict[str, int]:
        """Node id → PID of its raylet, for the nodes that the session started and that still run."""
        found = {}
        for node in self.local.all_nodes() if self.local is not None else []:
            raylet = node.raylet()
            if raylet is not None:
                found[node.node_id] = raylet
        return found

    def names(self) -> dict[str, str]:
        """Node id → a short name for people."""
        local = {node.node_id: node.name for node in self.local.all_nodes()} if self.local is not None else {}
        return {view.node_id: local.get(view.node_id, view.host) for view in self.nodes()}

    def _view(self, record: Mapping[str, object]) -> NodeView:
        resources = record["Resources"]
        labels = record.get("Labels") or {}
        assert isinstance(resources, Mapping), "Ray reports resources as a mapping"
        assert isinstance(labels, Mapping), "Ray reports labels as a mapping"
        return NodeView(
            node_id=str(record["NodeID"]),
            host=str(record["NodeManagerAddress"]),
            alive=bool(record["Alive"]),
            slots=self._slots(resources, labels),
            is_head="node:__internal_head__" in resources,
            labels={str(key): str(value) for key, value in labels.items()},
        )

    def _slots(self, resources: Mapping[str, float], labels: Mapping[str, str]) -> int:
        if self.local is not None:
            return 0 if HEAD_RESOURCE in resources else int(resources.get(SLOT_RESOURCE, 0))
        if SLOT_RESOURCE in resources:
            return int(resources[SLOT_RESOURCE])
        if labels.get(ROLE_LABEL, RANKS_ROLE) != RANKS_ROLE:
            return 0
        node = self.cluster.node
        by_cpu = int(resources.get("CPU", 0) / node.cpus_per_slot + 1e-6)
        by_gpu = int(resources.get("GPU", 0)) if node.gpus else by_cpu
        return min(by_cpu, by_gpu)


@contextmanager
def open_session(
    cluster: ClusterConfig, serve: ServeConfig, *, with_nodes: bool = True, dashboard: bool = False
) -> Iterator[Session]:
    """Connect to Ray for as long as the block runs; local nodes are started before it and ended after it.

    Args:
        cluster: where to connect, and what local nodes look like.
        serve: how many CPUs and GPUs the replicas of the local head need.
        with_nodes: start the worker nodes as well; without them the local head stands alone.
        dashboard: start Ray's dashboard on the local head.

    Raises:
        ConfigError: `cluster.address` names something that cannot be joined from here.
        LocalNodeError: a local node did not start.
    """
    in_job = _JOB_VARIABLE in os.environ
    given = os.environ.get("RAY_ADDRESS", "")
    if cluster.address == "local":
        if in_job:
            raise ConfigError(
                "cluster.address=local inside a Ray job: the job is part of a cluster already, and nodes started here "
                "would escape it. Remove cluster.address, or set it to auto."
            )
    elif cluster.address == "auto":
        if in_job or given not in ("", "local"):
            if "://" in given:
                raise ConfigError(
                    f"RAY_ADDRESS={given}: that is where jobs are submitted to, and only host:port of a Ray head can "
                    "be joined from here. To run on that cluster submit a job (stormjib submit, or ray job submit); to "
                    "run on this machine unset RAY_ADDRESS, or set cluster.address=local."
                )
            with _connected(given or "auto", None) as address, _joined_nodes(cluster, with_nodes):
                yield Session(cluster, address, in_job, None)
            return
    else:
        if "://" in cluster.address:
            raise ConfigError(
                f"cluster.address={cluster.address}: only host:port of a Ray head can be joined. To run on a remote "
                "cluster submit a job (stormjib submit, or ray job submit)."
            )
        with _connected(cluster.address, None) as address, _joined_nodes(cluster, with_nodes):
            yield Session(cluster, address, in_job, None)
        return
    with LocalCluster.start(
        nodes=cluster.nodes if with_nodes else 0,
        slots=cluster.node.slots,
        cpus_per_slot=cluster.node.cpus_per_slot,
        gpus=cluster.node.gpus,
        head_cpus=_HEAD_SPARE_CPUS + serve.replicas.max * serve.cpus_per_replica,
        head_gpus=_whole(serve.replicas.max * serve.gpus_per_replica),
        object_store_bytes=cluster.object_store_bytes,
        dashboard=dashboard,
    ) as local:
        assert local.head is not None, "a started cluster has a head"
        with shown_token(local.client_environment()), _connected(local.address, local.head.host) as address:
            yield Session(cluster, address, in_job, local)


@contextmanager
def _connected(address: str, node_host: str | None) -> Iterator[str]:
    """Connect this process; `node_host` names the node of this machine to attach to, where it has several."""
    _check_reachable(address)
    where: dict[str, Any] = {} if node_host is None else {"_node_ip_address": node_host}
    if node_host is None and (variables := s3_environment()):
        where["runtime_env"] = {"env_vars": variables}  # nodes that were there before have not inherited it
    try:
        context: Any = ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING, **where
        )
    except (ConnectionError, ValueError, RuntimeError, RayError) as cause:
        raise ConfigError(
            f"cluster.address={address}: no Ray could be joined there: {cause} Start one (ray start --head), give the "
            "address of another, or set cluster.address=local."
        ) from cause
    try:
        yield str(context.address_info["gcs_address"])
    finally:
        with contextlib.suppress(RuntimeError):
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Try the address once; Ray itself would try for minutes (2.60)."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except OSError as cause:
        raise ConfigError(
            f"cluster.address={address}: no Ray could be joined there: {cause}. Start one (ray start --head), give the "
            "address of another, or set cluster.address=local."
        ) from cause


def _joined_nodes(cluster: ClusterConfig, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """The nodes of the run are asked for where the joined cluster can grow."""
    return requested_nodes(cluster) if wanted else contextlib.nullcontext()


def _whole(count: float) -> int:
    return int(-(-count // 1))


def _host_key(host: str) -> tuple[int, ...]:
    """Sorts IPv4 addresses by number; anything else comes first and is sorted by node id."""
    parts = host.split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()
