"""A table for each Hugging Face family: the logical tensors in each stored tensor, for reading and writing.

    Stored("self_attention.query_key_value.weight", QKV, "heads")

means that the stored tensor is made of the logical query, key and value matrices, head by head: [heads, 3, d, h]. A row whose logical
tensors a model lacks (biases, in a model without them) does not apply. `{n}` is a layer's number. dialects.py has config.json.
Sources: the implementations in transformers 5, and for ChatGLM the names in THUDM's own files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from megatrain.checkpoint.boxes import Box
from megatrain.checkpoint.together import ContentError
from megatrain.config.schema import ModelConfig


class Stored(NamedTuple):
    """One stored tensor and the logical tensors in it."""

    name: str
    of: tuple[str, ...]
    join: Literal["rows", "heads"] = "rows"
    """rows: the logical tensors one after another; heads: interleaved, one head of each in turn."""
    transposed: bool = False
    """Whether it is stored as [in, out] (GPT-2's Conv1D)."""


@dataclass(frozen=True)
class Family:
    """The stored tensors of a family."""

    architecture: str
    prefix: str
    """Prefix of all names but the head's; files on the hub may lack it."""
    rows: tuple[Stored, ...]
    """All stored tensors of a model; those of layers have {n} in stored and logical names."""
    head: str = "lm_head.weight"
    """Name of the output head, if it is not tied."""
    ignored: tuple[str, ...] = ()
    """Endings of names of buffers that hold no weights."""
    outer: str = ""
    """A further prefix that some files put before all names."""
    head_always: bool = False
    """Whether the head is also stored where it is tied to the embedding."""


QKV = ("attention.query", "attention.key", "attention.value")
_LAYER = "layers.{n}."


def _both(stored: str, *of: str, join: Literal["rows", "heads"] = "rows", transposed: bool = False) -> tuple[Stored, Stored]:
    """Rows for weight and bias of a linear layer or norm within a layer."""
    names = tuple(_LAYER + name for name in of)
    weight = Stored(f"{stored}.weight", tuple(f"{name}.weight" for name in names), join, transposed)
    return weight, Stored(f"{stored}.bias", tuple(f"{name}.bias" for name in names), join)


def _norm(stored: str, of: str) -> tuple[Stored, Stored]:
    return Stored(f"{stored}.weight", (f"{of}.weight",)), Stored(f"{stored}.bias", (f"{of}.bias",))


def _layers(prefix: str, *rows: tuple[Stored, Stored]) -> tuple[Stored, ...]:
    """Rows of a layer, with `prefix` before their stored names."""
    return tuple(row._replace(name=prefix + row.name) for pair in rows for row in pair)


def _llama(architecture: str, *others: tuple[Stored, Stored], fused: bool = False, sandwich: bool = False) -> Family:
    """LLaMA and the families that use its names. fused: gate and up are one tensor; sandwich: norms after attention and MLP."""
    inner = (
        (_both("mlp.gate_up_proj", "mlp.gate", "mlp.up"),)
        if fused
        else (_both("mlp.gate_proj", "mlp.gate"), _both("mlp.up_proj", "mlp.up"))
    )
    outputs = (
        (_both("post_self_attn_layernorm", "attention_output_norm"), _both("post_mlp_layernorm", "mlp_output_norm"))
        if sandwich
        else ()
    )
    rows = _layers(
        "layers.{n}.",
        _both("input_layernorm", "attention_norm"),
        _both("self_attn.q_proj", "attention.query"),
        _both("self_attn.k_proj", "attention.key"),
        _both("self_attn.v_proj", "attention.value"),
        *others,
        _both("self_attn.o_proj", "attention.output"),
        _both("post_attention_layernorm", "mlp_norm"),
        *inner,
        _both("mlp.down_proj", "mlp.down"),
        *outputs,
    )
    embedding = Stored("embed_tokens.weight", ("embedding.tokens",))
    return Family(architecture, "model.", (embedding, *rows, *_norm("norm", "final_norm")), ignored=("rotary_emb.inv_freq",))


def _glm_layers(prefix: str, join: Literal["rows", "heads"]) -> tuple[Stored, ...]:
    """Layers of GLM-1 and of the first ChatGLM-6B."""
    return _layers(
        prefix,
        _both("input_layernorm", "attention_norm"),
        _both("attention.query_key_value", *QKV, join=join),
        _both("attention.dense", "attention.output"),
        _both("post_attention_layernorm", "mlp_norm"),
        _both("mlp.dense_h_to_4h", "mlp.up"),
        _both("mlp.dense_4h_to_h", "mlp.down"),
    )


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        "transformer.",
        (
            Stored("wte.weight", ("embedding.tokens",)),
            Stored("wpe.weight", ("embedding.positions",)),
            *_layers(
                "h.{n}.",
                _both("ln_1", "attention_norm"),
                _both("attn.c_attn", *QKV, transposed=True),
                _both("attn.c_proj", "attention.output", transposed=True),
                _both("ln_2", "mlp_norm"),
                _both("mlp.c_fc", "mlp.up", transposed=True),
                _both("mlp.c_proj", "mlp.down", transposed=True),
            ),
            *_norm("ln_f", "final_norm"),
        ),
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    "llama": _llama("LlamaForCausalLM"),
    "mistral": _llama("MistralForCausalLM"),
    "qwen2": _llama("Qwen2ForCausalLM"),
    "qwen3": _llama(
        "Qwen3ForCausalLM",
        _both("self_attn.q_norm", "attention.query_norm"),
        _both("self_attn.k_norm", "attention.key_norm"),
    ),
    "glm": _llama("GlmForCausalLM", fused=True),
    "glm4": _llama("Glm4ForCausalLM", fused=True, sandwich=True),
    "bloom": Family(
        "BloomForCausalLM",
        "transformer.",
        (
            Stored("word_embeddings.weight", ("embedding.tokens",)),
            *_norm("word_embeddings_layernorm", "embedding.norm"),
            *_layers(
                "h.{n}.",
                _both("input_layernorm", "attention_norm"),
                _both("self_attention.query_key_value", *QKV, join="heads"),
                _both("self_attention.dense", "attention.output"),
                _both("post_attention_layernorm", "mlp_norm"),
                _both("mlp.dense_h_to_4h", "mlp.up"),
                _both("mlp.dense_4h_to_h", "mlp.down"),
            ),
            *_norm("ln_f", "final_norm"),
        ),
    ),
    "chatglm": Family(
        "ChatGLMForConditionalGeneration",
        "transformer.",
        (
            Stored("embedding.word_embeddings.weight", ("embedding.tokens",)),
            *_layers(
                "encoder.layers.{n}.",
                _both("input_layernorm", "attention_norm"),
                _both("self_attention.query_key_value", *QKV),
                _both("self_attention.dense", "attention.output"),
                _both("post_attention_layernorm", "mlp_norm"),
                _both("mlp.dense_h_to_4h", "mlp.gate", "mlp.up"),
                _both("mlp.dense_4h_to_h", "mlp.down"),
            ),
            *_norm("encoder.final_layernorm", "final_norm"),
        ),
        head="transformer.output_layer.weight",
        ignored=("rotary_pos_emb.inv_freq",),
    ),
    "chatglm_6b": Family(
        "ChatGLMModel",
        "transformer.",
        (
            Stored("word_embeddings.weight", ("embedding.tokens",)),
            *_glm_layers("layers.{n}.", "heads"),
            *_norm("final_layernorm", "final_norm"),
        ),
        ignored=("rotary_emb.inv_freq",),
        head_always=True,
    ),
    "glm_1": Family(
        "GLMForConditionalGeneration",
        "",
        (
            Stored("word_embeddings.weight", ("embedding.tokens",)),
            Stored("transformer.position_embeddings.weight", ("embedding.positions",)),
            Stored("transformer.block_position_embeddings.weight", ("embedding.block_positions",)),
            *_glm_layers("transformer.layers.{n}.", "rows"),
            *_norm("transformer.final_layernorm", "final_norm"),
        ),
        outer="glm.",
    ),
}
"""Kind of model (the model_type of config.json, or as `config.kind_from` tells) -> family. `chatglm` is ChatGLM2-6B, ChatGLM3-6B and
GLM-4-9B in THUDM's naming, `chatglm_6b` the first ChatGLM-6B, `glm_1` the GLM of arXiv:2103.10360."""


Shapes = dict[str, tuple[int, ...]]
"""Logical name -> shape."""


class Part(NamedTuple):
    """The place of a logical tensor in a stored one."""

    stored: str
    """Name of the stored tensor, with prefix."""
    shape: tuple[int, ...]
    """Shape of the stored tensor."""
    row: Stored
    place: int
    """Index of the logical tensor among those in the stored one."""
    start: int
    """With join=rows: the first row of the logical tensor in the stored one (after transposing back)."""
    heads: int
    """With join=heads: number of attention heads."""

    def read(self, stored: torch.Tensor, box: Box) -> torch.Tensor:
        """A box of the logical tensor, read from the stored one without touching its other elements."""
        whole = stored.t() if self.row.transposed and stored.dim() == 2 else stored
        rows, others = box[0], tuple(box[1:])
        if self.row.join == "rows":
            place: Box = (slice(self.start + rows.start, self.start + rows.stop), *others)
            return whole[place]
        of = len(self.row.of)
        d = whole.shape[0] // (self.heads * of)
        mine = whole.view(self.heads, of, d, *whole.shape[1:])[:, self.place]
        first, last = rows.start // d, -(-rows.stop // d)
        place = (slice(rows.start - first * d, rows.stop - first * d), *others)
        return mine[first:last].reshape(-1, *whole.shape[1:])[place]


def rows_of(family: Family, names: Collection[str], layers: int) -> Iterator[Stored]:
    """The rows that apply to a model with these logical tensors and so many layers, layer by layer, with prefixes. Raises ContentError
    for a tensor that the family has no row for."""
    known = set(names)
    placed: set[str] = set()
    first = next((i for i, row in enumerate(family.rows) if "{n}" in row.name), len(family.rows))
    last = max((i + 1 for i, row in enumerate(family.rows) if "{n}" in row.name), default=first)
    repeated = [_of_layer(row, n) for n in range(layers) for row in family.rows[first:last]]
    for row in (*family.rows[:first], *repeated, *family.rows[last:]):
        if known.issuperset(row.of):
            placed.update(row.of)
            yield row._replace(name=family.prefix + row.name)
    if "head.weight" in known:
        placed.add("head.weight")
        yield Stored(family.head, ("head.weight",))
    elif family.head_always:
        yield Stored(family.head, ("embedding.tokens",))
    lost = sorted(known - placed)
    if lost:
        raise ContentError(
            f"{family.architecture} has no place for {len(lost)} of the model's tensors: {', '.join(lost[:4])}. "
            "The model section of the config gives what this family does not have."
        )


def parts_of(family: Family, shapes: Shapes, model: ModelConfig) -> dict[str, Part]:
    """The place of each logical tensor of a model. Raises ContentError as `rows_of` does."""
    found: dict[str, Part] = {}
    for row in rows_of(family, shapes, model.num_layers):
        start = 0
        rows = sum(shapes[name][0] for name in row.of)
        shape = (rows, *shapes[row.of[0]][1:])
        stored = shape[::-1] if row.transposed else shape
        for index, name in enumerate(row.of):
            found.setdefault(name, Part(row.name, stored, row, index, start, model.num_attention_heads))
            start += shapes[name][0]
    return found


def joined(row: Stored, parts: list[torch.Tensor], heads: int) -> torch.Tensor:
    """The stored tensor made of its logical ones, contiguous."""
    if row.join == "heads":
        by_head = [part.view(heads, -1, *part.shape[1:]) for part in parts]
        return torch.stack(by_head, 1).reshape(-1, *parts[0].shape[1:])
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (whole.t() if row.transposed and whole.dim() == 2 else whole).contiguous()


def _of_layer(row: Stored, n: int) -> Stored:
    """The row for layer n."""
    number = str(n)
    return row._replace(name=row.name.replace("{n}", number), of=tuple(name.replace("{n}", number) for name in row.of))
