import collections
import math

import torch

from serve.engine.sampler import sample, token_logprobs
from serve.engine.sequence import SamplingParams, Sequence


def one(**settings: object) -> Sequence:
    return Sequence("r", 0, (1,), SamplingParams(**settings))  # type: ignore[arg-type]


def draw(logits: torch.Tensor, sequence: Sequence, times: int) -> collections.Counter[int]:
    return collections.Counter(sample(logits[None], [sequence])[0].token for _ in range(times))


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits_SV = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert [s.token for s in sample(logits_SV, [one(temperature=0), one(temperature=0)])] == [1, 0]


def test_frequencies_follow_the_softmax() -> None:
    logits_V = torch.tensor([1.0, 0.0, -1.0])
    counts = draw(logits_V, one(temperature=0.7, seed=1), 4000)
    expected = torch.softmax(logits_V / 0.7, -1)
    for token in range(3):
        share = float(expected[token])
        assert abs(counts[token] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits_V = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2]))
    assert set(draw(logits_V, one(top_k=2, seed=1), 300)) == {1, 2}
    assert set(draw(logits_V, one(top_p=0.75, seed=1), 300)) == {1, 2, 3}
    assert set(draw(logits_V, one(top_p=0.69, seed=1), 300)) == {1, 2}
    assert set(draw(logits_V, one(top_p=0.0, seed=1), 50)) == {1}


def test_seed_repeats_and_neighbours_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(50, generator=generator) for _ in range(20)]
    noise = torch.randn(50, generator=generator)
    alone = one(seed=11)
    beside = one(seed=11)
    neighbour = one(seed=5, temperature=1.5, top_k=7)
    first = [sample(row[None], [alone])[0].token for row in rows]
    second = [sample(torch.stack([noise, row]), [neighbour, beside])[1].token for row in rows]
    assert first == second
    assert len(set(first)) > 5


def test_completions_of_one_request_differ() -> None:
    rows = torch.zeros(2, 1000)
    pair = [Sequence("r", index, (1,), SamplingParams(seed=4)) for index in range(2)]
    assert len({s.token for s in sample(rows, pair)}) == 2


def test_penalties_and_bias() -> None:
    logits_V = torch.tensor([1.0, 0.9, 0.8])
    greedy = one(temperature=0, presence_penalty=0.05, frequency_penalty=0.1)
    tokens = []
    for _ in range(4):
        tokens.append(sample(logits_V[None], [greedy])[0].token)
        greedy.append(tokens[-1])
    # after each pick the token loses 0.05 once and 0.1 per pick: 1.0 → .85 → .75; 0.9 → .75; 0.8 stays
    assert tokens == [0, 1, 0, 2]
    biased = one(temperature=0, logit_bias=((2, 100.0), (0, -100.0)))
    assert sample(logits_V[None], [biased])[0].token == 2
    assert torch.equal(logits_V, torch.tensor([1.0, 0.9, 0.8]))


def test_logprobs_are_the_models_own() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0])
    chosen = sample(logits_V[None], [one(temperature=0.0, logit_bias=((3, 100.0),), logprobs=2)])[0]
    expected = torch.log_softmax(logits_V, -1)
    assert chosen.token == 3
    assert chosen.logprob is not None
    assert math.isclose(chosen.logprob.logprob, float(expected[3]), rel_tol=1e-6)
    assert [token for token, _ in chosen.logprob.top] == [0, 1]
    assert token_logprobs(logits_V[None], [1], 0)[0].top == ()


def test_logits_that_are_not_finite_are_told() -> None:
    bad = torch.tensor([[0.0, float("nan")], [1.0, 0.0]])
    assert [s.finite for s in sample(bad, [one(temperature=1.0), one(temperature=1.0)])] == [False, True]
