"""The small parts of a block: norms, the MLP and dropout. Each is handed the axis it uses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from megatrain.config.schema import ModelConfig
from megatrain.kernels import compiled
from megatrain.kernels.beside import together
from megatrain.kernels.dispatch import Kernels, use_triton
from megatrain.kernels.gated import GATES, activated, gated
from megatrain.kernels.norm import add_biased_norm, add_norm, norm, norm_beside
from megatrain.kernels.sdpa import STEADY, Fused
from megatrain.models.batch import MicroBatch
from megatrain.models.recompute import Remake
from megatrain.models.rope import tables
from megatrain.parallel import rng
from megatrain.parallel.mesh import Axis
from megatrain.parallel.param import Init, ParamSpec, Part
from megatrain.parallel.tensor_parallel import ColumnParallelLinear, Linears, RowParallelLinear
from megatrain.parallel.weights import make_parameters


@dataclass(frozen=True)
class Build:
    """What every layer of one model is built with."""

    config: ModelConfig
    tp: Axis
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device
    seed: int
    """Of dropout."""
    recompute: Literal["none", "selective", "full"] = "none"
    tied_over: str | None = None
    """Axis over which the embedding's rank and the head's each hold a copy of a tied matrix; None where one rank has both."""
    loss_chunk: int = 0
    """Tokens of a micro-batch whose logits exist at a time; 0: all."""
    kernels: Kernels = "auto"
    """Which implementation of an operation serves (kernels/dispatch.py)."""
    compile: bool = False
    """Whether what lies between matrix products is compiled (kernels/compiled.py)."""
    fused: tuple[Fused, ...] = STEADY
    """Which of torch's kernels for causal attention serve on a GPU, best first (kernels/sdpa.py)."""

    def init(self, inputs: int, outputs: int) -> Init:
        """Of weights that read the residual stream; inputs, outputs: of the matrix."""
        c = self.config
        std = {
            "normal": c.init_std,
            "small": (2 / (5 * c.hidden_size)) ** 0.5,
            "fan_in": inputs**-0.5,
            "xavier": (2 / (inputs + outputs)) ** 0.5,
        }[c.init]
        return Init("normal", std)

    def residual_init(self, inputs: int, outputs: int) -> Init:
        """Of weights that write into the residual stream: 2 per block, so their sum keeps its variance (GPT-2, section 2.3)."""
        plain = self.init(inputs, outputs)
        return Init("normal", plain.value / (2 * self.config.num_layers) ** 0.5) if self.config.scale_residual_init else plain

    def branch_init(self, inputs: int, outputs: int) -> Init:
        """Of values and of what comes before the activation: DeepNorm scales them too (arXiv:2203.00555, figure 2)."""
        scaled = self.config.norm_placement == "deepnorm"
        return self.residual_init(inputs, outputs) if scaled else self.init(inputs, outputs)

    @property
    def embedding_init(self) -> Init:
        """Of token and position embeddings, which are looked up: their one input is a token."""
        c = self.config
        if c.embedding_init_std is not None:
            return Init("normal", c.embedding_init_std)
        return Init("normal", c.init_std) if c.init == "xavier" else self.init(c.hidden_size, c.hidden_size)

    @functools.cached_property
    def rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [positions, r/2]; they may be long, so there is one of each in a model."""
        return tables(self.config, self.dtype, self.device)

    @property
    def residual_dtype(self) -> torch.dtype:
        """Of the residual stream."""
        return torch.promote_types(self.dtype, torch.float32) if self.config.residual_fp32 else self.dtype

    @property
    def replicated_partial(self) -> str | None:
        """Axis over which gradients of whole (unsplit) parameters are partial sums: with sequence parallelism, each rank sees s/t."""
        return "tp" if self.sequence_parallel else None

    def linears(self, part: Part) -> Linears:
        """What every linear layer of a part is built with."""
        return {
            "part": part,
            "bias": self.config.bias,
            "sequence_parallel": self.sequence_parallel,
            "dtype": self.dtype,
            "device": self.device,
        }

    def first_position(self, local_rows: int) -> int:
        """Position in the sequence of this rank's first activation row."""
        return self.tp.rank * local_rows if self.sequence_parallel else 0


class Norm(nn.Module):
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last dim; statistics in at least float32."""

    def __init__(self, name: str, build: Build, width: int | None = None, partial: str | None = None) -> None:
        """width: of what is normalised, h by default; partial: the axis over which the gradients of its parameters are partial sums."""
        super().__init__()
        config, partial = build.config, partial or build.replicated_partial
        size = (width or config.hidden_size,)
        weight = ParamSpec(f"{name}.weight", size, None, partial, decay=False, init=Init("constant", 1.0), part="norm")
        bias = ParamSpec(f"{name}.bias", size, None, partial, decay=False, init=Init("constant", 0.0), part="norm")
        self.weight = make_parameters([weight], build.tp, build.dtype, build.device)[0]
        has_bias = config.norm == "layernorm" and config.bias
        self.bias = make_parameters([bias], build.tp, build.dtype, build.device)[0] if has_bias else None
        settings: dict[str, Any] = {"eps": config.norm_eps, "rms": config.norm == "rmsnorm"}
        self.alone: Callable[..., Any] = functools.partial(norm, kernels=build.kernels, **settings)
        self.added: Callable[..., Any] = functools.partial(add_norm, kernels=build.kernels, **settings)
        self.both: Callable[..., Any] | None = functools.partial(norm_beside, kernels=build.kernels, **settings)
        self.added_biased: Callable[..., Any] = functools.partial(add_biased_norm, **settings)
        self.kernels, self.own = build.kernels, not build.compile
        if build.compile:
            self.both = None
            purpose = name.rsplit(".", 1)[-1]
            self.alone = compiled.compiled(compiled.norm, purpose, **settings)
            self.added = compiled.compiled(compiled.add_norm, purpose, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        y: torch.Tensor = self.alone(x, self.weight, self.bias)
        return y

    def beside(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x), x), both [..., h]: for who goes on to read x too."""
        if self.both is None:
            return self(x), x
        both: tuple[torch.Tensor, torch.Tensor] = self.both(x, self.weight, self.bias)
        return both

    def after_adding(
        self, x: torch.Tensor, residual: torch.Tensor, residual_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual), both [..., h].

        residual_bias: stands for what was added to residual before, [h], where `sums_after` x; its gradient is made here.
        """
        both: tuple[torch.Tensor, torch.Tensor]
        if residual_bias is None:
            both = self.added(x, residual, self.weight, self.bias)
        else:
            both = self.added_biased(x, residual, self.weight, self.bias, residual_bias)
        return both

    def sums_after(self, x: torch.Tensor) -> bool:
        """Whether the backward of x and a residual of its dtype has the sums of a bias's gradient without another pass."""
        return self.own and use_triton(self.kernels, x.device)


class Dropout(nn.Module):
    """Dropout whose mask is a function of (seed, step, sample, position, layer, site): the same under every layout."""

    def __init__(self, build: Build, *where: str | int) -> None:
        super().__init__()
        self.build, self.where = build, where

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return self.training and self.build.config.dropout > 0

    def forward(self, x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape."""
        if not self.active:
            return x
        p = self.build.config.dropout
        key = rng.key(self.build.seed, "dropout", batch.step, *self.where)
        first = self.build.first_position(x.shape[0])
        return rng.dropout(x, p, key, batch.samples, first, kernels=self.build.kernels)


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) for gated activations (arXiv:2002.05202)."""

    def __init__(self, name: str, build: Build) -> None:
        super().__init__()
        config = build.config
        h, f = config.hidden_size, config.ffn_size
        shared = build.linears("mlp")
        inner = ("gate", "up") if config.gated else ("up",)
        outputs = [(f"{name}.{n}", f, f) for n in inner]
        self.inner = ColumnParallelLinear(outputs, h, build.tp, init=build.branch_init(h, f), **shared)
        self.down = RowParallelLinear(f"{name}.down", f, h, f, build.tp, init=build.residual_init(f, h), **shared)
        self.activation, self.kernels = config.activation, build.kernels
        self.fused = compiled.compiled(compiled.activation, "mlp", kind=config.activation) if build.compile else None

    def forward(self, x: torch.Tensor, batch: MicroBatch, remake: Remake | None = None) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape. remake: makes x again, so that neither it nor the activation is kept."""
        bias = self.inner.bias_place() if self.fused is None else None
        inner = self.inner(x, batch.postponed, remake, sums_bias=bias is None)
        cheaper_kept = remake is None or self.activation == "relu"  # its own backward keeps the output, not the input
        again = None if cheaper_kept else (lambda: self._activate(inner, None, keep=False))
        return self.down(self._activate(inner, bias, keep=remake is None), batch.postponed, again)

    def _activate(self, inner: tuple[torch.Tensor, ...], bias: torch.Tensor | None, keep: bool) -> torch.Tensor:
        """One or two [s, b, f/t] -> [s, b, f/t]. bias: the inner ones' place; keep: whether what the backward reads twice may be kept."""
        if self.fused is not None:
            return self.fused(together(*inner))
        if self.activation not in GATES:
            return activated(inner[0], self.activation, bias=bias, kernels=self.kernels)
        gate, up = inner
        return gated(gate, up, self.activation, bias=bias, keep=keep, kernels=self.kernels)


def scaled_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x, whose gradient is multiplied: factor x + (1 - factor) x held constant (GLM-130B, arXiv:2210.02414, section 3.3)."""
    scaled: torch.Tensor = x if factor == 1 else _ScaledGradient.apply(x, factor)
    return scaled


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return dy * ctx.factor, None
