"""Independent GLM-1 and ChatGLM-6B in plain PyTorch, with the names of their original files; they import nothing from megatrain.

Written batch-first from the descriptions of the models: masks are dense, scores are masked by subtraction, queries, keys and values come
out of one fused matrix.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def seen(sep, length):
    """[b, 1, s, s] 1 where query q may see key k: k < sep or k <= q."""
    q, k = torch.arange(length)[None, :, None], torch.arange(length)[None, None, :]
    return ((k < sep[:, None, None]) | (k <= q))[:, None]


def attend(q, k, v, mask):
    """[b, heads, s, d] each -> [b, s, heads d]; as the originals write it."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores * mask - 65504.0 * (1 - mask.to(scores.dtype))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Fused(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(h, 3 * h), nn.Linear(h, h)


class Layer(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(h, eps=1e-5), nn.LayerNorm(h, eps=1e-5)
        self.attention, self.mlp = Fused(h), MLP(h)


class GLM1(nn.Module):
    """Pre-norm, learned positions in two dimensions, tied head."""

    def __init__(self, layers, h, heads, vocabulary, positions):
        super().__init__()
        self.heads = heads
        self.word_embeddings = nn.Embedding(vocabulary, h)
        self.transformer = nn.Module()
        self.transformer.position_embeddings = nn.Embedding(positions + 1, h)
        self.transformer.block_position_embeddings = nn.Embedding(positions + 1, h)
        self.transformer.layers = nn.ModuleList(Layer(h) for _ in range(layers))
        self.transformer.final_layernorm = nn.LayerNorm(h, eps=1e-5)

    def forward(self, tokens, positions, sep):
        """tokens [b, s], positions [b, 2, s], sep [b] -> [b, s, v]."""
        t = self.transformer
        x = self.word_embeddings(tokens) + t.position_embeddings(positions[:, 0]) + t.block_position_embeddings(positions[:, 1])
        mask = seen(sep, tokens.shape[1])
        for layer in t.layers:
            # q|k|v, each of all heads
            fused = layer.attention.query_key_value(layer.input_layernorm(x))
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in fused.chunk(3, -1))
            x = x + layer.attention.dense(attend(q, k, v, mask))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return t.final_layernorm(x) @ self.word_embeddings.weight.T

    def logical(self):
        """Logical name -> its weight or gradient-carrying slice, as a function of a parameter."""
        return {
            **self._common("transformer.layers", lambda y, n: y.chunk(3)[n]),
            "embedding.tokens": self.word_embeddings.weight,
            "embedding.positions": self.transformer.position_embeddings.weight,
            "embedding.block_positions": self.transformer.block_position_embeddings.weight,
            "final_norm.weight": self.transformer.final_layernorm.weight,
            "final_norm.bias": self.transformer.final_layernorm.bias,
        }

    def _common(self, _prefix, part):
        found = {}
        for n, layer in enumerate(self.transformer.layers):
            modules = {
                "attention_norm": layer.input_layernorm,
                "attention.output": layer.attention.dense,
                "mlp_norm": layer.post_attention_layernorm,
                "mlp.up": layer.mlp.dense_h_to_4h,
                "mlp.down": layer.mlp.dense_4h_to_h,
            }
            for name, module in modules.items():
                found |= {f"layers.{n}.{name}.weight": module.weight, f"layers.{n}.{name}.bias": module.bias}
            fused = layer.attention.query_key_value
            for place, name in enumerate(("query", "key", "value")):
                found[f"layers.{n}.attention.{name}.weight"] = (fused.weight, part, place)
                found[f"layers.{n}.attention.{name}.bias"] = (fused.bias, part, place)
        return found


class ChatGLM(GLM1):
    """DeepNorm with the residual taken behind the norm, rotation by two positions, a head of its own."""

    def __init__(self, layers, h, heads, vocabulary):
        nn.Module.__init__(self)
        self.heads = heads
        self.transformer = nn.Module()
        self.transformer.word_embeddings = nn.Embedding(vocabulary, h)
        self.transformer.layers = nn.ModuleList(Layer(h) for _ in range(layers))
        self.transformer.final_layernorm = nn.LayerNorm(h, eps=1e-5)
        self.lm_head = nn.Linear(h, vocabulary, bias=False)

    def forward(self, tokens, positions, sep):
        """tokens [b, s], positions [b, 2, s], sep [b] -> [b, s, v]."""
        t = self.transformer
        x, mask, alpha = t.word_embeddings(tokens), seen(sep, tokens.shape[1]), (2 * len(t.layers)) ** 0.5
        for number, layer in enumerate(t.layers):
            x = layer.input_layernorm(x)
            # head after head, q|k|v of each
            fused = layer.attention.query_key_value(x).unflatten(-1, (self.heads, -1))
            q, k, v = (y.transpose(1, 2) for y in fused.chunk(3, -1))
            q, k = turned(q, positions), turned(k, positions)
            coefficient = number + 1  # queries are made small by it and scores large again: nothing, in exact arithmetic
            y = attend(q / coefficient, k * coefficient, v, mask)
            x = alpha * x + layer.attention.dense(y)
            x = layer.post_attention_layernorm(x)
            x = alpha * x + layer.mlp(x)
        return self.lm_head(t.final_layernorm(x))

    def logical(self):
        """As GLM1 has it."""

        def of_head(y, place):
            return y.unflatten(0, (self.heads, 3, -1))[:, place].flatten(0, 1)

        return {
            **self._common("transformer.layers", of_head),
            "embedding.tokens": self.transformer.word_embeddings.weight,
            "head.weight": self.lm_head.weight,
            "final_norm.weight": self.transformer.final_layernorm.weight,
            "final_norm.bias": self.transformer.final_layernorm.bias,
        }


def turned(x, positions):
    """[b, heads, s, d]: the first half of each head by the first position, the second by the second, each in halves of its own."""
    parts = []
    for half, place in zip(x.chunk(2, -1), positions.unbind(1), strict=True):
        width = half.shape[-1]
        frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = place[:, None, :, None] * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = half.chunk(2, -1)
        parts += [a * cos - b * sin, b * cos + a * sin]
    return torch.cat(parts, -1)


def values(logical, of=lambda p: p):
    """Logical name -> tensor, of the parameters themselves or of what `of` makes of them."""
    return {
        name: where[1](of(where[0]), where[2]) if isinstance(where, tuple) else of(where) for name, where in logical.items()
    }


def spread(model, seed=3):
    """The model with weights of a large spread, so that a wrong convention shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            around = 1.0 if "layernorm.weight" in name else 0.0
            p.copy_(around + 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model
