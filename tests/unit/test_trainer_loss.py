"""The loss: on every mesh the plain mean over the valid tokens, masked rows included."""

import numpy as np
import pytest
import torch

from trainer.tasks.causal_lm import IGNORED, token_losses, weighted_loss
from trainer.tasks.causal_lm import make_targets as targets_of
from trainer.tasks.rows import TaskRows
from trainer.topology import BatchLayout

ROWS, TOKENS, VOCAB = 11, 9, 23


def make_targets(tokens: torch.Tensor, valid: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets of rows whose first `valid` labels count."""
    counted = torch.arange(tokens.shape[1] - 1) < valid[:, None]
    return targets_of(TaskRows(tokens, counted, None), weight)


def _reference(logits: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor) -> float:
    """Mean over valid tokens in fp64, without any of the code under test."""
    scores = logits.double().numpy()
    total, count = 0.0, 0
    for row in range(len(tokens)):
        for column in range(int(valid[row])):
            line = scores[row, column]
            shifted = line - line.max()
            total -= shifted[tokens[row, column + 1]] - np.log(np.exp(shifted).sum())
            count += 1
    return total / count


@pytest.mark.parametrize("dp", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", ["auto", 1, 3])
def test_weighted_micro_batches_sum_to_the_plain_mean(dp: int, pp: int, micro_batch: int) -> None:
    generator = torch.Generator().manual_seed(dp * 100 + pp)
    layout = BatchLayout(ROWS, dp, pp, micro_batch)
    logits = 3 * torch.randn(layout.num_slots, TOKENS, VOCAB, generator=generator)
    tokens = torch.randint(VOCAB, (layout.num_slots, TOKENS + 1), generator=generator)
    valid = torch.full((layout.num_slots,), TOKENS)
    valid[ROWS - 1] = 4  # the ragged tail of a split
    valid[2] = 1
    valid[ROWS:] = 0  # slots without a row
    weight = layout.weight(int(valid.sum()))

    over_ranks = []
    for index in range(dp):
        micro_losses = []
        for micro in range(layout.num_micro_batches):
            rows = slice(*layout.micro_slots(index, micro))
            targets = make_targets(tokens[rows], valid[rows], weight)
            micro_losses.append(float(weighted_loss(logits[rows], targets)))
        over_ranks.append(sum(micro_losses) / layout.num_micro_batches)  # what the engine does: / gas, mean over dp
    assert sum(over_ranks) / dp == pytest.approx(_reference(logits[:ROWS], tokens[:ROWS], valid[:ROWS]), rel=1e-5)


def test_gradient_is_that_of_the_plain_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (4, TOKENS + 1), generator=generator)
    valid = torch.tensor([TOKENS, 3, 0, TOKENS])
    weighted = torch.randn(4, TOKENS, VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
    plain = weighted.detach().clone().requires_grad_()
    count = int(valid.sum())
    weighted_loss(weighted, make_targets(tokens, valid, 1 / count)).backward()
    kept = torch.arange(TOKENS) < valid[:, None]
    torch.nn.functional.cross_entropy(plain[kept], tokens[:, 1:][kept]).backward()
    assert torch.allclose(weighted.grad, plain.grad, atol=1e-7)
    assert not weighted.grad[2].any()


def test_masked_micro_batch_is_zero_and_has_zero_gradient() -> None:
    logits = torch.randn(2, TOKENS, VOCAB).requires_grad_()
    tokens = torch.zeros(2, TOKENS + 1, dtype=torch.int64)
    loss = weighted_loss(logits, make_targets(tokens, torch.zeros(2, dtype=torch.int64), 0.5))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_targets() -> None:
    tokens = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4], [0, 0, 0, 0]])
    labels, weights = make_targets(tokens, torch.tensor([3, 1, 0], dtype=torch.int32), 0.25)
    assert labels.tolist() == [[6, 7, 8], [2, IGNORED, IGNORED], [IGNORED] * 3]
    assert weights.tolist() == [0.25, 0.25, 0.0]
    assert weights.dtype == torch.float32
    losses = token_losses(torch.zeros(3, 3, 10, dtype=torch.bfloat16), labels)
    assert losses.dtype == torch.float32
    assert losses.count_nonzero() == 4
