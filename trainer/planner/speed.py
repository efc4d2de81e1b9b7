"""How fast a row of the plan may be: an estimate from peaks and shapes, said as one. Pure arithmetic.

A step is the pipeline's (micro-batches + stages - 1) turns of its dearest stage, and behind it the transfers of
gradients and weights, which DeepSpeed is told not to overlap (`trainer.deepspeed_config`).
"""

from dataclasses import dataclass

from trainer.architecture import TransformerConfig
from trainer.planner.memory import Setting, StageShape
from trainer.throughput import flops_per_token
from trainer.topology import BatchLayout

__all__ = ["DeviceSpeed", "StepEstimate", "estimate_step", "traffic_bytes"]

_FP32 = 4
_RECOMPUTED = 4 / 3
"""A forward pass more: of 1 + 2 parts of work, 1 again (Chen et al. 2016)."""
_HALF_FILLED_TOKENS = {True: 512, False: 64}
"""Tokens of a micro-batch that reach half of the efficiency, on a GPU or a CPU: shorter products do not fill it."""


@dataclass(frozen=True)
class DeviceSpeed:
    """What one rank's device does."""

    peak_flops: float
    """FLOP/s at most."""
    efficiency: float
    """Share of the peak that training reaches; stated or measured."""
    link_bytes_s: float
    """Bytes per second to other ranks, one way."""
    is_gpu: bool
    source: str
    """Where the figures are from."""


@dataclass(frozen=True)
class StepEstimate:
    """One optimizer step, in seconds."""

    compute_s: float
    """Work of the dearest stage."""
    bubble_s: float
    """Waiting for other stages."""
    transfer_s: float
    """Gradients, weights and activations on their way."""
    tokens_per_s: float
    """Of the run's rows, masked ones not counted."""

    @property
    def step_s(self) -> float:
        """All of it."""
        return self.compute_s + self.bubble_s + self.transfer_s


def traffic_bytes(
    config: TransformerConfig,
    setting: Setting,
    layout: BatchLayout,
    shape: StageShape,
    seq_len: int,
    element_bytes: int,
) -> dict[str, int]:
    """Bytes that a rank sends in one step: over dp, and to the next stage.

    ZeRO 0 to 2 reduce gradients by a ring, 2 (dp - 1) / dp of them in fp32 (ZeRO 1 and 2 too: DeepSpeed all-reduces
    what several ranks share); 1 and 2 then gather weights, (dp - 1) / dp. ZeRO 3 gathers them in each forward and
    backward pass, and scatters gradients after each (Rajbhandari et al. 2020, section 7).
    """
    part = (setting.dp - 1) / setting.dp
    weights, gradients = shape.parameters * element_bytes, shape.parameters * _FP32
    if setting.zero_stage == 3:
        data = part * layout.num_micro_batches * (2 * weights + gradients)
    elif setting.zero_stage == 2:
        data = part * (2 * gradients * layout.num_micro_batches + weights)
    else:
        data = part * (2 * gradients + (weights if setting.zero_stage else 0))
    hidden = layout.micro_batch * seq_len * config.d_model * element_bytes
    stages = 2 * hidden * layout.num_micro_batches if setting.pp > 1 else 0
    return {"data_parallel": round(data), "pipeline": stages}


def estimate_step(
    config: TransformerConfig,
    setting: Setting,
    layout: BatchLayout,
    shapes: list[StageShape],
    seq_len: int,
    element_bytes: int,
    device: DeviceSpeed,
) -> StepEstimate:
    """Estimate one step on a mesh.

    Args:
        config: shape of the model.
        setting: the row of the plan.
        layout: rows of a rank.
        shapes: of all stages.
        seq_len: tokens of a row.
        element_bytes: of the weights that compute.
        device: what computes.
    """
    tokens = layout.micro_batch * seq_len
    head = 6.0 * config.vocab_size * config.d_model if config.num_labels == 0 else 0.0
    whole = flops_per_token(config, seq_len)
    block = (whole - head) / config.num_layers
    again = _RECOMPUTED if setting.recompute else 1.0
    dearest = max(one.blocks * block * again + (head if one.has_output else 0.0) for one in shapes)
    filled = tokens / (tokens + _HALF_FILLED_TOKENS[device.is_gpu])
    turn_s = tokens * dearest / (device.peak_flops * device.efficiency * filled)
    traffic = max(sum(traffic_bytes(config, setting, layout, one, seq_len, element_bytes).values()) for one in shapes)
    compute_s = turn_s * layout.num_micro_batches
    bubble_s = turn_s * (setting.pp - 1)
    offload_s = 0.0
    if setting.offload_optimizer:  # gradients out, weights in, over the host's link
        share = max(one.parameters for one in shapes) / setting.dp
        offload_s += share * (_FP32 + element_bytes) / min(device.link_bytes_s, 32e9)
    if setting.offload_parameters:
        share = max(one.parameters for one in shapes) / setting.dp
        offload_s += 2 * layout.num_micro_batches * share * element_bytes / min(device.link_bytes_s, 32e9)
    transfer_s = traffic / device.link_bytes_s + offload_s
    step_s = compute_s + bubble_s + transfer_s
    return StepEstimate(compute_s, bubble_s, transfer_s, layout.global_batch * seq_len / step_s)
