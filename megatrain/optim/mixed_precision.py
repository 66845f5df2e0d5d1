"""The optimizer: FP32 master weights and states over the flat buffers, one update per step.

BF16 has 8 bits of mantissa: an update smaller than 1/256 of a weight would be lost. So BF16 parameters are only a rounded copy of
float32 masters, gradients are summed in float32 (`FlatParameters`), and the update happens on the masters (the BF16 optimizer of
BLOOM's run; Micikevicius et al., arXiv:1710.03740, section 3.1). In FP32 and FP64 runs the parameters are their own masters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch

from megatrain.config.schema import OptimConfig
from megatrain.optim.adamw import adam_step
from megatrain.optim.sgd import sgd_step
from megatrain.parallel.param import Parameter, ParamSpec
from megatrain.parallel.zero import FlatParameters

StateTensors = dict[str, dict[str, tuple[ParamSpec, torch.Tensor]]]
"""Kind (weights, exp_avg, ...) -> logical name -> (spec, this rank's local tensor)."""


@dataclass(frozen=True)
class _Group:
    """Parameters that share a weight decay: their views of every flat buffer."""

    decay: float
    weights: list[torch.Tensor]
    grads: list[torch.Tensor]
    states: dict[str, list[torch.Tensor]]


class _Shared(TypedDict):
    """What every optimizer's step takes."""

    lr: float
    weight_decay: float
    grad_divisor: torch.Tensor
    skip: torch.Tensor


_STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum",)}


class Optimizer:
    """Masters and states in the layout of the flat buffers; `updates` (float32 scalar) counts the updates applied."""

    def __init__(self, flat: FlatParameters, config: OptimConfig) -> None:
        self.flat, self.config = flat, config
        # Counted on the device, because a skipped step does not count and the host need not know of it.
        self.updates = torch.zeros((), dtype=torch.float32, device=flat.ctx.device)
        self.own_masters = flat.weights.dtype == flat.grads.dtype
        self.masters = flat.weights if self.own_masters else flat.weights.to(flat.grads.dtype)
        self.states = {kind: torch.zeros_like(flat.grads) for kind in _STATES[config.name]}
        self.groups = [
            self._group([p for p in flat.parameters if p.spec.decay], config.weight_decay),
            self._group([p for p in flat.parameters if not p.spec.decay], 0.0),
        ]

    def _group(self, parameters: list[Parameter], decay: float) -> _Group:
        def views(buffer: torch.Tensor) -> list[torch.Tensor]:
            return [self.flat.view(buffer, p) for p in parameters]

        states = {kind: views(buffer) for kind, buffer in self.states.items()}
        return _Group(decay, views(self.masters), views(self.flat.grads), states)

    def step(self, lr: float, grad_divisor: torch.Tensor, skip: torch.Tensor) -> None:
        """Update masters and states from the gradients, then round the parameters. Where `skip` (scalar 0 or 1) nothing changes."""
        config = self.config
        self.updates += 1 - skip.to(torch.float32)
        for group in self.groups:
            if not group.weights:
                continue
            shared: _Shared = {"lr": lr, "weight_decay": group.decay, "grad_divisor": grad_divisor, "skip": skip}
            if config.name == "sgd":
                sgd_step(group.weights, group.grads, group.states["momentum"], momentum=config.momentum, **shared)
            else:
                adam_step(
                    group.weights,
                    group.grads,
                    group.states["exp_avg"],
                    group.states["exp_avg_sq"],
                    step=self.updates,
                    betas=config.betas,
                    eps=config.eps,
                    decoupled=config.name == "adamw",
                    **shared,
                )
        self.round_parameters()

    def round_parameters(self) -> None:
        """Make the parameters the rounded copy of the masters."""
        if not self.own_masters:
            self.flat.weights.copy_(self.masters)

    def tensors(self) -> StateTensors:
        """Everything a checkpoint needs: weights at master precision, and the states."""
        buffers = {"weights": self.masters, **self.states}
        return {
            kind: {p.spec.name: (p.spec, self.flat.view(buffer, p)) for p in self.flat.parameters}
            for kind, buffer in buffers.items()
        }
