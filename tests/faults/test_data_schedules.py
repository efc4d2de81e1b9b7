"""Random schedules of everything that may happen to a run's data: no batch changes, no row is lost or repeated.

A schedule kills and starts data workers, changes the number of ranks, changes weights, skips batches, and goes back to
an older checkpoint, while a global batch after the other is consumed. What was consumed is then compared with rows cut
from the documents, and counted.
"""

import contextlib
import random
import threading
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from data_service.client import DataClient
from data_service.cursor import Cursor
from data_service.order import rows_of_batch
from data_service.plan import OrderSpec, Plan, part_of_rows
from tests.helpers.data_fleet import Fleet, fleet, stopped
from tests.helpers.data_runs import hash_of
from tests.helpers.written_datasets import WrittenDataset, WrittenPart, random_documents, write_dataset
from trainer.topology import BatchLayout

NUM_EPOCHS = 3
MAX_WORKERS = 5
SIZES = (4, 3, 6, 1)
SOURCES = ("a", "b", "c")
GLOBAL_BATCH = 10


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    parts = [
        WrittenPart("a", random_documents(1, 5000)),
        WrittenPart("b", random_documents(2, 2100)),
        WrittenPart("c", random_documents(3, 700)),
        WrittenPart("a", random_documents(4, 1300), generation=1),
    ]
    return write_dataset(tmp_path_factory.mktemp("data") / "d", {"train": parts}, shard_tokens=1024)


@pytest.fixture(scope="module")
def service(dataset):
    with fleet(dataset, 2) as running:
        yield running


@dataclass
class Run:
    """A run that consumes global batches, as a trainer would, and the schedule that happens to it."""

    dataset: WrittenDataset
    fleet: Fleet
    draw: random.Random
    order: OrderSpec
    size: int = 4
    hashes: list[str] = field(default_factory=list)
    """Of each step that was consumed."""
    rows: list[list[int]] = field(default_factory=list)
    """Row ids of each step, in global order."""
    checkpoint: str = ""

    def __post_init__(self) -> None:
        self.starting: threading.Thread | None = None
        self.first_free_weight = self.first_free_skip = 0

    def plan(self) -> Plan:
        client = DataClient(self.fleet.access(self.order))
        plan = client.plan("train")
        client.close()
        return plan

    def attempt(self, stop: int) -> Plan:
        """Consume steps from the checkpoint on until something happens that ends the ranks."""
        cursor = Cursor.from_json(self.checkpoint) if self.checkpoint else None
        first = cursor.consumed_batches if cursor else 0
        del self.hashes[first:], self.rows[first:]
        layout = BatchLayout(self.order.global_batch, self.size, 1)
        access = self.fleet.access(self.order, run_ahead=self.draw.choice((1, 2, 4, 16)), read_stall_s=2.0)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(contextlib.closing(DataClient(access))) for _ in range(self.size)]
            plan = clients[0].plan("train")
            if cursor:
                cursor.check(plan)
            streams = [client.stream("train", first, stop, layout.slots(rank)) for rank, client in enumerate(clients)]
            last = min(stop, first + self.draw.randint(3, 25))
            for step in range(first, last):
                slices = [next(stream) for stream in streams]
                assert [one.index for one in slices] == [step] * self.size
                self.hashes.append(hash_of(slices))
                self.rows.append([row for one in slices for row in one.row_id[one.rows].tolist()])
                if self.draw.random() < 0.1:
                    self.checkpoint = Cursor.of(plan, step + 1).to_json()
                    assert len(self.checkpoint) < 1000
                if self.draw.random() < 0.08:
                    self.disturb()
            if self.draw.random() < 0.7 or last == stop:
                self.checkpoint = Cursor.of(plan, last).to_json()
        return plan

    def disturb(self) -> None:
        """A worker dies, comes or stands still."""
        self.settle()
        workers = self.fleet.workers
        kind = self.draw.choice(("kill", "start", "stand"))
        if kind == "kill" and len(workers) > 1:
            self.fleet.kill_worker(self.draw.choice(workers))
        elif kind == "start" and len(workers) < MAX_WORKERS:
            self.starting = threading.Thread(target=self.fleet.start_worker)
            self.starting.start()
        elif kind == "stand" and len(workers) > 1:
            still = self.draw.choice(workers)
            seconds = self.draw.uniform(0.1, 0.6)

            def stand() -> None:
                with stopped(still):
                    threading.Event().wait(seconds)

            self.starting = threading.Thread(target=stand)
            self.starting.start()

    def settle(self) -> None:
        if self.starting is not None:
            self.starting.join()
            self.starting = None

    def change_order(self, plan: Plan) -> None:
        """New weights, or a skipped range, behind what the checkpoint has consumed."""
        consumed = Cursor.from_json(self.checkpoint).consumed_batches if self.checkpoint else 0
        free = plan.batch_at(consumed - 1) + 1 if consumed else 1
        if self.draw.random() < 0.5:
            first = max(free, self.first_free_weight) + self.draw.randint(0, 8)
            weights = [self.draw.choice((0.0, 0.5, 1.0, 3.0)) for _ in SOURCES]
            weights[self.draw.randrange(3)] = 1.0
            given = tuple(zip(SOURCES, weights, strict=True))
            self.order = replace(self.order, weights=(*self.order.weights, (first, given)))
            self.first_free_weight = first + 1
        else:
            first = max(free, self.first_free_skip) + self.draw.randint(0, 8)
            end = first + self.draw.randint(1, 5)
            self.order = replace(self.order, skip=(*self.order.skip, (first, end)))
            self.first_free_skip = end + self.draw.randint(0, 1)


def run_schedule(dataset, service, seed, *, changes):
    """A run of three epochs under a schedule; returns it with its last plan."""
    draw = random.Random(seed)
    order = OrderSpec(seed=seed, seq_len=32, global_batch=GLOBAL_BATCH, window_shards=2)
    run = Run(dataset, service, draw, order)
    plan = run.plan()
    num_steps = -(-NUM_EPOCHS * plan.num_rows // GLOBAL_BATCH)
    attempts = 0
    while len(run.hashes) < num_steps or not run.checkpoint.endswith(f" {num_steps}}}"):
        run.size = SIZES[attempts % len(SIZES)] if attempts < 2 * len(SIZES) else draw.choice(SIZES)
        attempts += 1
        plan = run.attempt(num_steps)
        if changes and draw.random() < 0.4:
            run.change_order(plan)
    run.settle()
    assert attempts >= len(SIZES)
    return run, run.plan()


def check_rows(dataset, run, plan):
    """Each batch is what the last plan says, and of every part each row came as often as any other."""
    assert run.hashes == [dataset.hash_of_step(plan, step) for step in range(len(run.hashes))]
    unskipped = replace(plan, skip=())
    batches = {plan.batch_at(step): rows for step, rows in enumerate(run.rows)}
    skipped = [one for one in range(max(batches)) if one not in batches]
    assert all(any(first <= one < end for first, end in plan.skip) for one in skipped)
    counts: Counter[int] = Counter()
    for rows in batches.values():
        counts.update(rows)
    for one in skipped:
        counts.update(rows_of_batch(unskipped, one).tolist())
    for number, part in enumerate(plan.parts):
        times = [counts[number << 48 | row] for row in range(part.num_rows)]
        assert max(times) - min(times) <= 1, (part, sorted(Counter(times).items()))
    assert {part_of_rows(row)[0] for row in counts} <= set(range(len(plan.parts)))


def check_three_epochs(run, plan):
    """The first three epochs, the tail of the last included, hold every row exactly three times."""
    consumed = [row for rows in run.rows for row in rows][: NUM_EPOCHS * plan.num_rows]
    every = {number << 48 | row for number, part in enumerate(plan.parts) for row in range(part.num_rows)}
    assert Counter(consumed) == dict.fromkeys(every, NUM_EPOCHS)


def check_seed(dataset, service, seed):
    changes = seed % 2 == 1
    run, plan = run_schedule(dataset, service, seed, changes=changes)
    check_rows(dataset, run, plan)
    if not changes:
        check_three_epochs(run, plan)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.timeout(180)
def test_no_schedule_changes_a_batch_or_loses_a_row(dataset, service, seed):
    check_seed(dataset, service, seed)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_no_schedule_of_many_changes_a_batch_or_loses_a_row(dataset, service):
    for seed in range(6, 150):
        check_seed(dataset, service, seed)


def test_the_checks_notice_a_lost_a_repeated_and_a_changed_row(dataset, service):
    run, plan = run_schedule(dataset, service, 6, changes=False)
    check_three_epochs(run, plan)
    lost = run.rows[7][3]
    run.rows[7][3] = run.rows[7][4]
    with pytest.raises(AssertionError):
        check_three_epochs(run, plan)
    run.rows[7][3] = lost
    run.hashes[7] = "0" * 16
    with pytest.raises(AssertionError):
        check_rows(dataset, run, plan)
