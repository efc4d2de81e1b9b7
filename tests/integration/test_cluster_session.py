"""Which Ray a session joins, what it sees there, and what it refuses."""

from collections.abc import Iterator

import pytest
import ray

from cluster.local_nodes import LocalCluster
from cluster.ray_auth import shown_token
from cluster.ray_map import ray_mapper
from cluster.ray_session import open_session
from cluster.sections import ClusterConfig, NodeConfig
from data_service.errors import ConfigError, SourceError
from serve.config import ServeConfig


@pytest.fixture(scope="module")
def running() -> Iterator[LocalCluster]:
    """A Ray that somebody else started: a head with three CPUs."""
    with LocalCluster.start(nodes=0, slots=1, head_cpus=3, object_store_bytes=80 * 2**20) as cluster:
        yield cluster


def double(value: int) -> int:
    return 2 * value


def refuse(value: int) -> int:
    raise SourceError(f"item {value} is bad")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["address", "RAY_ADDRESS"])
def test_joins_a_running_cluster(running: LocalCluster, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", running.address)
    config = ClusterConfig(address=running.address if how == "address" else "auto", node=NodeConfig(slots=2))
    with shown_token(running.client_environment()):
        with open_session(config, ServeConfig()) as session:
            assert not session.is_local
            assert not session.in_job
            assert session.pids() == {}
            (head,) = session.nodes()
            assert head.is_head
            assert head.alive
            assert head.slots == 3
            assert running.head is not None
            assert head.host == running.head.host
            if how == "address":
                mapper = ray_mapper(parallel=2)
                assert list(mapper(double, range(7))) == [0, 2, 4, 6, 8, 10, 12]
                with pytest.raises(SourceError, match="item 0 is bad"):
                    list(mapper(refuse, range(3)))
        assert not ray.is_initialized()


def test_refuses_local_nodes_inside_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with (
        pytest.raises(ConfigError, match="inside a Ray job"),
        open_session(ClusterConfig(address="local"), ServeConfig()),
    ):
        pass


@pytest.mark.parametrize(
    ("address", "words"), [("ray://127.0.0.1:10001", "submit a job"), ("127.0.0.1:1", "no Ray could be joined")]
)
def test_refuses_what_it_cannot_join(address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words), open_session(ClusterConfig(address=address), ServeConfig()):
        pass


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://ray.example.com", "ray://127.0.0.1:10001"])
def test_an_address_for_submitting_jobs_is_named_as_what_it_is(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}.*submit a job"),
        open_session(ClusterConfig(address="auto"), ServeConfig()),
    ):
        pass
