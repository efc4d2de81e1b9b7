"""Whether an optimizer's update is made, decided when the gradient is known and the weights are not changed yet.

Every engine of DeepSpeed ends in `step()` of the torch optimizer it was given, under ZeRO several times for the parts
of one step. The gate stands there; what decides comes from outside. Written for DeepSpeed 0.19.8.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed as dist

__all__ = ["Admit", "StepGate"]

Admit = Callable[[float, float], bool]
"""From the loss of a step and its gradient norm to whether the weights may change."""


class StepGate:
    """Stands before the update of one optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """Take the optimizer's `step` over.

        Args:
            optimizer: of this rank.
            device: that collectives run on.
        """
        self._update = optimizer.step
        self._device = device
        self._decide: Callable[[], bool] | None = None
        self._passes: bool | None = None
        optimizer.step = self._step  # type: ignore[method-assign]

    @contextlib.contextmanager
    def armed(self, admit: Admit | None, loss: Callable[[], float], norm: Callable[[], float]) -> Iterator[None]:
        """Inside, one step is made. Its first update asks `admit`; one rank's no is every rank's.

        Args:
            admit: as for `TrainEngine.train_step`; None lets everything pass.
            loss: the step's loss, the same on every rank; a collective.
            norm: the step's gradient norm, known when the first update begins.
        """
        self._passes = None
        self._decide = None if admit is None else lambda: self._agreed(admit(loss(), norm()))
        try:
            yield
        finally:
            self._decide = None

    def _agreed(self, mine: bool) -> bool:
        refused = torch.tensor([not mine], dtype=torch.int32, device=self._device)
        dist.all_reduce(refused, op=dist.ReduceOp.MAX)
        return not refused.item()

    def _step(self, closure: Any = None) -> Any:
        if self._decide is None:
            return self._update(closure)
        if self._passes is None:
            self._passes = self._decide()
        return self._update(closure) if self._passes else None
