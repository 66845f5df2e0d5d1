"""Dynamic loss scaling for FP16 (Micikevicius et al., arXiv:1710.03740, section 3.2).

FP16 has 5 bits of exponent: gradients below 6e-8 vanish. So the loss is multiplied by a scale before the backward, and gradients are
divided by it before the update. The scale is as large as it can be: it doubles after `window` updates without an overflow, and halves
at overflows once `hysteresis` of them have come without such a window between. A step that overflowed anywhere changes no weight on
any rank: whether it did is known from the one all-reduce of the step, so the scale is the same on all ranks.

In every other precision the scale is 1 and stays so.
"""

from __future__ import annotations

import torch

from megatrain.config.schema import TrainConfig


class LossScale:
    """The scale and its counters, on the device, so that the host need not wait to know of an overflow."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.dynamic = config.precision == "fp16"
        self.window, self.hysteresis, self.least = config.loss_scale_window, config.loss_scale_hysteresis, config.loss_scale_min
        first = config.loss_scale if self.dynamic else 1.0
        self._state = torch.tensor([first, 0.0, self.hysteresis], dtype=torch.float64, device=device)

    @property
    def scale(self) -> torch.Tensor:
        """float64 scalar."""
        return self._state[0]

    def update(self, overflow: torch.Tensor) -> None:
        """Take note of a step; overflow: scalar 0 or 1."""
        if not self.dynamic:
            return
        scale, good, left = self._state
        over = overflow > 0
        left = torch.where(over, left - 1, left)
        good = torch.where(over, 0.0, good + 1)
        grow = good >= self.window
        halved = torch.clamp(scale / 2, min=self.least)
        scale = torch.where(over & (left <= 0), halved, torch.where(grow, scale * 2, scale))
        self._state = torch.stack([scale, torch.where(grow, 0.0, good), torch.where(grow, float(self.hysteresis), left)])

    def state(self) -> list[float]:
        """What a checkpoint keeps: scale, updates since the last overflow or growth, overflows left."""
        return [float(value) for value in self._state.tolist()]

    def restore(self, state: list[float]) -> None:
        """Go on from an FP16 checkpoint, within the bounds of now."""
        if self.dynamic:
            scale, good, left = state
            bounded = [max(scale, self.least), good, min(left, self.hysteresis)]
            self._state = torch.tensor(bounded, dtype=torch.float64, device=self._state.device)
