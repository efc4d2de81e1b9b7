"""A Ray cluster of several nodes on this machine, for laptops, demos and tests.

Owns the processes it starts, their folder and their token, and leaves nothing behind. Every node is a real `ray start
--block` under a keeper of its own (`cluster.node_keeper`), in a session of its own: Ctrl-C in the terminal does not
reach it, and it ends when this process does, whatever ends it. Never calls `ray stop`, which would end other clusters
of this machine, and never looks at what HOME holds.

Each cluster has a block of the loopback network (127.x.y.2 is its head), and each node an address there, a folder of
its own and fixed free ports. That keeps clusters from taking each other's ports, makes concurrent starts safe (nodes
sharing a folder race for socket names) and quick: a raylet waits for its agents to tell their ports unless they are
fixed (Ray 2.60; four nodes on two cores: 23 s in sequence with shared folders and open ports, 10 s at once with these).
"""

import atexit
import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster import node_keeper
from cluster.errors import LocalNodeError
from cluster.ray_auth import shown_token

__all__ = ["HEAD_RESOURCE", "SLOT_RESOURCE", "LocalCluster", "LocalNode"]

_log = logging.getLogger(__name__)

HEAD_RESOURCE = "stormjib_head"
"""Custom resource (1) of a local head."""
SLOT_RESOURCE = "stormjib_slot"
"""Custom resource of a local worker node: the ranks it may hold."""

START_S = 120.0
"""A node must have joined within this time."""
STOP_S = 30.0
"""A keeper must have ended its node within this time."""
_LONGEST_FOLDER = 30
"""A Unix socket's path may have 107 bytes, and Ray adds up to 76 to the folder's."""
_NO_PORT = "65536"
"""Nothing can listen there. The dashboard's process, which runs on a head with a dashboard and without one, gives its
metrics to anybody on all interfaces unless the head is 127.0.0.1 (Ray 2.60, dashboard/head.py), which a node cannot be:
`ray start` replaces that address. Where the process cannot listen it goes on without."""
_BLOCKS = 65_000
"""Blocks of 256 addresses that a cluster takes one of by chance, from 127.0.1.0 on; a large one goes into the next."""
_PACKAGE_ROOT = str(Path(__file__).resolve().parent.parent)

_NODE_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # A dead raylet refuses connections at once, a busy one answers late: many quick checks, each with a long patience.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}


@dataclass
class LocalNode:
    """A Ray node on this machine."""

    name: str
    host: str
    """Its address on the loopback network."""
    pid: int
    """Its keeper: session leader, process group and parent of all its orphans."""
    log: Path
    """Output of `ray start`; gone after `LocalCluster.stop`."""
    folder: Path
    keeper: "subprocess.Popen[bytes]" = field(repr=False)
    node_id: str = ""
    """Ray's node id in hex, known once it has joined."""

    @property
    def is_running(self) -> bool:
        """Whether its keeper is there."""
        return self.keeper.poll() is None

    def processes(self) -> list[int]:
        """PIDs of the node's live processes, parents first; the keeper is not among them."""
        return node_keeper.descendants(self.pid)

    def raylet(self) -> int | None:
        """PID of the node's raylet; None when it is gone."""
        for pid in self.processes():
            try:
                name = Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                continue
            if name == "raylet":
                return pid
        return None


class LocalCluster:
    """A head and `nodes` worker nodes on this machine."""

    def __init__(self, folder: Path) -> None:
        """Use `start`."""
        self._folder = folder
        self._ports: set[tuple[str, int]] = set()
        self._block = 1 + secrets.randbelow(_BLOCKS)
        self._stopped = False
        self.token_file = folder / "token"
        """File (mode 0600) with the token that every client of the cluster must show."""
        self.head: LocalNode | None = None
        self.nodes: list[LocalNode] = []
        """The worker nodes; one that was killed stays in the list."""
        self.address = ""
        """`host:port` of the head."""

    @classmethod
    def start(
        cls,
        nodes: int,
        slots: int,
        *,
        cpus_per_slot: float = 1.0,
        gpus: int = 0,
        head_cpus: float = 1.0,
        head_gpus: int = 0,
        object_store_bytes: int = 128 * 2**20,
        dashboard: bool = False,
    ) -> "LocalCluster":
        """Start a head and worker nodes; returns when all have joined.

        Nodes start at once. On a machine so busy that one of them misses Ray's own deadline (30 s, Ray 2.60), and where
        another process takes a port in the moment before a node does, all are started once more, one after the other.

        Args:
            nodes: worker nodes; may be 0.
            slots: ranks a worker node may hold: its resource `stormjib_slot`.
            cpus_per_slot: logical CPUs a slot takes; a worker node offers slots · cpus_per_slot of them.
            gpus: GPUs a worker node offers, 0 … n-1 on the first, the next on the second, and so on.
            head_cpus: logical CPUs of the head, for tasks and replicas; ranks do not run there.
            head_gpus: GPUs of the head, the same devices as the first node's: replicas follow training in time.
            object_store_bytes: Ray's object store on each node; at least 75 MiB.
            dashboard: start Ray's dashboard, which takes submitted jobs.

        Raises:
            LocalNodeError: a node ended early or did not join in time; its last output is in the message.
        """
        for in_turn in (False, True):
            cluster = cls(_make_folder())
            atexit.register(cluster.stop)
            try:
                cluster._write_token()
                cluster._start_head(head_cpus, head_gpus, object_store_bytes, dashboard)
                for index in range(nodes):
                    if in_turn:
                        cluster._await_joined()
                    resources = {SLOT_RESOURCE: slots}
                    cpus = slots * cpus_per_slot
                    cluster._start_worker(index + 1, cpus, gpus, resources, object_store_bytes)
                cluster._await_joined()
            except LocalNodeError as error:
                cluster.stop()
                if in_turn:
                    raise
                _log.warning("%s\nStarting the nodes once more, one after the other.", error)
            except BaseException:
                cluster.stop()
                raise
            else:
                return cluster
        raise AssertionError("the second attempt returns or raises")

    def all_nodes(self) -> list[LocalNode]:
        """The head, then the worker nodes."""
        return [*([self.head] if self.head is not None else []), *self.nodes]

    def client_environment(self) -> dict[str, str]:
        """What a process needs in its environment to be let in."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    def kill_node(self, index: int) -> None:
        """SIGKILL every process of a worker node at once, as if its machine had lost power; returns when it is gone."""
        _end([self.nodes[index]])

    def stop(self) -> None:
        """End everything that was started and remove its folder. May be called again."""
        if self._stopped:
            return
        self._stopped = True
        atexit.unregister(self.stop)
        _end(self.all_nodes())
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _write_token(self) -> None:
        descriptor = os.open(self.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))

    def _start_head(self, cpus: float, gpus: int, object_store_bytes: int, dashboard: bool) -> None:
        host = self._host(0)
        port = self._free_port(host)
        self.address = f"{host}:{port}"
        arguments = [
            "--head",
            f"--port={port}",
            f"--ray-client-server-port={self._free_port(host)}",
            f"--include-dashboard={'true' if dashboard else 'false'}",
            f"--dashboard-host={host}",
            f"--dashboard-port={self._free_port(host)}",
            "--no-monitor",
        ]
        extra = {"DASHBOARD_METRIC_PORT": _NO_PORT}
        if gpus:
            extra["CUDA_VISIBLE_DEVICES"] = ",".join(_visible_gpus()[:gpus])
        self.head = self._start_node(0, arguments, cpus, gpus, {HEAD_RESOURCE: 1}, object_store_bytes, extra)
        deadline = time.monotonic() + START_S
        while not _accepts(host, port):
            self._check(self.head, deadline)
            time.sleep(0.02)

    def _start_worker(
        self, index: int, cpus: float, gpus: int, resources: dict[str, int], object_store_bytes: int
    ) -> None:
        extra = {}
        if gpus:
            first = (index - 1) * gpus
            extra["CUDA_VISIBLE_DEVICES"] = ",".join(_visible_gpus()[first : first + gpus])
        arguments = [f"--address={self.address}"]
        self.nodes.append(self._start_node(index, arguments, cpus, gpus, resources, object_store_bytes, extra))

    def _start_node(
        self,
        index: int,
        arguments: list[str],
        cpus: float,
        gpus: int,
        resources: dict[str, int],
        object_store_bytes: int,
        extra: dict[str, str],
    ) -> LocalNode:
        host, name = self._host(index), "head" if index == 0 else f"node-{index}"
        folder, log = self._folder / f"n{index}", self._folder / f"{name}.log"
        folder.mkdir()
        ports = (
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
            "runtime-env-agent-port",
            "metrics-export-port",
            "node-manager-port",
            "object-manager-port",
        )
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *arguments,
            f"--node-ip-address={host}",
            f"--node-name={name}",
            f"--temp-dir={folder}",
            f"--num-cpus={cpus:g}",
            f"--num-gpus={gpus}",
            f"--resources={json.dumps(resources)}",
            f"--object-store-memory={object_store_bytes}",
            "--include-log-monitor=false",
            "--min-worker-port=0",
            "--max-worker-port=0",
            *(f"--{option}={self._free_port(host)}" for option in ports),
        ]
        keeper_command = [sys.executable, "-I", "-S", node_keeper.__file__, str(folder), "--", *command]
        with log.open("wb") as output:
            keeper = subprocess.Popen(
                keeper_command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**_clean_environment(), **_NODE_ENVIRONMENT, **self.client_environment(), **extra},
                cwd=folder,
                start_new_session=True,
            )
        return LocalNode(name=name, host=host, pid=keeper.pid, log=log, folder=folder, keeper=keeper)

    def _await_joined(self) -> None:
        """Wait until the head knows all nodes as alive; fills in their ids."""
        with shown_token(self.client_environment()):
            from ray._raylet import GcsClient  # type: ignore[attr-defined]
            from ray.exceptions import RayError

            waiting = {node.host: node for node in self.all_nodes()}
            deadline = time.monotonic() + START_S
            try:
                client = GcsClient(address=self.address)
                while waiting:
                    for node_id, info in client.get_all_node_info().items():
                        if info.state == 0 and info.node_manager_address in waiting:
                            waiting.pop(info.node_manager_address).node_id = node_id.hex()
                    for node in waiting.values():
                        self._check(node, deadline)
                    time.sleep(0.05)
            except RayError as cause:
                raise LocalNodeError(f"The local Ray head ({self.address}) does not answer: {cause}") from cause

    def _check(self, node: LocalNode, deadline: float) -> None:
        if not node.is_running:
            what = "ended while it was starting"
        elif time.monotonic() > deadline:
            what = f"did not join within {START_S:.0f} s"
        else:
            return
        tail = node.log.read_text(errors="replace")[-3000:] if node.log.exists() else "(no output)"
        raise LocalNodeError(f"The local Ray node {node.name} ({node.host}) {what}. Its last output:\n{tail}")

    def _host(self, index: int) -> str:
        """Loopback address of a node."""
        number = (127 << 24) + (self._block << 8) + 2 + index
        return socket.inet_ntoa(number.to_bytes(4, "big"))

    def _free_port(self, host: str) -> int:
        """A port of `host` that nothing listens on and that was not given out before."""
        while True:
            with socket.socket() as probe:
                probe.bind((host, 0))
                port = int(probe.getsockname()[1])
            if (host, port) not in self._ports:
                self._ports.add((host, port))
                return port


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except OSError:
        return False
    return True


def _make_folder() -> Path:
    """A fresh private folder whose path is short enough for Ray's sockets."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(parent) <= _LONGEST_FOLDER - len("/sj-12345678/n000") and os.access(parent, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="sj-", dir=parent))
    raise LocalNodeError(
        f"Local nodes need a folder with a short path for their sockets, and {tempfile.gettempdir()}, /tmp and "
        "/var/tmp are too long or not writable. Set TMPDIR to a writable folder with a short path."
    )


def _clean_environment() -> dict[str, str]:
    """The environment without what ties processes to another Ray, and with our packages importable."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("RAY_ADDRESS", "RAY_AUTH", "RAY_JOB", "RAY_TMPDIR", "RAY_NAMESPACE", "RAY_RUNTIME_ENV"))
    }
    paths = [_PACKAGE_ROOT, *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    kept["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return kept


def _visible_gpus() -> list[str]:
    """Device names that this process may hand out."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(index) for index in range(64)]


def _end(nodes: list[LocalNode]) -> None:
    """Have keepers end their nodes, all at once; returns when they are done."""
    for node in nodes:
        with contextlib.suppress(ProcessLookupError):
            node.keeper.terminate()
    deadline = time.monotonic() + STOP_S
    for node in nodes:
        try:
            node.keeper.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            node.keeper.kill()
            node.keeper.wait()
        if node.keeper.stdin is not None:
            node.keeper.stdin.close()
