"""Adapters as modules: a matrix that stays, and two small ones that are trained.

Owns `AdaptedLinear`, how adapters are put into a model or a pipeline stage, and how they are added to the weights in
the end. Which parameters are trained is in `trainer.adapters`.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.adapters import Lora, is_whole
from trainer.layers import Block, Head, Linear

__all__ = ["AdaptedLinear", "attach", "merged"]


class AdaptedLinear(Linear):
    """x W^T + b + scale · (x A^T) B^T; takes over W and b of a `Linear`, both frozen."""

    def __init__(self, base: Linear, lora: Lora) -> None:
        """Allocate A and B, uninitialised, where the matrix is."""
        nn.Module.__init__(self)
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self._scale = lora.scale
        out_features, in_features = base.weight.shape
        self.lora_a = nn.Parameter(base.weight.new_empty(lora.rank, in_features))
        self.lora_b = nn.Parameter(base.weight.new_empty(out_features, lora.rank))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last axis."""
        return super().forward(x) + self._scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def attach(model: nn.Module, lora: Lora) -> None:
    """Put adapters into every block of a model or of a pipeline stage, and freeze the rest but a classifier's head.

    Args:
        model: holds `Block`s anywhere below; weights need not be initialised.
        lora: which matrices.
    """
    model.requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, Head):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(is_whole(f"head.{name}"))
        elif isinstance(module, Block):
            for target in lora.targets:
                holder = module.get_submodule(target.rpartition(".")[0])
                name = target.rpartition(".")[2]
                base = getattr(holder, name)
                assert isinstance(base, Linear), target
                setattr(holder, name, AdaptedLinear(base, lora))


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, lora: Lora) -> Tensor:
    """The matrix that computes what it and its adapter compute together, in fp32."""
    return weight.float() + lora.scale * (lora_b.float() @ lora_a.float())
