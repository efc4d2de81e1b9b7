import random

import pytest

from serve.engine.kv_blocks import BlockPool
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import SamplingParams, Sequence, SequenceState
from serve.errors import OverloadedError, PromptTooLongError


def sequence(name: str, prompt: int, max_tokens: int = 8) -> Sequence:
    return Sequence(name, 0, tuple(range(1, prompt + 1)), SamplingParams(max_tokens=max_tokens))


def run_pass(scheduler: Scheduler) -> list[Sequence]:
    """One pass with token 1 for every sequence that samples; returns those sequences."""
    chunks = scheduler.schedule()
    sampled = [chunk.sequence for chunk in chunks if chunk.samples]
    scheduler.advance(chunks)
    for each in sampled:
        each.append(1)
        if len(each.output) == each.params.max_tokens:
            scheduler.finish(each)
    return sampled


def test_new_sequence_joins_running_ones_at_the_next_pass() -> None:
    scheduler = Scheduler(BlockPool(64, 4), max_num_seqs=9, max_queue=4, budget_tokens=64)
    eight = [sequence(f"r{i}", 5, max_tokens=10) for i in range(8)]
    scheduler.add(eight)
    run_pass(scheduler)
    run_pass(scheduler)
    ninth = sequence("ninth", 6)
    scheduler.add([ninth])
    assert ninth in run_pass(scheduler)
    assert all(s.state is SequenceState.RUNNING for s in eight)
    assert [len(s.output) for s in eight] == [3] * 8


def test_long_prompt_enters_in_chunks_and_does_not_stall_decoding() -> None:
    scheduler = Scheduler(BlockPool(64, 4), max_num_seqs=2, max_queue=4, budget_tokens=16)
    short, long = sequence("short", 3, max_tokens=50), sequence("long", 40)
    scheduler.add([short])
    run_pass(scheduler)
    scheduler.add([long])
    passes = 0
    while not long.output:
        sampled = run_pass(scheduler)
        passes += 1
        assert short in sampled
    assert passes == 3
    assert len(long.blocks) == 10


def test_first_come_first_served_when_the_cache_is_full() -> None:
    scheduler = Scheduler(BlockPool(4, 4), max_num_seqs=8, max_queue=8, budget_tokens=64)
    first, large, small = sequence("first", 8, 4), sequence("large", 8, 6), sequence("small", 1, 1)
    scheduler.add([first])
    scheduler.add([large])
    scheduler.add([small])
    run_pass(scheduler)
    assert list(scheduler.waiting) == [large, small]
    while not first.state.terminal:
        run_pass(scheduler)
    run_pass(scheduler)
    assert large.output


def test_refuses_what_can_never_fit_and_what_the_queue_cannot_hold() -> None:
    scheduler = Scheduler(BlockPool(4, 4), max_num_seqs=1, max_queue=2, budget_tokens=64)
    with pytest.raises(PromptTooLongError, match="kv_cache_tokens"):
        scheduler.add([sequence("big", 10, 8)])
    for number in range(3):
        scheduler.add([sequence(f"r{number}", 2, 2)])
    with pytest.raises(OverloadedError) as refused:
        scheduler.add([sequence("late", 2, 2)])
    assert refused.value.retry_after_s > 0
    assert len(scheduler.waiting) == 3


def test_one_request_is_queued_whole_or_not_at_all() -> None:
    scheduler = Scheduler(BlockPool(64, 4), max_num_seqs=1, max_queue=2, budget_tokens=64)
    with pytest.raises(OverloadedError):
        scheduler.add([sequence(f"r{i}", 2, 2) for i in range(4)])
    assert not scheduler.has_work


@pytest.mark.parametrize("seed", range(6))
def test_random_traces_keep_the_books(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(24, 4)
    scheduler = Scheduler(pool, max_num_seqs=5, max_queue=1000, budget_tokens=12)
    everyone: list[Sequence] = []
    for _ in range(400):
        if len(everyone) < 60 and rng.random() < 0.4:
            everyone.append(sequence(f"r{len(everyone)}", rng.randint(1, 40), rng.randint(1, 20)))
            scheduler.add([everyone[-1]])
        if everyone and rng.random() < 0.05:
            scheduler.finish(rng.choice(everyone))
        if scheduler.has_work:
            run_pass(scheduler)
        held = [block for s in everyone for block in s.blocks]
        assert len(held) == len(set(held)) == pool.num_used
        assert len(scheduler.running) <= 5
        assert pool.num_used <= pool.num_promised <= pool.num_blocks
        for s in everyone:
            assert not (s.state.terminal and s.blocks)
            assert len(s.blocks) == pool.blocks_for(s.num_cached) if not s.state.terminal else True
    while scheduler.has_work:
        run_pass(scheduler)
    assert pool.num_used == pool.num_promised == 0
    assert scheduler.backlog_tokens == 0
    assert all(s.state.terminal for s in everyone)
