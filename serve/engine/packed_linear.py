"""Matrices laid out once for oneDNN.

On x86 CPUs torch's own fp32 product of a few rows with a weight matrix goes through a library that is 1.3 to 5 times
slower than oneDNN with weights in oneDNN's blocked layout (measured on an AMD CPU with AVX-512, 1 to 64 rows). The two
operators used are those torch's compiler emits; they have no public name, so one probe decides whether they are used
(torch 2.9 to 2.13 have them), and the plain product is the alternative.
"""

import functools
import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model import Linear, Transformer

__all__ = ["PackedLinear", "pack_linears", "packing_works"]

_LOG = logging.getLogger(__name__)
_ROWS_HINT = 8
"""Rows the layout is chosen for; other numbers of rows work too, and were as fast."""


class PackedLinear(nn.Module):
    """`Linear` with its matrix in oneDNN's layout; inference only."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Copy [out_features, in_features] into the blocked layout; the bias stays as it is."""
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last axis."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


@functools.cache
def packing_works(dtype: torch.dtype) -> bool:
    """Whether this torch has the operators and they multiply rightly on this CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    x = torch.randn(1, 3, 32, generator=generator).to(dtype)
    try:
        with torch.inference_mode():
            found = PackedLinear(weight, bias)(x)
    except (AttributeError, NotImplementedError, RuntimeError) as cause:
        _LOG.warning("oneDNN's packed matrices are not usable here (%s); the plain product is slower", cause)
        return False
    return torch.allclose(
        found.float(), F.linear(x.float(), weight.float(), bias.float()), atol=0.05 if dtype.itemsize < 4 else 1e-4
    )


def pack_linears(model: Transformer) -> nn.Module | None:
    """Replace every `Linear` of a CPU model in place; its plain matrices are freed.

    Returns:
        The output matrix, packed, to be applied after `model.head.normed`; None where nothing was packed.
    """
    weight = model.embedding.weight
    if weight.device.type != "cpu" or not packing_works(weight.dtype):
        return None
    with torch.inference_mode():
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is Linear:
                    setattr(module, name, PackedLinear(child.weight, child.bias))
        return PackedLinear(weight if model.head.weight is None else model.head.weight, model.head.bias)
