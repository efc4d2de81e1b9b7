"""The chunked loss against the plain one, and what it holds in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.layers import Projection
from trainer.losses import IGNORED, default_chunk_tokens, projected_cross_entropy

ROWS, TOKENS, WIDTH, VOCABULARY = 3, 17, 24, 157


def _parts(dtype: torch.dtype = torch.float32, bias: bool = False) -> tuple[Projection, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(ROWS, TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    shift = torch.randn(VOCABULARY, generator=generator).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    labels[0, :9] = IGNORED
    labels[2] = IGNORED
    return Projection(hidden, weight, shift), labels, torch.tensor([0.01, 0.02, 0.0])


def _plain(projection: Projection, labels: Tensor, weights: Tensor) -> Tensor:
    logits = projection.logits().float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return (losses.view(labels.shape).sum(dim=1) * weights).sum()


def _gradients(loss: Tensor, projection: Projection) -> list[Tensor]:
    leaves = [one for one in (projection.normed_BTD, projection.weight_VD, projection.bias_V) if one is not None]
    return list(torch.autograd.grad(loss * 3.0, leaves))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 16, 51, 1000])
def test_loss_and_gradients_are_those_of_full_logits(chunk: int, bias: bool) -> None:
    projection, labels, weights = _parts(bias=bias)
    expected = _plain(projection, labels, weights)
    found = projected_cross_entropy(projection, labels, weights, chunk)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-6)
    for one, two in zip(_gradients(found, projection), _gradients(expected, projection), strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert torch.allclose(projected_cross_entropy(projection, labels, weights, chunk), expected, rtol=1e-6)


def test_gradients_are_given_once() -> None:
    projection, labels, weights = _parts()
    loss = projected_cross_entropy(projection, labels, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backwards before"):
        loss.backward()


def test_parts_in_fp64_get_gradients_in_fp64() -> None:
    projection, labels, weights = _parts(torch.float64, bias=True)
    assert projection.bias_V is not None
    labels, hidden = labels[1:, :3], projection.normed_BTD[1:, :3, :5].detach().requires_grad_()
    weight = projection.weight_VD[:, :5].detach().requires_grad_()
    loss = projected_cross_entropy(Projection(hidden, weight, projection.bias_V), labels, weights[1:], 2)
    found = torch.autograd.grad(loss, (hidden, weight, projection.bias_V))
    expected = torch.autograd.grad(
        _plain(Projection(hidden, weight, projection.bias_V), labels, weights[1:]), (hidden, weight, projection.bias_V)
    )
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == torch.float64
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-8)


def test_rows_that_do_not_count_give_zeros() -> None:
    projection, labels, _ = _parts()
    loss = projected_cross_entropy(projection, torch.full_like(labels, IGNORED), torch.zeros(ROWS), 8)
    assert float(loss.detach()) == 0.0
    assert all(torch.equal(one, torch.zeros_like(one)) for one in _gradients(loss, projection))


def test_the_matrix_of_bf16_weights_has_its_gradient_summed_in_fp32() -> None:
    projection, labels, weights = _parts(torch.bfloat16)
    exact = Projection(
        projection.normed_BTD.detach().float().requires_grad_(), projection.weight_VD.detach().float().requires_grad_()
    )
    expected = _gradients(_plain(exact, labels, weights), exact)
    one_by_one = _gradients(projected_cross_entropy(projection, labels, weights, 1), projection)
    at_once = _gradients(projected_cross_entropy(projection, labels, weights, 1000), projection)
    for found in (one_by_one, at_once):
        for one, two in zip(found, expected, strict=True):
            assert one.dtype == torch.bfloat16
            assert (one.float() - two).abs().max() < 0.02 * two.abs().max()
    # 51 roundings of a sum in bf16 would leave more than this
    assert (one_by_one[1].float() - at_once[1].float()).abs().max() < 0.01 * expected[1].abs().max()


def test_tiny_weights_do_not_vanish_in_fp16() -> None:
    projection, labels, weights = _parts(torch.float16)
    small = _gradients(projected_cross_entropy(projection, labels, weights * 1e-4, 8) * 2.0**16, projection)
    usual = _gradients(projected_cross_entropy(projection, labels, weights, 8), projection)
    for one, two in zip(small, usual, strict=True):
        expected = two.float() * 1e-4 * 2.0**16
        assert (one.float() - expected).abs().max() < 0.01 * expected.abs().max()


def test_a_frozen_matrix_gets_no_gradient() -> None:
    projection, labels, weights = _parts()
    frozen = Projection(projection.normed_BTD, projection.weight_VD.detach())
    loss = projected_cross_entropy(frozen, labels, weights, 8)
    (found,) = torch.autograd.grad(loss, [projection.normed_BTD])
    (expected,) = torch.autograd.grad(_plain(frozen, labels, weights), [projection.normed_BTD])
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


class _Largest(TorchDispatchMode):
    """Notes the most elements that any result of an operator has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [one.numel() for one in tree_leaves(out) if isinstance(one, Tensor)]
        self.elements = max([self.elements, *found])
        return out


def test_no_tensor_of_forward_or_backward_is_larger_than_a_chunk() -> None:
    rows, tokens, width, vocabulary, chunk = 4, 64, 8, 2000, 16
    projection = Projection(
        torch.randn(rows, tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    )
    labels, weights = torch.randint(vocabulary, (rows, tokens)), torch.ones(rows)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with _Largest() as chunked, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        projected_cross_entropy(projection, labels, weights, chunk).backward()
    assert chunked.elements <= chunk * vocabulary
    assert max(kept) <= vocabulary * width  # the gradient of the matrix; no logits at all
    with _Largest() as plain:
        _plain(projection, labels, weights).backward()
    assert plain.elements == rows * tokens * vocabulary


def test_default_chunks_suit_the_device() -> None:
    assert default_chunk_tokens(50_000, torch.device("cpu")) == 64
    assert default_chunk_tokens(1000, torch.device("cpu")) == 4160
    assert default_chunk_tokens(50_000, torch.device("cuda")) == 2624
