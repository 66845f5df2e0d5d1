"""The numbers that all buckets of one optimizer update have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Update:
    """One update of the whole model: the numbers that its buckets have in common, of this rule or another; tensors are on the device."""

    lr: float
    betas: tuple[float, float]
    eps: float
    momentum: float
    """SGD's."""
    count: torch.Tensor
    """float32: updates so far, this one included."""
    grad_divisor: torch.Tensor
    """Scalar, float64 or float32: gradients are divided by it."""
    skip: torch.Tensor
    """Scalar 0 or 1; where it is 1 nothing changes."""

    @cached_property
    def scalars(self) -> torch.Tensor:
        """float32 [4] on the device, of numbers that are exact to float64: divisor, skip, step size with its sign, sqrt(1 - b2^n)."""
        first, second = (1 - torch.pow(beta, self.count.double()) for beta in self.betas)
        found = torch.stack([self.grad_divisor.double(), self.skip.double(), -self.lr / first, second.sqrt()])
        return found.to(torch.float32)
