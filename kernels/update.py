"""The numbers that all buckets of one optimizer update have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Update:
    """One optimizer update of the whole model: the scalars that all buckets share, whichever the rule; tensors are on the device."""

    lr: float
    betas: tuple[float, float]
    eps: float
    momentum: float
    """SGD's momentum."""
    count: torch.Tensor
    """Scalar float32: number of updates so far, this one included."""
    grad_divisor: torch.Tensor
    """Scalar, float64 or float32: gradients are divided by it."""
    skip: torch.Tensor
    """Scalar 0 or 1; where it is 1 nothing changes."""

    @cached_property
    def scalars(self) -> torch.Tensor:
        """Divisor, skip, -lr / (1 - b1^n) and sqrt(1 - b2^n), computed in float64 and rounded: float32 [4] on the device."""
        first, second = (1 - torch.pow(beta, self.count.double()) for beta in self.betas)
        found = torch.stack([self.grad_divisor.double(), self.skip.double(), -self.lr / first, second.sqrt()])
        return found.to(torch.float32)
