"""The data service of a run as Ray actors: one control plane, and workers spread over the nodes.

Owns where they run and their replacement when they or their node go. A control plane comes back at the address that
running ranks and workers know, so that its end costs them nothing. The actors take no CPU slots and belong to the
controller's process: when that ends, whatever ends it, they end too.
"""

import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import ActorUnavailableError, ActorUnschedulableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.data_processes import ControlProcess, Start, WorkerProcess
from cluster.errors import ClusterError
from data_service.access import DataAccess
from data_service.bearer import TOKEN_VARIABLE, read_token
from data_service.config import DataServiceConfig
from data_service.errors import StormjibError
from data_service.plan import OrderSpec
from data_service.storage import s3_environment

__all__ = ["DataServiceHandle"]

_log = logging.getLogger(__name__)

START_S = 60.0
"""Control plane and workers must be up within this time."""
WATCH_EVERY_S = 2.0
"""How often an actor is asked whether it lives."""
PING_S = 3.0
"""An actor that does not answer for this long while the service is repaired is taken for lost."""
NODE_S = 15.0
"""An actor on a dead node is reported after this time, should nobody have noticed the node's loss until then."""
FAILED_STARTS = 5
"""So many starts in a row may fail, with no actor coming up between them, before the service gives up."""


@dataclass(eq=False)
class _Served:
    """One actor of the service."""

    role: Literal["control", "worker"]
    node_id: str
    actor: Any
    started: Any
    """Reference to the address it serves at and its process id."""
    seen_up: bool = False
    """Whether a repair has found it started."""
    node_lost: float | None = None
    """When it was found dead with its node, on the monotonic clock; None before."""


class DataServiceHandle:
    """Starts, repairs and stops the data service of one run."""

    def __init__(
        self,
        dataset_uri: str,
        config: DataServiceConfig,
        *,
        order: OrderSpec,
        dataset_digest: str,
        host_by_node: Mapping[str, str],
        head_node: str,
    ) -> None:
        """Nothing is started yet.

        Args:
            dataset_uri: the prepared dataset; every node must read it.
            config: how many workers, their caches and deadlines.
            order: what the run asks of the order of its rows.
            dataset_digest: the generation of the dataset that the run reads.
            host_by_node: node id → address of the nodes that workers may run on.
            head_node: node id of Ray's head, which carries the control plane.
        """
        self._dataset_uri = dataset_uri
        self._config = config
        self._order = order
        self._dataset_digest = dataset_digest
        self._hosts = dict(host_by_node)
        self._head_node = head_node
        # Who sets the token may scrape the metrics too.
        self._token = read_token(None) if os.environ.get(TOKEN_VARIABLE) else secrets.token_hex(32)
        self._control: _Served | None = None
        self._control_address = ""
        self._failed_starts = 0
        self._workers: list[_Served] = []
        self._superseded: list[_Served] = []
        """Workers of a control plane whose address was lost; ranks of the attempt that runs still read from them."""
        self._pings: dict[Any, _Served] = {}
        self._asked = 0.0

    def start(self) -> DataAccess:
        """Start control plane and workers; returns when all of them serve.

        Raises:
            ClusterError: they did not come up in time.
            DataError: the dataset cannot be served.
            ConfigError: there is no dataset.
        """
        self._control = self._start_control(port=0)
        self._control_address = self._address(self._control)
        self._add_workers()
        self._await_workers(self._config.workers)
        return self._access()

    def repair(self, host_by_node: Mapping[str, str]) -> DataAccess:
        """Replace what is gone; returns at once where a worker is left, while the others start beside it.

        A control plane that is gone is started at the same address, and the workers that are left register with it
        again. Only where its port cannot be had any more is everything started anew, at a new address; ranks that run
        know the old workers alone, which serve them until `end_superseded`.

        Args:
            host_by_node: node id → address of the nodes that are left.

        Raises:
            ClusterError: nothing could be started in time, or starts fail again and again.
        """
        self._hosts = dict(host_by_node)
        assert self._control is not None, "the service was started"
        if self._has_lost_its_port():
            _log.warning("the address %s of the data service cannot be had again", self._control_address)
            _kill(self._control)
            self._superseded += self._workers
            self._workers, self._control = [], None
            return self.start()
        answered = self._answering([self._control, *self._workers])
        self._workers = [worker for worker in self._workers if worker in answered]
        left = bool(self._workers)
        if self._control not in answered:
            self._control = self._start_control(port=int(self._control_address.rpartition(":")[2]))
        self._add_workers()
        if not left:
            self._await_workers(1)
        return self._access()

    def watch(self) -> bool:
        """Whether an actor of the service is dead; never blocks, and asks each one every two seconds at most.

        An actor that only keeps silent is not dead: ranks go round it, or fail by their own deadline. One that died
        with its node is left to those who watch the nodes, and is reported only if they do not see it.
        """
        served = [*self._workers, *([self._control] if self._control is not None else [])]
        if time.monotonic() - self._asked >= WATCH_EVERY_S:
            self._asked = time.monotonic()
            asked = set(self._pings.values())
            for item in served:
                if item not in asked:
                    self._pings[item.actor.ping.remote()] = item
        dead = any(self._is_over_its_start(item) for item in served)
        answered, _ = (
            ray.wait(list(self._pings), num_returns=len(self._pings), timeout=0.0) if self._pings else ([], [])
        )
        for ref in answered:
            item = self._pings.pop(ref)
            try:
                ray.get(ref)
            except ActorUnavailableError as error:
                _log.debug("an actor on node %s cannot be reached now: %s", item.node_id[:8], error)
            except RayActorError:
                dead = dead or (item in served and self._is_to_be_reported(item))
        return dead

    def describe(self) -> list[dict[str, str | int]]:
        """Role (`control` or `worker`), node, address and process of each actor that has started.

        Where metrics are served, `metrics_address` too.
        """
        described: list[dict[str, str | int]] = []
        for item in [*([self._control] if self._control is not None else []), *self._workers]:
            found = _result(item)
            if isinstance(found, tuple):
                address, pid, metrics_address = found
                described.append({"role": item.role, "node_id": item.node_id, "address": address, "pid": pid})
                if metrics_address is not None:
                    described[-1]["metrics_address"] = metrics_address
        return described

    def end_superseded(self) -> None:
        """End workers that only ranks of an earlier attempt know; to be called between attempts."""
        for served in self._superseded:
            _kill(served)
        self._superseded = []

    def stop(self) -> None:
        """End all actors of the service. May be called again."""
        self.end_superseded()
        for served in [*self._workers, *([self._control] if self._control is not None else [])]:
            _kill(served)
        self._workers, self._control = [], None

    def _start_control(self, port: int) -> _Served:
        """Start the control plane on the head; 0 takes any port."""
        arguments = (
            self._dataset_uri,
            self._dataset_digest,
            self._token,
            self._head_host(),
            port,
            self._config.metrics_port,
        )
        return _start("control", self._head_node, arguments)

    def _has_lost_its_port(self) -> bool:
        """Whether the control plane's process lives, and could not serve."""
        assert self._control is not None, "the service was started"
        found = _result(self._control)
        return isinstance(found, RayTaskError) and isinstance(found.cause, OSError)

    def _is_over_its_start(self, served: _Served) -> bool:
        """Whether its process lives, and its start has failed."""
        return isinstance(_result(served), RayTaskError)

    def _is_to_be_reported(self, served: _Served) -> bool:
        """Whether a dead actor is ours to replace now."""
        if served.node_id in _live_nodes():
            return True
        served.node_lost = served.node_lost or time.monotonic()
        return time.monotonic() - served.node_lost > NODE_S

    def _head_host(self) -> str:
        for record in ray.nodes():  # type: ignore[no-untyped-call]
            if record["NodeID"] == self._head_node and record["Alive"]:
                return str(record["NodeManagerAddress"])
        raise ClusterError(f"Ray's head {self._head_node[:8]} is gone, and with it the cluster. Start the run again.")

    def _add_workers(self) -> None:
        """Start workers until there are as many as configured, each on a node with the fewest of them."""
        if not self._hosts:
            raise ClusterError("No node is left for a data worker. Add nodes.")
        per_node = Counter(worker.node_id for worker in self._workers)
        for _ in range(self._config.workers - len(self._workers)):
            node = min(self._hosts, key=lambda node_id: per_node[node_id])
            per_node[node] += 1
            arguments = (
                self._dataset_uri,
                self._dataset_digest,
                self._control_address,
                self._token,
                self._hosts[node],
                self._config,
            )
            self._workers.append(_start("worker", node, arguments))

    def _await_workers(self, num_workers: int) -> None:
        """Wait until so many serve; one whose process or node goes meanwhile is replaced."""
        while True:
            for worker in self._workers[:num_workers]:
                try:
                    self._address(worker)
                except ClusterError as error:
                    if not isinstance(error.__cause__, (RayActorError, ActorUnschedulableError)):
                        raise
                    self._failed_starts += 1
                    if self._failed_starts >= FAILED_STARTS:
                        raise
                    _log.warning("%s", error)
                    live = _live_nodes()
                    self._hosts = {node: host for node, host in self._hosts.items() if node in live}
                    _kill(worker)
                    self._workers.remove(worker)
                    self._add_workers()
                    break
            else:
                return

    def _answering(self, served: list[_Served]) -> list[_Served]:
        """Those that answer, or still start, on nodes that are left; the others are ended."""
        on_nodes = [item for item in served if item.node_id in self._hosts or item.node_id == self._head_node]
        alive: list[_Served] = []
        pings: dict[Any, _Served] = {}
        for item in on_nodes:
            found = _result(item)
            if found is None:
                alive.append(item)  # a ping would wait for the end of its start
            elif isinstance(found, tuple):
                self._failed_starts = self._failed_starts if item.seen_up else 0
                item.seen_up = True
                pings[item.actor.ping.remote()] = item
            else:
                self._count_failed_start(item, found)
        deadline = time.monotonic() + PING_S
        waiting = list(pings)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                break
            try:
                ray.get(done[0])
            except RayError as error:
                _log.warning("an actor of the data service on node %s is gone: %s", pings[done[0]].node_id[:8], error)
            else:
                alive.append(pings[done[0]])
        for item in served:
            if item not in alive:
                _kill(item)
        return [item for item in served if item in alive]

    def _count_failed_start(self, served: _Served, error: RayError) -> None:
        _log.warning("the data service's %s on node %s did not start: %s", served.role, served.node_id[:8], error)
        self._failed_starts += 1
        if self._failed_starts >= FAILED_STARTS:
            self._address(served)

    def _address(self, served: _Served) -> str:
        return self._started(served)[0]

    def _started(self, served: _Served) -> Start:
        try:
            started: Start = ray.get(served.started, timeout=START_S)
            return started
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, StormjibError):
                raise error.cause from None
            raise ClusterError(
                f"The data service did not start on node {served.node_id[:8]} within {START_S:.0f} s: {error}"
            ) from error

    def _access(self) -> DataAccess:
        config = self._config
        return DataAccess(
            control=(self._control_address,),
            token=self._token,
            order=self._order,
            dataset_digest=self._dataset_digest,
            run_ahead=config.run_ahead,
            hedge_s=config.hedge_s,
            read_stall_s=config.read_stall_s,
            stalled_s=config.stalled_s,
        )


def _start(role: Literal["control", "worker"], node_id: str, arguments: tuple[Any, ...]) -> _Served:
    environment = s3_environment()  # a node that was there before the run has not inherited it
    actor: Any = (
        ray.remote(ControlProcess if role == "control" else WorkerProcess)
        .options(
            num_cpus=0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            **({"runtime_env": {"env_vars": environment}} if environment else {}),
        )
        .remote(*arguments)
    )
    return _Served(role, node_id, actor, actor.start.remote())


def _result(served: _Served) -> Start | RayError | None:
    """Where an actor that has started serves, why it did not, or None while it starts."""
    ready, _ = ray.wait([served.started], timeout=0.0)
    if not ready:
        return None
    try:
        started: Start = ray.get(ready[0])
    except RayError as error:
        return error
    return started


def _live_nodes() -> set[str]:
    return {record["NodeID"] for record in ray.nodes() if record["Alive"]}  # type: ignore[no-untyped-call]


def _kill(served: _Served) -> None:
    try:
        ray.kill(served.actor)
    except (RayActorError, ValueError) as error:
        _log.debug("an actor of the data service was gone already: %s", error)
