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


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of x [b, a, s, d] at positions 0 .. s - 1: complex numbers x1 + i x2 (the halves) times e^(i m f)."""
    s, d = x.shape[-2:]
    frequencies = theta ** (-2 * torch.arange(d // 2, dtype=x.dtype, device=x.device) / d)
    angles = torch.outer(torch.arange(s, dtype=x.dtype, device=x.device), frequencies)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


class Attention(nn.Module):
    """Causal self-attention with `groups` key/value heads."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        groups: int,
        bias: bool,
        rope_theta: float | None,
        explicit: bool,
        width: int | None = None,
        qkv_bias: bool | None = None,
        head_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.width = width or hidden // heads
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.heads, self.groups, self.rope_theta, self.explicit = heads, groups, rope_theta, explicit
        self.query = nn.Linear(hidden, heads * self.width, bias=qkv_bias)
        self.key = nn.Linear(hidden, groups * self.width, bias=qkv_bias)
        self.value = nn.Linear(hidden, groups * self.width, bias=qkv_bias)
        self.query_norm = head_norm(self.width) if head_norm else nn.Identity()
        self.key_norm = head_norm(self.width) if head_norm else nn.Identity()
        self.output = nn.Linear(heads * self.width, hidden, bias=bias)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Columns to heads: [b, s, n d] to [b, n, s, d]."""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        q, k = self.query_norm(q), self.key_norm(k)
        if self.rope_theta is not None:
            q, k = rotate(q, self.rope_theta), rotate(k, self.rope_theta)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        if self.explicit:
            scores = q @ k.transpose(-1, -2) / math.sqrt(self.width)
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
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
    """Pre-norm transformer block."""

    def __init__(self, attention_norm: nn.Module, attention: Attention, mlp_norm: nn.Module, mlp: MLP) -> None:
        super().__init__()
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = attention_norm, attention, mlp_norm, mlp

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor, mlp_mask: torch.Tensor) -> torch.Tensor:
        x = x + attention_mask * self.attention(self.attention_norm(x))
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
    ) -> None:
        super().__init__()
        self.logit_softcap = logit_softcap
        groups = num_query_groups or num_attention_heads
        theta = {"learned": None, "none": None, "rope": rope_theta}[position]

        def make_norm(width: int = hidden_size) -> nn.Module:
            if norm == "rmsnorm":
                return nn.RMSNorm(width, eps=norm_eps)
            return {"layernorm": nn.LayerNorm}[norm](width, eps=norm_eps, bias=bias)

        head_norm = make_norm if qk_norm else None

        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(seq_length, hidden_size) if position == "learned" else None
        self.layers = nn.ModuleList(
            Block(
                make_norm(),
                Attention(
                    hidden_size, num_attention_heads, groups, bias, theta, explicit_softmax, head_dim, qkv_bias, head_norm
                ),
                make_norm(),
                MLP(hidden_size, ffn_hidden_size, activation, bias),
            )
            for _ in range(num_layers)
        )
        self.embedding_norm = make_norm() if embedding_norm else nn.Identity()
        self.final_norm = make_norm()
        self.head = None if tied_embeddings else nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, masks: Masks = undropped) -> torch.Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        x = self.embedding_norm(x)
        x = x * masks("embedding").to(x)
        for i, block in enumerate(self.layers):
            x = block(x, masks(f"layers.{i}.attention").to(x), masks(f"layers.{i}.mlp").to(x))
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
            logits = model(batch.tokens, masks(step, index) if masks else undropped)
            losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
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
