"""Nodes that die while a run asks something of them, and slots that somebody else holds."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import node_pool
from cluster.config import load_config
from cluster.console import RunConsole
from cluster.errors import RunFailedError
from cluster.local_nodes import LocalCluster
from cluster.node_pool import NodePool
from cluster.ray_auth import shown_token
from cluster.ray_session import Session, open_session
from cluster.run_store import RunWriter
from data_service.errors import ConfigError
from tests.helpers.runs import write_run
from tests.helpers.waiting import until

OBJECT_STORE = 80 * 2**20


@contextmanager
def pool_on(session: Session, file: Path, *overrides: str) -> Iterator[tuple[NodePool, RunWriter]]:
    config = load_config(file, list(overrides))
    with (
        contextlib.closing(RunWriter.open(config)) as writer,
        NodePool(config, session, writer, RunConsole(total_steps=1, quiet=True)) as pool,
    ):
        yield pool, writer


def named(writer: RunWriter, name: str) -> list[dict[str, object]]:
    return [event for event in writer.folder.events() if event["event"] == name]


def no_wait(reason: str) -> None:
    raise AssertionError(f"waited for nodes: {reason}")


@pytest.mark.timeout(180)
def test_nodes_that_die_before_ranks_are_placed_are_left_out(tmp_path: Path) -> None:
    file = write_run(tmp_path, nodes=3, slots=1)
    config = load_config(file, [])
    with open_session(config.cluster, config.serve) as session, pool_on(session, file) as (pool, writer):
        pool.start()
        assert session.local is not None
        first, second, third = [node.node_id for node in session.local.nodes]
        assert [len(event["nodes"]) for event in named(writer, "nodes_ready")] == [3]  # type: ignore[arg-type]
        session.local.kill_node(0)
        placement = pool.place(2, 1, on_wait=no_wait)
        assert [item["node_id"] for item in placement.describe()] == [second, third]
        assert pool.rendezvous(second).host == pool.host_by_node()[second]
        assert [event["node_id"] for event in named(writer, "node_lost")] == [first]

        # Ray knows of a loss before anybody has told the pool.
        session.local.kill_node(1)
        until(lambda: sum(node.alive for node in session.nodes()) == 2, "Ray notices the dead node")
        assert set(pool.data_hosts()) == {third}
        with pytest.raises(RunFailedError, match="nodes were lost"):
            pool.place(1, 2, on_wait=no_wait)


@ray.remote
class Holder:
    """Somebody else who takes CPUs of the cluster, as an agent of a killed controller does until its lease ends."""

    def here(self) -> None:
        """Answer."""


@contextmanager
def pool_beside_a_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_s: int
) -> Iterator[tuple[NodePool, RunWriter, Any]]:
    """A started pool on a cluster of one node, of whose two CPUs the holder has one."""
    monkeypatch.setattr(node_pool, "AGENT_S", 3.0)
    file = write_run(tmp_path, slots=2)
    with LocalCluster.start(nodes=0, slots=1, head_cpus=2, object_store_bytes=OBJECT_STORE) as other:
        with shown_token(other.client_environment()):
            overrides = (f"cluster.address={other.address}", f"cluster.wait_s={wait_s}")
            config = load_config(file, list(overrides))
            with (
                open_session(config.cluster, config.serve) as session,
                pool_on(session, file, *overrides) as (pool, writer),
            ):
                holder = Holder.options(num_cpus=1).remote()
                ray.get(holder.here.remote())
                pool.start()
                yield pool, writer, holder


@pytest.mark.timeout(180)
def test_slots_that_others_hold_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pool_beside_a_holder(tmp_path, monkeypatch, wait_s=60) as (pool, writer, holder):
        assert pool.agents() == {}
        assert named(writer, "nodes_ready")[-1]["nodes"] == []
        reasons: list[str] = []

        def give_back(reason: str) -> None:
            reasons.append(reason)
            ray.kill(holder)

        placement = pool.place(2, 1, on_wait=give_back)
        assert len(placement.describe()) == 2
        assert len(reasons) == 1
        assert len(named(writer, "nodes_ready")) == 2, "a node that came late is not announced"
        assert named(writer, "node_lost") == []


@pytest.mark.timeout(120)
def test_a_mesh_that_never_fits_is_the_configuration_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pool_beside_a_holder(tmp_path, monkeypatch, wait_s=2) as (pool, _, _):
        with pytest.raises(ConfigError, match="others hold"):
            pool.place(1, 2, on_wait=lambda _: None)
