"""The data service of a run as Ray actors: one control plane, and workers spread over the nodes.

Owns where they run and their replacement when a node goes. The actors take no CPU slots and belong to the controller's
process: when that ends, whatever ends it, they end too.
"""

import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import ClusterError
from data_service.access import DataAccess
from data_service.config import DataConfig
from data_service.errors import StormjibError

__all__ = ["DataServiceHandle"]

_log = logging.getLogger(__name__)

START_S = 60.0
"""Control plane and workers must be up within this time."""
WATCH_EVERY_S = 2.0
"""How often an actor is asked whether it lives."""
PING_S = 3.0
"""An actor that does not answer for this long while the service is repaired is taken for lost."""


class _ControlActor:
    """The control plane in an actor's process."""

    def __init__(
        self, dataset_uri: str, seed: int, config: DataConfig, global_batch: int, token: str, host: str
    ) -> None:
        from data_service.control import ControlServer

        self._server = ControlServer(dataset_uri, seed, config, global_batch, token, host=host)

    def start(self) -> tuple[str, int]:
        """Serve; returns `host:port` and the process id."""
        return self._server.start(), os.getpid()

    def ping(self) -> None:
        """Answer."""


class _WorkerActor:
    """A data worker in an actor's process."""

    def __init__(self, dataset_uri: str, control: str, token: str, host: str, cache_bytes: int) -> None:
        from data_service.server import DataWorker

        self._worker = DataWorker(dataset_uri, control, token, host=host, cache_bytes=cache_bytes)

    def start(self) -> tuple[str, int]:
        """Serve and register; returns `host:port` and the process id."""
        return self._worker.start(), os.getpid()

    def ping(self) -> None:
        """Answer."""


@dataclass(eq=False)
class _Served:
    """One actor of the service."""

    node_id: str
    actor: Any
    started: Any
    """Reference to the address it serves at and its process id."""


class DataServiceHandle:
    """Starts, repairs and stops the data service of one run."""

    def __init__(
        self,
        dataset_uri: str,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        host_by_node: Mapping[str, str],
        head_node: str,
    ) -> None:
        """Nothing is started yet.

        Args:
            dataset_uri: the prepared dataset; every node must read it.
            config: the `data` section; `service` says how many workers.
            seed: decides the order of rows.
            global_batch: rows of an optimizer step.
            host_by_node: node id → address of the nodes that workers may run on.
            head_node: node id of Ray's head, which carries the control plane.
        """
        self._dataset_uri = dataset_uri
        self._config = config
        self._seed = seed
        self._global_batch = global_batch
        self._hosts = dict(host_by_node)
        self._head_node = head_node
        self._token = secrets.token_hex(32)
        self._control: _Served | None = None
        self._workers: list[_Served] = []
        self._pings: dict[Any, _Served] = {}
        self._asked = 0.0

    def start(self) -> DataAccess:
        """Start control plane and workers; returns when all of them serve.

        Raises:
            ClusterError: they did not come up in time.
            DataError: the dataset cannot be served.
            ConfigError: there is no dataset.
        """
        control = self._start_control()
        self._add_workers(control)
        for worker in self._workers:
            self._address(worker)
        return self._access(control)

    def repair(self, host_by_node: Mapping[str, str]) -> DataAccess:
        """Replace what is gone; returns at once where a worker is left, while the others start beside it.

        A new control plane has a new address, so that all workers are started anew with it.

        Args:
            host_by_node: node id → address of the nodes that are left.

        Raises:
            ClusterError: nothing could be started in time.
        """
        self._hosts = dict(host_by_node)
        assert self._control is not None, "the service was started"
        answered = self._answering([self._control, *self._workers])
        if self._control not in answered:
            self.stop()
            return self.start()
        self._workers = [worker for worker in self._workers if worker in answered]
        left = bool(self._workers)
        control = self._address(self._control)
        self._add_workers(control)
        if not left:
            self._address(self._workers[0])
        return self._access(control)

    def watch(self) -> bool:
        """Whether an actor of the service is dead; never blocks, and asks each one every two seconds at most.

        An actor that only keeps silent is not dead: ranks go round it, or fail by their own deadline.
        """
        if time.monotonic() - self._asked >= WATCH_EVERY_S:
            self._asked = time.monotonic()
            asked = set(self._pings.values())
            for served in [*self._workers, *([self._control] if self._control is not None else [])]:
                if served not in asked:
                    self._pings[served.actor.ping.remote()] = served
        if not self._pings:
            return False
        dead = False
        answered, _ = ray.wait(list(self._pings), num_returns=len(self._pings), timeout=0.0)
        for ref in answered:
            served = self._pings.pop(ref)
            try:
                ray.get(ref)
            except RayActorError:
                dead = dead or served is self._control or served in self._workers
        return dead

    def describe(self) -> list[dict[str, str | int]]:
        """Node, address and process of each worker that has started."""
        by_ref = {worker.started: worker for worker in self._workers}
        ready, _ = ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0.0) if by_ref else ([], [])
        described: list[dict[str, str | int]] = []
        for ref in ready:
            address, pid = self._started(by_ref[ref])
            described.append({"node_id": by_ref[ref].node_id, "address": address, "pid": pid})
        return described

    def stop(self) -> None:
        """End all actors of the service. May be called again."""
        for served in [*self._workers, *([self._control] if self._control is not None else [])]:
            _kill(served)
        self._workers, self._control = [], None

    def _start_control(self) -> str:
        node, host = self._head_node, self._head_host()
        arguments = (self._dataset_uri, self._seed, self._config, self._global_batch, self._token, host)
        self._control = _start(_ControlActor, node, arguments)
        return self._address(self._control)

    def _head_host(self) -> str:
        for record in ray.nodes():  # type: ignore[no-untyped-call]
            if record["NodeID"] == self._head_node and record["Alive"]:
                return str(record["NodeManagerAddress"])
        raise ClusterError(f"Ray's head {self._head_node[:8]} is gone, and with it the cluster. Start the run again.")

    def _add_workers(self, control: str) -> None:
        """Start workers until there are as many as configured, each on a node with the fewest of them."""
        if not self._hosts:
            raise ClusterError("No node is left for a data worker. Add nodes.")
        per_node = Counter(worker.node_id for worker in self._workers)
        for _ in range(self._config.service.workers - len(self._workers)):
            node = min(self._hosts, key=lambda node_id: per_node[node_id])
            per_node[node] += 1
            cache_bytes = self._config.service.cache_bytes
            arguments = (self._dataset_uri, control, self._token, self._hosts[node], cache_bytes)
            self._workers.append(_start(_WorkerActor, node, arguments))

    def _answering(self, served: list[_Served]) -> list[_Served]:
        """Those that answer, or still start, on nodes that are left; the others are ended."""
        on_nodes = [item for item in served if item.node_id in self._hosts or item.node_id == self._head_node]
        pings = {item.actor.ping.remote(): item for item in on_nodes}
        alive: list[_Served] = []
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

    def _address(self, served: _Served) -> str:
        return self._started(served)[0]

    def _started(self, served: _Served) -> tuple[str, int]:
        try:
            started: tuple[str, int] = ray.get(served.started, timeout=START_S)
            return started
        except RayTaskError as error:
            if isinstance(error.cause, StormjibError):
                raise error.cause from None
            raise
        except RayError as error:
            raise ClusterError(
                f"The data service did not start on node {served.node_id[:8]} within {START_S:.0f} s: {error}"
            ) from error

    def _access(self, control: str) -> DataAccess:
        service = self._config.service
        return DataAccess(
            control=(control,),
            token=self._token,
            run_ahead=service.run_ahead,
            read_stall_s=service.read_stall_s,
            stalled_s=service.stalled_s,
        )


def _start(kind: type, node_id: str, arguments: tuple[Any, ...]) -> _Served:
    actor: Any = (
        ray.remote(kind)
        .options(
            num_cpus=0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(*arguments)
    )
    return _Served(node_id, actor, actor.start.remote())


def _kill(served: _Served) -> None:
    try:
        ray.kill(served.actor)
    except (RayActorError, ValueError) as error:
        _log.debug("an actor of the data service was gone already: %s", error)
