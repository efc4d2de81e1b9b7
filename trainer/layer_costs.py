"""What the layers of a model cost, measured where they will run, to cut a pipeline by.

One block, the embedding and the head with its loss are built alone, and a forward and backward pass of one micro-batch
is timed. Costs are rounded to eighths of a block, so that noise seldom moves a cut. Decides no cut (`trainer.stages`).
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist

from trainer.attention import CausalContext
from trainer.layers import Block, Embedding, Head, Projection, run_block
from trainer.losses import projected_cross_entropy
from trainer.model import TransformerConfig
from trainer.stages import LayerCosts

__all__ = ["agree_on_costs", "measure_costs"]

_REPEATS = 3
_LEAST_S = 0.2
"""Short passes are repeated for so long, so that the least time is one that nothing disturbed."""
_STEPS_PER_BLOCK = 8


def agree_on_costs(
    config: TransformerConfig, rows: int, seq_len: int, device: torch.device, dtype: torch.dtype, *, recompute: bool
) -> LayerCosts:
    """Costs as rank 0 measures them, on every rank. A collective: every rank calls it.

    Args:
        config: shape of the model.
        rows: of a micro-batch.
        seq_len: tokens of a row.
        device: of this rank.
        dtype: of the weights that compute.
        recompute: whether blocks are computed again in the backward pass.
    """
    told: list[LayerCosts | None] = [None]
    if dist.get_rank() == 0:
        told = [measure_costs(config, rows, seq_len, device, dtype, recompute=recompute)]
    dist.broadcast_object_list(told, src=0)
    (found,) = told
    assert found is not None
    return found


def measure_costs(
    config: TransformerConfig, rows: int, seq_len: int, device: torch.device, dtype: torch.dtype, *, recompute: bool
) -> LayerCosts:
    """Time of a forward and backward pass, in blocks; arguments as for `agree_on_costs`."""
    tokens_BT = torch.arange(rows * seq_len, device=device).remainder(config.vocab_size).view(rows, seq_len)
    positions_BT = torch.arange(seq_len, device=device).expand(rows, seq_len).contiguous()

    def hidden_BTD() -> Tensor:
        return torch.ones(rows, seq_len, config.d_model, device=device, dtype=dtype, requires_grad=True)

    block, embedding, head = Block(config, 0), Embedding(config), Head(config)
    for module in (block, embedding, head):
        _fill(module, device, dtype)

    def inner() -> Tensor:
        return run_block(block, hidden_BTD(), positions_BT, CausalContext(), recompute).float().sum()

    def last() -> Tensor:
        output = head(hidden_BTD(), embedding.weight if config.tie_embeddings else None, None)
        if isinstance(output, Projection):
            return projected_cross_entropy(output, tokens_BT, torch.ones(rows, device=device))
        found: Tensor = output.float().sum()
        return found

    block_s = _seconds(inner, device)
    embedding_s = _seconds(lambda: embedding(tokens_BT, positions_BT).float().sum(), device)
    head_s = _seconds(last, device)
    return LayerCosts(embedding=_in_blocks(embedding_s, block_s), block=1.0, head=_in_blocks(head_s, block_s))


def _in_blocks(seconds: float, block_s: float) -> float:
    return round(_STEPS_PER_BLOCK * seconds / block_s) / _STEPS_PER_BLOCK


def _fill(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give the module small weights: times of denormal numbers and NaNs are no guide."""
    module.to(device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1e-2)


def _seconds(forward: Callable[[], Tensor], device: torch.device) -> float:
    """Least time of several passes after one that does not count."""
    times: list[float] = []
    while len(times) <= _REPEATS or sum(times[1:]) < _LEAST_S:
        _settle(device)
        began = time.perf_counter()
        forward().backward()  # type: ignore[no-untyped-call]
        _settle(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
