"""An independent GPT in plain PyTorch, against which the tests compare megatrain; it imports nothing from megatrain.

Written the ordinary way: batch-first [b, s, h], torch.nn modules, torch.optim. Names of weights are the logical names that
`ReferenceGPT.logical` lists. Dropout is not drawn here: masks come from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

Masks = Callable[[str], torch.Tensor]
"""From a site (embedding, layers.{i}.attention, layers.{i}.mlp) to factors of its activation: [b, s, h], 0 or 1 / (1 - p)."""

PLAIN_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
GATE_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}


def undropped(site: str) -> torch.Tensor:
    """Masks of a model without dropout."""
    return torch.ones(())


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: `turns` [d/2 or fewer] radians of each pair a position."""

    turns: Sequence[float]
    interleaved: bool = False
    magnitude: float = 1.0

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [b, a, s, d] at positions [b, s]: complex numbers x1 + i x2 times e^(i m f), of the first pairs; the rest stays."""
        turned, rest = x[..., : 2 * len(self.turns)], x[..., 2 * len(self.turns) :]
        angles = positions[:, None, :, None].to(x.dtype) * torch.tensor(self.turns, dtype=x.dtype)
        spin = torch.polar(torch.full_like(angles, self.magnitude), angles)
        if self.interleaved:
            turned = torch.view_as_real(torch.view_as_complex(turned.unflatten(-1, (-1, 2)).contiguous()) * spin).flatten(-2)
        else:
            complex_ = torch.complex(*turned.chunk(2, dim=-1)) * spin
            turned = torch.cat([complex_.real, complex_.imag], dim=-1)
        return torch.cat([turned, rest], dim=-1)


def make_rope(
    width: int,
    theta: float,
    fraction: float = 1.0,
    interleaved: bool = False,
    scaling: str = "none",
    factor: float = 1.0,
    original: float = 0.0,
    low_high: tuple[float, float] = (1.0, 4.0),
    slow_fast: tuple[float, float] = (1.0, 32.0),
) -> Rope:
    """Frequencies pair by pair, from the formulas of the papers."""
    numbers = int(width * fraction) // 2 * 2
    plain = [theta ** (-2 * i / numbers) for i in range(numbers // 2)]
    if scaling == "none":
        return Rope(plain, interleaved)
    if scaling == "linear":
        return Rope([f / factor for f in plain], interleaved)
    if scaling == "llama3":
        turns = []
        for f in plain:
            wavelength = 2 * math.pi / f
            if wavelength < original / low_high[1]:
                turns.append(f)
            elif wavelength > original / low_high[0]:
                turns.append(f / factor)
            else:
                smooth = (original / wavelength - low_high[0]) / (low_high[1] - low_high[0])
                turns.append((1 - smooth) * f / factor + smooth * f)
        return Rope(turns, interleaved)
    bounds = [numbers * math.log(original / (r * 2 * math.pi)) / (2 * math.log(theta)) for r in reversed(slow_fast)]
    low, high = max(math.floor(bounds[0]), 0), min(math.ceil(bounds[1]), numbers - 1)
    high = high + 0.001 if low == high else high
    gamma = [1 - min(max((i - low) / (high - low), 0), 1) for i in range(numbers // 2)]
    turns = [(1 - g) * f / factor + g * f for g, f in zip(gamma, plain, strict=True)]
    return Rope(turns, interleaved, 0.1 * math.log(factor) + 1)


def slopes_of(heads: int) -> list[float]:
    """ALiBi's slopes as the paper's repository computes them."""

    def power_of_two(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return power_of_two(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return power_of_two(closest) + slopes_of(2 * closest)[0::2][: heads - closest]


@dataclass(frozen=True)
class Sight:
    """Which keys are seen, besides causality, and ALiBi."""

    window: int | None = None
    sparse: tuple[int, int, int] | None = None
    alibi: bool = False

    def bias(self, heads: int, documents: torch.Tensor) -> torch.Tensor:
        """What is added to scores: [b, heads, s, s] for documents [b, s]."""
        s = documents.shape[1]
        q, k = torch.arange(s)[:, None], torch.arange(s)[None, :]
        seen = (k <= q) & (documents[:, :, None] == documents[:, None, :])
        if self.window is not None:
            seen = seen & (q - k < self.window)
        if self.sparse is not None:
            block, near, everywhere = self.sparse
            seen = seen & ((q // block - k // block < near) | (k // block < everywhere))
        slopes = torch.tensor(slopes_of(heads) if self.alibi else [0.0] * heads, dtype=torch.float64)
        return (slopes[:, None, None] * (k - q)).masked_fill(~seen[:, None], -math.inf)


class Attention(nn.Module):
    """Causal self-attention with `groups` key/value heads."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        groups: int,
        bias: bool,
        rope: Rope | None,
        explicit: bool,
        sight: Sight,
        width: int | None = None,
        qkv_bias: bool | None = None,
        head_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.width = width or hidden // heads
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.heads, self.groups, self.rope, self.explicit, self.sight = heads, groups, rope, explicit, sight
        self.query = nn.Linear(hidden, heads * self.width, bias=qkv_bias)
        self.key = nn.Linear(hidden, groups * self.width, bias=qkv_bias)
        self.value = nn.Linear(hidden, groups * self.width, bias=qkv_bias)
        self.query_norm = head_norm(self.width) if head_norm else nn.Identity()
        self.key_norm = head_norm(self.width) if head_norm else nn.Identity()
        self.output = nn.Linear(heads * self.width, hidden, bias=bias)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Columns to heads: [b, s, n d] to [b, n, s, d]."""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, documents: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        q, k = self.query_norm(q), self.key_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        if self.explicit:
            scores = q @ k.transpose(-1, -2) / math.sqrt(self.width) + self.sight.bias(self.heads, documents).to(x)
            mixed = (scores.softmax(-1) * dropped.to(x)) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two matrices and an activation, or three with a gate."""

    def __init__(self, hidden: int, inner: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(hidden, inner, bias=bias) if activation in GATE_ACTIVATIONS else None
        self.up = nn.Linear(hidden, inner, bias=bias)
        self.down = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is not None:
            return self.down(GATE_ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
        return self.down(PLAIN_ACTIVATIONS[self.activation](self.up(x)))


class Block(nn.Module):
    """Transformer block; `placement` of the norms: pre, post or sandwich."""

    def __init__(self, make_norm: Callable[[], nn.Module], attention: Attention, mlp: MLP, placement: str) -> None:
        super().__init__()
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = make_norm(), attention, make_norm(), mlp
        self.placement = placement
        if placement == "sandwich":
            self.attention_output_norm, self.mlp_output_norm = make_norm(), make_norm()

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor,
        mlp_mask: torch.Tensor,
        positions: torch.Tensor,
        documents: torch.Tensor,
        dropped: torch.Tensor,
    ) -> torch.Tensor:
        def attend(y: torch.Tensor) -> torch.Tensor:
            return self.attention(y, positions, documents, dropped)

        if self.placement == "post":
            x = self.attention_norm(x + attention_mask * attend(x))
            return self.mlp_norm(x + mlp_mask * self.mlp(x))
        if self.placement == "sandwich":
            x = x + attention_mask * self.attention_output_norm(attend(self.attention_norm(x)))
            return x + mlp_mask * self.mlp_output_norm(self.mlp(self.mlp_norm(x)))
        x = x + attention_mask * attend(self.attention_norm(x))
        return x + mlp_mask * self.mlp(self.mlp_norm(x))


class ReferenceGPT(nn.Module):
    """Tokens [b, s] to logits [b, s, v]; `explicit_softmax`: attention by its formula, not by torch's fused function."""

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        num_attention_heads: int,
        seq_length: int,
        vocab_size: int,
        ffn_hidden_size: int,
        num_query_groups: int | None = None,
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        activation: str = "gelu_tanh",
        position: str = "learned",
        rope_theta: float = 10000.0,
        bias: bool = True,
        tied_embeddings: bool = True,
        explicit_softmax: bool = False,
        head_dim: int | None = None,
        qkv_bias: bool | None = None,
        qk_norm: bool = False,
        embedding_norm: bool = False,
        logit_softcap: float = 0.0,
        rope: Rope | None = None,
        sights: Sequence[Sight] = (),
        norm_placement: str = "pre",
    ) -> None:
        super().__init__()
        self.logit_softcap = logit_softcap
        groups = num_query_groups or num_attention_heads
        if position == "rope" and rope is None:
            rope = make_rope(head_dim or hidden_size // num_attention_heads, rope_theta)

        def make_norm(width: int = hidden_size) -> nn.Module:
            if norm == "rmsnorm":
                return nn.RMSNorm(width, eps=norm_eps)
            return {"layernorm": nn.LayerNorm}[norm](width, eps=norm_eps, bias=bias)

        head_norm = make_norm if qk_norm else None

        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(seq_length, hidden_size) if position == "learned" else None
        self.layers = nn.ModuleList(
            Block(
                make_norm,
                Attention(
                    hidden_size, num_attention_heads, groups, bias, rope, explicit_softmax, sight, head_dim, qkv_bias, head_norm
                ),
                MLP(hidden_size, ffn_hidden_size, activation, bias),
                norm_placement,
            )
            for sight in sights or [Sight()] * num_layers
        )
        self.embedding_norm = make_norm() if embedding_norm else nn.Identity()
        self.final_norm = make_norm() if norm_placement != "post" else nn.Identity()
        self.head = None if tied_embeddings else nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(
        self,
        tokens: torch.Tensor,
        masks: Masks = undropped,
        positions: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        if documents is None:
            documents = torch.zeros_like(tokens)
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(positions)
        x = self.embedding_norm(x)
        x = x * masks("embedding").to(x)
        for i, block in enumerate(self.layers):
            sites = (f"layers.{i}.attention", f"layers.{i}.mlp")
            dropped = masks(f"layers.{i}.attention.weights")
            x = block(x, *(masks(site).to(x) for site in sites), positions, documents, dropped)
        logits = F.linear(self.final_norm(x), self.tokens.weight if self.head is None else self.head.weight)
        return logits if not self.logit_softcap else self.logit_softcap * (logits / self.logit_softcap).tanh()

    def logical(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Logical name and parameter of every weight; a tied head appears once, as the embedding."""
        renamed = {"tokens.weight": "embedding.tokens", "positions.weight": "embedding.positions"}
        for name, parameter in self.named_parameters():
            yield renamed.get(name, name).replace("embedding_norm.", "embedding.norm."), parameter

    def load_logical(self, state: dict[str, torch.Tensor]) -> None:
        """Copy all weights in; `state` has exactly the logical names and shapes."""
        mine = dict(self.logical())
        if mine.keys() != state.keys():
            raise KeyError(f"missing {sorted(mine.keys() - state.keys())}, unknown {sorted(state.keys() - mine.keys())}")
        with torch.no_grad():
            for name, parameter in mine.items():
                if parameter.shape != state[name].shape:
                    raise ValueError(f"{name} has shape {list(parameter.shape)}, given {list(state[name].shape)}")
                parameter.copy_(state[name])

    def logical_weights(self) -> dict[str, torch.Tensor]:
        """Copies of all weights by logical name."""
        return {name: parameter.detach().clone() for name, parameter in self.logical()}

    def logical_gradients(self) -> dict[str, torch.Tensor]:
        """Copies of all gradients by logical name."""
        return {name: p.grad.clone() for name, p in self.logical() if p.grad is not None}


@dataclass(frozen=True)
class ReferenceBatch:
    """One micro-batch: tokens, labels [b, s] int64 and loss weights [b, s]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor | None = None
    documents: torch.Tensor | None = None


@dataclass
class ReferenceRun:
    """What a training run went through."""

    losses: list[float] = field(default_factory=list)
    """Weighted mean loss of each step, before its update."""
    grad_norms: list[float] = field(default_factory=list)
    """Global norm of each step's gradients before clipping."""
    first_gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Gradients of the first step before clipping."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights at the end."""
    moments: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Optimizer state at the end, by logical name: exp_avg and exp_avg_sq (Adam), or momentum_buffer (SGD)."""


def make_optimizer(
    model: ReferenceGPT, name: str, weight_decay: float, betas: tuple[float, float], eps: float, momentum: float
) -> torch.optim.Optimizer:
    """torch's optimizer over two groups: matrices (embeddings too) decay, vectors do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=eps)
    if name == "adam":
        return torch.optim.Adam(groups, betas=betas, eps=eps)
    return {"sgd": torch.optim.SGD}[name](groups, momentum=momentum)


def reference_train(
    model: ReferenceGPT,
    steps: Sequence[Sequence[ReferenceBatch]],
    *,
    rates: Sequence[float],
    optimizer: str = "adamw",
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    momentum: float = 0.9,
    clip_grad: float = 1.0,
    masks: Callable[[int, int], Masks] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> ReferenceRun:
    """Train on `steps`, lists of micro-batches, at `rates[step]`, dropout by `masks(step, micro_batch)`; clip_grad 0: none.

    The loss of a step is the sum of all weighted token losses over the sum of all weights of the step.
    """
    run = ReferenceRun()
    update = make_optimizer(model, optimizer, weight_decay, betas, eps, momentum)
    for step, (micro_batches, rate) in enumerate(zip(steps, rates, strict=True)):
        for group in update.param_groups:
            group["lr"] = rate
        update.zero_grad()
        total = torch.stack([batch.weights.double().sum() for batch in micro_batches]).sum()
        loss_of_step = 0.0
        for index, batch in enumerate(micro_batches):
            logits = model(batch.tokens, masks(step, index) if masks else undropped, batch.positions, batch.documents).flatten(
                0, 1
            )
            losses = F.cross_entropy(logits, batch.labels.flatten(), reduction="none", label_smoothing=label_smoothing)
            losses = losses + z_loss * logits.logsumexp(-1) ** 2
            loss = (losses * batch.weights.flatten().to(losses)).sum() / total.to(losses)
            loss.backward()
            loss_of_step += loss.item()
        if step == 0:
            run.first_gradients = model.logical_gradients()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)
        update.step()
        run.losses.append(loss_of_step)
        run.grad_norms.append(norm.item())
    run.weights = model.logical_weights()
    for name, parameter in model.logical():
        state = update.state[parameter]
        run.moments[name] = {key: t.clone() for key, t in state.items() if torch.is_tensor(t) and t.shape == parameter.shape}
    return run
