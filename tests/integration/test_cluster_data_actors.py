"""The data service's actors: what a dead control plane costs, and what is done when its port is gone."""

import os
import signal
import socket
from pathlib import Path

import psutil
import pytest
import ray

from cluster.data_actors import DataServiceHandle
from cluster.local_nodes import LocalCluster
from cluster.ray_auth import shown_token
from data_service.client import DataClient
from data_service.config import DataServiceConfig
from tests.helpers.data_runs import GLOBAL_BATCH, read_hashes, small_order
from tests.helpers.waiting import until
from tests.helpers.written_datasets import stream_dataset


def processes(service: DataServiceHandle, role: str) -> list[int]:
    return [int(item["pid"]) for item in service.describe() if item["role"] == role]


@pytest.mark.timeout(180)
def test_the_service_starts_beside_a_dead_node_and_its_control_plane_comes_back(tmp_path: Path) -> None:
    dataset = stream_dataset(tmp_path / "dataset")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        config = DataServiceConfig(metrics_port=min(probe.getsockname()[1], 65_000))
    with LocalCluster.start(nodes=2, slots=1, object_store_bytes=80 * 2**20) as cluster:
        assert cluster.head is not None
        with shown_token(cluster.client_environment()):
            ray.init(address=cluster.address, _node_ip_address=cluster.head.host, log_to_driver=False)
            hosts = {node.node_id: node.host for node in cluster.nodes}
            cluster.kill_node(0)
            gone = cluster.nodes[0].node_id
            service = DataServiceHandle(
                dataset.uri,
                config,
                order=small_order(),
                dataset_digest=dataset.manifest.digest,
                host_by_node=hosts,
                head_node=cluster.head.node_id,
            )
            try:
                access = service.start()
                workers = processes(service, "worker")
                assert gone not in {item["node_id"] for item in service.describe()}
                hosts.pop(gone)
                client = DataClient(access)
                plan = client.plan("train")
                truth = [dataset.hash_of_step(plan, step) for step in range(4)]
                assert read_hashes(client, 0, 4, 1) == truth
                client.close()
                assert len({item["metrics_address"] for item in service.describe()}) == 3

                os.kill(processes(service, "control")[0], signal.SIGKILL)
                until(service.watch, "the loss is seen")
                assert service.repair(hosts) == access
                assert service.repair(hosts) == access, "a control plane that still starts was taken for lost"
                until(lambda: processes(service, "control"), "the control plane is back")
                assert processes(service, "worker") == workers, "a worker that answered was replaced"
                client = DataClient(access)
                assert read_hashes(client, 0, 4, 1) == truth
                client.close()

                host, _, port = access.control[0].rpartition(":")
                in_flight = DataClient(access)
                reading = in_flight.stream("train", 0, 4, (0, GLOBAL_BATCH))
                held = [next(reading)]
                os.kill(processes(service, "control")[0], signal.SIGKILL)
                with socket.socket() as other:
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

                    def bind() -> bool:
                        try:
                            other.bind((host, int(port)))
                        except OSError:
                            return False
                        other.listen()
                        return True

                    until(bind, "the port is free")
                    until(service.watch, "the loss is seen")
                    assert service.repair(hosts) == access
                    until(service.watch, "the port cannot be had")
                    moved = service.repair(hosts)
                assert moved.control != access.control
                client = DataClient(moved)
                assert read_hashes(client, 0, 4, 1) == truth
                client.close()
                # Ranks in flight know the old workers alone, until their attempt has ended.
                held.extend(reading)
                assert len(held) == 4
                late = in_flight.stream("train", 40, 44, (0, GLOBAL_BATCH))
                assert [next(late).index for _ in range(4)] == list(range(40, 44))
                in_flight.close()
                assert all(psutil.pid_exists(pid) for pid in workers)
                service.end_superseded()
                until(lambda: not any(psutil.pid_exists(pid) for pid in workers), "the old workers have ended")
                assert processes(service, "worker")
            finally:
                service.stop()
                ray.shutdown()
