"""SIGKILL of whole nodes from outside: the run goes on, with every row once and the same losses."""

import random
import uuid
from pathlib import Path

import pytest

from tests.helpers.runs import RunProcess, processes_of, running, step_records, write_run
from tests.helpers.shared_memory import shared_memory

STEPS = 60
TRAIN = f"""
  parallel: {{dp: 2, pp: 2}}
  steps: {STEPS}
  eval: {{every: 1000, max_batches: 2}}
  checkpoint: {{every: 5}}
"""


def uninterrupted(folder: Path) -> dict[int, dict[str, float]]:
    """The same run on one node with no losses: mesh (1, 1), no agents killed."""
    folder.mkdir()
    file = write_run(folder, nodes=1, slots=1, train=TRAIN.replace("dp: 2, pp: 2", "dp: 1, pp: 1"))
    with running("train", file) as run:
        assert run.wait() == 0, run.output[-6000:]
        return step_records(run.folder)


def kill_and_measure(run: RunProcess, node_id: str) -> float:
    """Kill a node that holds ranks; returns the seconds until the next step of a new attempt."""
    recoveries = len(run.events("recovered"))
    killed = run.kill_node(node_id)
    recovered = run.until_event("recovered", count=recoveries + 1, deadline_s=90)
    return float(recovered["monotonic_s"]) - killed


def check_against(run: RunProcess, reference: dict[int, dict[str, float]]) -> None:
    """Every step once, with the rows and (within float noise) the loss of the run that lost nothing."""
    steps = step_records(run.folder)
    assert sorted(steps) == sorted(reference)
    assert [steps[step]["sample_hash"] for step in sorted(steps)] == [
        reference[step]["sample_hash"] for step in sorted(steps)
    ]
    for step, record in steps.items():
        assert record["loss"] == pytest.approx(reference[step]["loss"], rel=1e-2), step


@pytest.mark.timeout(400)
def test_three_killed_nodes_lose_no_row_and_leave_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0's node, a data worker's node, and a random one; the last loss shrinks the mesh to one pipeline."""
    draw = random.Random(20)
    marker, before = uuid.uuid4().hex, shared_memory()
    reference = uninterrupted(tmp_path / "reference")
    file = write_run(tmp_path, nodes=4, slots=2, train=TRAIN)
    with running("train", file, env={"STORMJIB_TEST_MARKER": marker}) as run:
        seconds = []
        run.until_step(draw.randint(6, 14))
        seconds.append(kill_and_measure(run, run.node_of_rank(0)))
        run.until_step(draw.randint(22, 30))
        seconds.append(kill_and_measure(run, data_node(run)))
        run.until_step(draw.randint(38, 46))
        seconds.append(kill_and_measure(run, run.node_of_rank(draw.randint(0, 3))))
        assert run.wait() == 0, run.output[-6000:]
        started = run.events("run_started")
        assert [event["pid"] for event in started] == [run.process.pid], "the controller was restarted"
        meshes = [(event["dp"], event["pp"]) for event in run.events("attempt_started")]
        assert meshes == [(2, 2), (2, 2), (2, 2), (1, 2)]
        assert len({event["node_id"] for event in run.events("node_lost")}) == 3
        check_against(run, reference)
        assert "(raylet)" not in run.output, "a lost node is told in our words"
    with capsys.disabled():
        print("\nseconds from kill to next step:", [round(item, 2) for item in seconds])  # noqa: T201
    assert processes_of(marker) == []
    assert shared_memory() <= before


def data_node(run: RunProcess) -> str:
    """A node that holds both a data worker and a rank."""

    def both() -> list[str]:
        lost = {event["node_id"] for event in run.events("node_lost")}
        workers = {worker["node_id"] for event in run.events("data_service_ready") for worker in event["workers"]}
        ranks = {rank["node_id"] for rank in run.events("attempt_started")[-1]["ranks"]}
        return sorted((workers & ranks) - lost)

    found: list[str] = run.until(both, "a node with a data worker and a rank")
    return found[0]


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", range(7))
def test_twenty_kills_at_seeded_random_steps(tmp_path: Path, seed: int) -> None:
    """Seven runs of three kills: twenty-one nodes, chosen and timed by the seed."""
    draw = random.Random(seed)
    reference = uninterrupted(tmp_path / "reference")
    file = write_run(tmp_path, nodes=4, slots=2, train=TRAIN)
    with running("train", file) as run:
        for begin in (6, 22, 38):
            run.until_step(begin + draw.randint(0, 8))
            seconds = kill_and_measure(run, run.node_of_rank(draw.choice((0, 0, 1, 2, 3)) if begin < 38 else 0))
            print(f"seed {seed}: {seconds:.2f} s from kill to next step")  # noqa: T201
        assert run.wait() == 0, run.output[-6000:]
        check_against(run, reference)
