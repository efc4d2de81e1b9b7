"""Rotary positions (Su et al. 2021), plain and stretched.

Owns the frequencies of each kind of `RopeScaling`, cosines and sines of positions, and the rotation in Hugging Face's
layout (rotate-half), so that export is a renaming. Knows nothing of attention.

Shape letters: B rows, T tokens, N heads, H head width.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from trainer.architecture import RopeScaling, TransformerConfig

__all__ = ["rotary_waves", "rotate"]


def rotary_waves(config: TransformerConfig, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of Su et al. 2021, equation 15, each repeated for both halves: [B, T, 1, H] in `dtype`.

    Computed anew from the positions: a table of all of them would be large (134 MB for Llama 3.1) and no faster.
    """
    frequencies_H, scale = _frequencies(
        config.head_dim, config.rope_theta, config.max_positions, config.rope_scaling, positions_BT.device
    )
    angles_BT1H = positions_BT[:, :, None, None] * frequencies_H
    cos_BT1H, sin_BT1H = angles_BT1H.cos(), angles_BT1H.sin()
    if scale != 1.0:
        cos_BT1H, sin_BT1H = cos_BT1H * scale, sin_BT1H * scale
    return cos_BT1H.to(dtype), sin_BT1H.to(dtype)


def rotate(x_BTNH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor) -> Tensor:
    """Rotate pairs (h, h + H/2), Hugging Face's layout of rotary positions.

    Keeps no copy of `x_BTNH`: the gradient is the one that came, rotated back. Angles get no gradient.
    """
    rotated: Tensor = _Rotation.apply(x_BTNH, cos_BT1H, sin_BT1H)  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    """One pass over the tensor and one over each half, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x_BTNH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BT1H, sin_BT1H)
        return _turn(x_BTNH, cos_BT1H, sin_BT1H, 1)

    @staticmethod
    def backward(ctx: Any, grad_BTNH: Tensor) -> tuple[Tensor, None, None]:
        cos_BT1H, sin_BT1H = ctx.saved_tensors
        return _turn(grad_BTNH, cos_BT1H, sin_BT1H, -1), None, None


def _turn(x_BTNH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor, direction: int) -> Tensor:
    half = x_BTNH.shape[-1] // 2
    out_BTNH = x_BTNH * cos_BT1H
    out_BTNH[..., :half].addcmul_(x_BTNH[..., half:], sin_BT1H[..., half:], value=-direction)
    out_BTNH[..., half:].addcmul_(x_BTNH[..., :half], sin_BT1H[..., :half], value=direction)
    return out_BTNH


@functools.lru_cache(maxsize=8)
def _frequencies(
    head_dim: int, theta: float, num_positions: int, scaling: RopeScaling | None, device: torch.device
) -> tuple[Tensor, float]:
    """Radians a position of each dimension, fp32 [H], and what multiplies cosines and sines."""
    with torch.inference_mode(False), torch.no_grad():
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
        frequencies = 1.0 / theta**exponents
        scale = 1.0
        if scaling is not None:
            frequencies, scale = _scaled(frequencies, scaling, theta, num_positions)
        return torch.cat((frequencies, frequencies)), scale


def _scaled(frequencies: Tensor, scaling: RopeScaling, theta: float, num_positions: int) -> tuple[Tensor, float]:
    """The stretched frequencies, and what multiplies cosines and sines."""
    original = scaling.original_max_positions or num_positions
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling, original), 1.0
    if scaling.kind == "yarn":
        return _yarn(frequencies, scaling, original, theta), _yarn_scale(scaling)
    return frequencies, 1.0


def _llama3(frequencies: Tensor, scaling: RopeScaling, original: int) -> Tensor:
    """Llama 3.1's rule: long wavelengths are divided, short ones stay, those between are blended."""
    assert scaling.low_freq_factor is not None
    assert scaling.high_freq_factor is not None
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return frequencies * (blend + (1 - blend) / scaling.factor)


def _yarn(frequencies: Tensor, scaling: RopeScaling, original: int, theta: float) -> Tensor:
    """Peng et al. 2023, section 3.2: "NTK by parts", a ramp over the dimensions between two numbers of rotations."""
    width = 2 * len(frequencies)

    def dimension(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast or 32.0), dimension(scaling.beta_slow or 1.0)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, width - 1.0)
    places = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    ramp = ((places - low) / (high - low or 0.001)).clamp(0.0, 1.0)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _yarn_scale(scaling: RopeScaling) -> float:
    """Peng et al. 2023, equation 22, as a factor of both queries and keys."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def magnitude(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)
