"""Node agents on real nodes with real ranks: exits, kills, leases, and training over the loss of a node."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import RayActorError, RayError

from cluster.data_actors import DataServiceHandle
from cluster.errors import StaleAttemptError
from cluster.node_agent import AgentEvent, AgentInfo, ExitPayload, LeaseKeeper, start_agent
from cluster.ray_map import ray_mapper
from cluster.ray_session import Session, open_session
from cluster.sections import ClusterConfig, NodeConfig
from data_service.access import DataAccess
from data_service.prepare import prepare
from serve.config import ServeConfig
from tests.helpers.data_runs import GLOBAL_BATCH, SEED, order_of, reviews, small_config, small_order, write_csv
from tests.helpers.waiting import is_alive, until
from trainer.config import CheckpointConfig, ModelConfig, TrainConfig
from trainer.protocol import FinishedReport, StepReport, WorkerSpec, report_from_json

LEASE_S = 30.0
DEADLINE_S = 90.0
NOWHERE = DataAccess(("127.0.0.1:1",), "none", small_order(), "made-up", read_stall_s=0.3, stalled_s=1.0)


@dataclass
class Pool:
    """A session with an agent on each worker node."""

    session: Session
    agents: dict[str, Any]
    infos: dict[str, AgentInfo]
    folder: Path

    def add(self, node_id: str, lease_s: float = LEASE_S, slots: int = 1) -> Any:
        agent = start_agent(
            node_id,
            run_id=f"test-{time.monotonic_ns()}",
            slots=slots,
            cpus_per_slot=1,
            gpus_per_slot=0,
            lease_s=lease_s,
            logs_uri=str(self.folder / "logs"),
        )
        self.agents[node_id] = agent
        self.infos[node_id] = ray.get(agent.hello.remote(), timeout=DEADLINE_S)
        return agent


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    cluster = ClusterConfig(address="local", nodes=3, node=NodeConfig(slots=1), object_store_bytes=80 * 2**20)
    with open_session(cluster, ServeConfig()) as session:
        pool = Pool(session, {}, {}, tmp_path_factory.mktemp("agents"))
        for node in session.nodes():
            if node.slots:
                pool.add(node.node_id)
        keeper = LeaseKeeper(lambda: dict(pool.agents), LEASE_S)
        yield pool
        keeper.stop()
        ends = [agent.shutdown.remote() for agent in pool.agents.values()]
        ray.wait(ends, num_returns=len(ends), timeout=10)


def spec(attempt: int, *, data: DataAccess = NOWHERE, port: int = 1, vocab_size: int = 64) -> WorkerSpec:
    return WorkerSpec(
        attempt=attempt,
        rank=0,
        world_size=1,
        dp=1,
        pp=1,
        local_rank=0,
        device="cpu",
        master_addr="127.0.0.1",
        master_port=port,
        seed=SEED,
        seq_len=32,
        vocab_size=vocab_size,
        model=ModelConfig(d_model=16, num_layers=1, num_heads=2),
        train=TrainConfig(global_batch=GLOBAL_BATCH, steps=100_000, checkpoint=CheckpointConfig(every=100_000)),
        data=data,
        checkpoints_uri="",
        resume_step=None,
        interface="lo",
    )


def processes_below(agent_pid: int) -> list[int]:
    """The nursery of an agent and its ranks."""
    below = psutil.Process(agent_pid).children(recursive=True)
    return [child.pid for child in below if "cluster.rank_process" in " ".join(child.cmdline())]


def next_events(agent: Any, after: int) -> list[AgentEvent]:
    return until(lambda: ray.get(agent.poll.remote(after, 5.0), timeout=DEADLINE_S), "an event", DEADLINE_S)


def last_seq(agent: Any) -> int:
    events: list[AgentEvent] = ray.get(agent.poll.remote(0, 0.0), timeout=DEADLINE_S)
    return events[-1].seq if events else 0


@pytest.mark.timeout(240)
def test_a_failing_rank_says_why(pool: Pool) -> None:
    node, agent = next(iter(pool.agents.items()))
    info = pool.infos[node]
    assert (info.node_id, info.slots, info.gpu_ids) == (node, 1, ())
    assert info.host.startswith("127.")
    after = last_seq(agent)
    port = ray.get(agent.free_port.remote(), timeout=DEADLINE_S)
    ray.get(agent.start_attempt.remote(1, [spec(1, port=port).to_json()]), timeout=DEADLINE_S)
    event = next_events(agent, after)[-1]
    assert (event.kind, event.attempt, event.rank) == ("exit", 1, 0)
    ended = ExitPayload.from_json(event.payload)
    assert ended.code == 1
    assert ended.error_type in ("DataUnavailableError", "DataStalledError")
    assert "127.0.0.1:1" in ended.error
    assert 0 < len(ended.log_tail) <= 30
    log = pool.folder / "logs" / "attempt_1" / "rank_00000.log"
    assert ended.error_type in log.read_text()
    with pytest.raises(StaleAttemptError, match="Start a later one"):
        ray.get(agent.start_attempt.remote(1, [spec(1).to_json()]), timeout=DEADLINE_S)
    assert ray.get(agent.check_storage.remote(str(log), "nonce"), timeout=DEADLINE_S) is not None


@pytest.mark.timeout(240)
def test_kill_of_a_rank_is_told_at_once_and_a_stopped_attempt_is_silent(
    pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    node, agent = next(iter(pool.agents.items()))
    agent_pid = pool.infos[node].pid
    after = last_seq(agent)
    before = set(processes_below(agent_pid))  # the nursery: the attempt before has loaded it
    assert len(before) == 1
    # Rank 1 of a mesh whose rank 0 never comes: it waits in the rendezvous.
    lonely = replace(spec(10), rank=1, world_size=2, dp=2, master_port=ray.get(agent.free_port.remote()))
    ray.get(agent.start_attempt.remote(10, [lonely.to_json()]), timeout=DEADLINE_S)
    pid = until(lambda: set(processes_below(agent_pid)) - before, "a rank").pop()
    waiting = agent.poll.remote(after, 10.0)
    ray.get(agent.renew.remote(), timeout=5.0)  # a poll that waits keeps nobody else waiting
    killed_at = time.time()
    os.kill(pid, signal.SIGKILL)
    event = ray.get(waiting, timeout=DEADLINE_S)[0]
    told_s = time.time() - killed_at
    assert (event.kind, event.attempt, event.rank) == ("exit", 10, 1)
    assert ExitPayload.from_json(event.payload).code == -signal.SIGKILL
    assert told_s < 2.0
    ray.get(agent.start_attempt.remote(11, [replace(lonely, attempt=11).to_json()]), timeout=DEADLINE_S)
    stopping = time.monotonic()
    ray.get(agent.stop_attempt.remote(11), timeout=DEADLINE_S)
    stopped_s = time.monotonic() - stopping
    assert not [event for event in ray.get(agent.poll.remote(event.seq, 0.0), timeout=5.0) if event.kind == "exit"]
    with capsys.disabled():
        sys.stdout.write(f"\nexit told after {told_s * 1e3:.0f} ms, attempt stopped in {stopped_s * 1e3:.0f} ms\n")


@pytest.mark.timeout(240)
def test_training_goes_on_without_a_node(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    texts = reviews(300)
    config = small_config(write_csv(pool.folder / "reviews.csv", texts))
    dataset = str(pool.folder / "dataset")
    manifest = prepare(config, dataset, mapper=ray_mapper())
    order = list(pool.agents)
    hosts = {node: pool.infos[node].host for node in order}
    head = next(node.node_id for node in pool.session.nodes() if node.is_head)
    service = DataServiceHandle(
        dataset,
        config.service,
        order=order_of(config),
        dataset_digest=manifest.digest,
        host_by_node=hosts,
        head_node=head,
    )
    try:
        access = service.start()
        assert len({item["node_id"] for item in workers_of(service)}) == 2
        steps = train(pool, order[:2], 20, access, manifest.vocab_size, until_step=5)
        assert [step.step for step in steps] == [1, 2, 3, 4, 5]

        gone = order[0]
        local = pool.session.local
        assert local is not None
        killed = time.monotonic()
        local.kill_node([node.node_id for node in local.nodes].index(gone))
        with pytest.raises(RayActorError):
            ray.get(pool.agents[gone].poll.remote(0, 5.0), timeout=DEADLINE_S)
        failed_s = time.monotonic() - killed
        watched = time.monotonic()
        until(lambda: service.watch() or time.monotonic() - watched > 5.0, "the service is asked more than once")
        assert not service.watch(), "a worker that died with its node is the node's loss"
        del pool.agents[gone], hosts[gone]
        ray.get([agent.stop_attempt.remote(20) for agent in pool.agents.values()], timeout=DEADLINE_S)
        began = time.monotonic()
        access = service.repair(hosts)
        repaired_s = time.monotonic() - began
        again = train(pool, order[1:], 21, access, manifest.vocab_size, until_step=5)
        assert [step.sample_hash for step in again] == [step.sample_hash for step in steps]
        assert [step.loss for step in again] == [step.loss for step in steps]
        until(lambda: len(workers_of(service)) == 2, "a new data worker")
        assert gone not in {item["node_id"] for item in workers_of(service)}
        with capsys.disabled():
            sys.stdout.write(f"\ndead node: call failed after {failed_s:.2f} s; data repaired in {repaired_s:.2f} s\n")
    finally:
        service.stop()


def workers_of(service: DataServiceHandle) -> list[dict[str, str | int]]:
    return [item for item in service.describe() if item["role"] == "worker"]


def train(
    pool: Pool, nodes: list[str], attempt: int, access: DataAccess, vocab_size: int, until_step: int
) -> list[StepReport]:
    """Train on one rank of each node up to a step, and end the ranks."""
    port = ray.get(pool.agents[nodes[0]].free_port.remote(), timeout=DEADLINE_S)
    base = replace(
        spec(attempt, data=access, port=port, vocab_size=vocab_size),
        world_size=len(nodes),
        dp=len(nodes),
        master_addr=pool.infos[nodes[0]].host,
        checkpoints_uri=str(pool.folder / f"checkpoints_{attempt}"),
    )
    after = {node: last_seq(pool.agents[node]) for node in nodes}
    for rank, node in enumerate(nodes):
        text = replace(base, rank=rank).to_json()
        ray.get(pool.agents[node].start_attempt.remote(attempt, [text]), timeout=DEADLINE_S)
    steps: list[StepReport] = []
    while not steps or steps[-1].step < until_step:
        for event in next_events(pool.agents[nodes[0]], after[nodes[0]]):
            after[nodes[0]] = event.seq
            assert event.kind == "report", event.payload
            report = report_from_json(event.payload)
            assert not isinstance(report, FinishedReport)
            if isinstance(report, StepReport):
                steps.append(report)
    if attempt % 2:
        ray.get([pool.agents[node].stop_attempt.remote(attempt) for node in nodes], timeout=DEADLINE_S)
    return steps[:until_step]


@pytest.mark.timeout(240)
def test_ranks_die_with_their_agent(pool: Pool) -> None:
    node = list(pool.agents)[-1]
    agent, agent_pid = pool.agents[node], pool.infos[node].pid
    lonely = replace(spec(30), rank=1, world_size=2, dp=2, master_port=ray.get(agent.free_port.remote()))
    ray.get(agent.start_attempt.remote(30, [lonely.to_json()]), timeout=DEADLINE_S)
    ranks = until(lambda: pids if len(pids := processes_below(agent_pid)) == 2 else [], "nursery and rank")
    os.kill(agent_pid, signal.SIGKILL)
    with pytest.raises(RayError):
        ray.get(agent.poll.remote(0, 5.0), timeout=DEADLINE_S)
    until(lambda: not any(is_alive(pid) for pid in ranks), "the ranks end", 5.0)
    del pool.agents[node]


@pytest.mark.timeout(240)
def test_an_abandoned_agent_ends_its_ranks_and_itself(pool: Pool) -> None:
    node = next(
        node.node_id for node in pool.session.nodes() if node.alive and node.slots and node.node_id not in pool.agents
    )
    agent = pool.add(node, lease_s=3.0)
    agent_pid = pool.infos[node].pid
    del pool.agents[node]  # nobody renews its lease any more
    ray.get(agent.warm.remote(), timeout=DEADLINE_S)
    ranks = until(lambda: processes_below(agent_pid), "a nursery")
    renewed = time.monotonic()
    while time.monotonic() < renewed + 4.0:  # polls are renewals
        ray.get(agent.poll.remote(0, 0.5), timeout=DEADLINE_S)
    assert all(is_alive(pid) for pid in ranks)
    until(lambda: not is_alive(agent_pid), "the agent ends", 15.0)
    until(lambda: not any(is_alive(pid) for pid in ranks), "its ranks end", 5.0)
