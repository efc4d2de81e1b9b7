"""Local Ray nodes: real starts and kills, whatever HOME holds, and nothing left behind."""

import http.client
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from cluster.local_nodes import LocalCluster
from cluster.ray_auth import shown_token
from tests.helpers.shared_memory import shared_memory
from tests.helpers.waiting import is_alive, until

OBJECT_STORE = 80 * 2**20


def all_processes(cluster: LocalCluster) -> list[int]:
    nodes = cluster.all_nodes()
    return [pid for node in nodes for pid in (node.pid, *node.processes())]


def folder_of(cluster: LocalCluster) -> Path:
    return cluster.token_file.parent


@pytest.mark.timeout(180)
def test_kill_and_stop_leave_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = shared_memory()
    began = time.monotonic()
    with LocalCluster.start(nodes=2, slots=2, object_store_bytes=OBJECT_STORE) as cluster:
        started = time.monotonic()
        assert stat.S_IMODE(cluster.token_file.stat().st_mode) == 0o600
        with shown_token(cluster.client_environment()):
            assert cluster.head is not None
            ray.init(address=cluster.address, _node_ip_address=cluster.head.host, log_to_driver=False)
            try:
                nodes = {node["NodeID"]: node for node in ray.nodes()}
                assert {node.node_id for node in cluster.all_nodes()} == set(nodes)
                assert ray.get_runtime_context().get_node_id() == cluster.head.node_id
                assert [nodes[node.node_id]["Resources"]["stormjib_slot"] for node in cluster.nodes] == [2, 2]

                victim = cluster.nodes[0]
                processes = victim.processes()
                assert victim.raylet() in processes
                killing = time.monotonic()
                cluster.kill_node(0)
                killed = time.monotonic()
                assert not any(is_alive(pid) for pid in (victim.pid, *processes))

                # An outsider: the raylet and its children, not what is around them.
                outside = cluster.nodes[1]
                raylet = outside.raylet()
                assert raylet is not None
                below = [int(pid) for pid in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()]
                for pid in (raylet, *below):
                    os.kill(pid, signal.SIGKILL)
                until(lambda: not outside.is_running, "the keeper ends with its node")
                assert not outside.processes()

                until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1, "Ray notices the dead nodes")
                noticed = time.monotonic()
            finally:
                ray.shutdown()
        left = all_processes(cluster)
        stopping = time.monotonic()
    stopped = time.monotonic()
    assert left
    assert not any(is_alive(pid) for pid in left)
    assert not folder_of(cluster).exists()
    assert shared_memory() <= before
    with capsys.disabled():
        sys.stdout.write(
            f"\nhead + 2 nodes: start {started - began:.1f} s, kill {killed - killing:.2f} s, "
            f"seen by Ray within {noticed - killing:.1f} s, stop {stopped - stopping:.2f} s\n"
        )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("home", ["empty", "used", "unwritable"])
def test_home_does_not_matter(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / home
    if home == "unwritable":
        folder = Path("/dev/null")
    else:
        folder.mkdir()
    if home == "used":
        (folder / ".ray").mkdir()
        (folder / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef")
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        monkeypatch.setenv("RAY_TMPDIR", str(folder / "elsewhere"))
    monkeypatch.setenv("HOME", str(folder))
    before = sorted(folder.rglob("*")) if folder.is_dir() else []
    with LocalCluster.start(nodes=0, slots=1, object_store_bytes=OBJECT_STORE) as cluster:
        with shown_token(cluster.client_environment()):
            assert cluster.head is not None
            ray.init(address=cluster.address, _node_ip_address=cluster.head.host, log_to_driver=False)
            try:
                assert [node["Alive"] for node in ray.nodes()] == [True]
            finally:
                ray.shutdown()
    assert sorted(folder.rglob("*")) == before if folder.is_dir() else True


@pytest.mark.timeout(120)
def test_a_client_without_the_token_is_refused() -> None:
    script = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print(len(ray.nodes()))"
    with LocalCluster.start(nodes=0, slots=1, object_store_bytes=OBJECT_STORE) as cluster:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
        command = [sys.executable, "-c", script, cluster.address]
        refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert refused.returncode != 0
        assert "oken" in refused.stderr


@pytest.mark.timeout(180)
def test_clusters_of_one_machine_share_no_address() -> None:
    """Nor a port by that: one that is picked for a cluster cannot be taken by another before its node listens."""
    with (
        LocalCluster.start(nodes=1, slots=1, object_store_bytes=OBJECT_STORE) as one,
        LocalCluster.start(nodes=1, slots=1, object_store_bytes=OBJECT_STORE) as other,
    ):
        hosts = [node.host for cluster in (one, other) for node in cluster.all_nodes()]
        assert len(set(hosts)) == 4
        assert all(host.startswith("127.") and host != "127.0.0.1" for host in hosts)


@pytest.mark.timeout(120)
def test_nodes_end_when_their_owner_is_killed() -> None:
    script = (
        "import sys; from cluster.local_nodes import LocalCluster\n"
        f"cluster = LocalCluster.start(nodes=1, slots=1, object_store_bytes={OBJECT_STORE})\n"
        "pids = [pid for node in cluster.all_nodes() for pid in (node.pid, *node.processes())]\n"
        "print(cluster.token_file.parent, *pids, flush=True)\n"
        "sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert owner.stdout is not None
        folder, *pids = owner.stdout.readline().split()
        assert len(pids) > 8
        os.killpg(owner.pid, signal.SIGINT)  # Ctrl-C reaches the owner's process group; it does not reach the nodes
        owner.kill()
        owner.wait()
        until(lambda: not any(is_alive(int(pid)) for pid in pids), "the nodes end")
        until(lambda: not Path(folder).exists(), "their folder is removed")
    finally:
        if owner.poll() is None:
            owner.kill()


@pytest.mark.timeout(120)
def test_what_listens_on_all_interfaces_tells_a_stranger_nothing() -> None:
    with LocalCluster.start(nodes=1, slots=1, object_store_bytes=OBJECT_STORE) as cluster:
        assert cluster.head is not None
        logs = cluster.head.folder / "session_latest" / "logs" / "dashboard.log"
        until(lambda: "metrics server" in logs.read_text(errors="replace") if logs.exists() else False, "the dashboard")
        until(lambda: "http server disabled" in logs.read_text(errors="replace"), "the dashboard is up")
        open_ports = set()
        for pid in all_processes(cluster):
            try:
                sockets = psutil.Process(pid).net_connections("tcp")
            except psutil.NoSuchProcess:
                continue
            open_ports |= {
                item.laddr.port
                for item in sockets
                if item.status == psutil.CONN_LISTEN and item.laddr.ip in ("0.0.0.0", "::")
            }
        assert open_ports, "Ray's servers listen on all interfaces; has it changed?"
        for port in sorted(open_ports):
            assert plain_get(port, "/metrics") != 200, port
            assert plain_get(port, "/") != 200, port


def plain_get(port: int, path: str) -> int | None:
    """The status of an answer to a request without a token; None when what listens speaks no HTTP/1."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (http.client.HTTPException, OSError):
        return None
    finally:
        connection.close()
