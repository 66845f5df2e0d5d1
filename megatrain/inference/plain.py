"""`megatrain.load`: a plain module in one process, from a Hugging Face directory or a checkpoint.

model = megatrain.load("runs/demo/checkpoints")       # or a directory with config.json and safetensors files
logits = model(input_ids)                             # [b, s] -> [b, s, v]
logits = model(input_ids, position_ids, sep)          # GLM: positions [b, 2, s]; [b] number of first tokens that all tokens see
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatrain.checkpoint.load import find
from megatrain.checkpoint.load import load as load_checkpoint
from megatrain.checkpoint.manifest import WEIGHTS, read_manifest
from megatrain.companions import tokenizer_of
from megatrain.config.schema import Config, ModelConfig
from megatrain.data.samples.sentinels import resolve
from megatrain.huggingface.config import kind_from
from megatrain.huggingface.model_files import is_hf, load_hf, read_config
from megatrain.inference.glm_positions import Marks, causal_places, places_of
from megatrain.inference.trained import saved_config, vocab_size_of
from megatrain.init_from import config_of_hf, declared
from megatrain.kernels.attention_mask import AttentionMask
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import GPT, build_gpt
from megatrain.models.layers import Build
from megatrain.parallel.mesh import ParallelContext, Rows
from megatrain.parallel.portion import Portion


class PlainModel(nn.Module):
    """A model as a function of token ids; its parameters have the logical names.

    Embedding and head may have extra rows of zeros after the vocabulary, which get no gradient (`padded`, parallel/param.py).
    """

    def __init__(self, gpt: GPT, config: ModelConfig, marks: Marks | None = None) -> None:
        """marks: tokens that determine positions and prefix where these are not given (ChatGLM-6B, and GLM's own training)."""
        super().__init__()
        self.gpt, self.config, self.marks = gpt, config, marks

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, sep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[b, s] int64 -> logits [b, s, v]. Raises ValueError for more tokens than positions, and where weights were cast since `load`.

        position_ids: [b, 2, s], in the text and within a blank; sep: [b] number of first tokens that all tokens see. Without them they
        follow from the marks, if the model has any; else the text is read from left to right.
        """
        dtype = self.gpt.build.dtype
        for parameter in self.gpt.logical_parameters():
            if parameter.dtype != dtype:
                raise ValueError(
                    f"{parameter.spec.name} is {parameter.dtype}, and this model was loaded to compute in {dtype}, which no cast changes "
                    f"afterwards: megatrain.load(PATH, dtype={parameter.dtype})"
                )
        b, s = input_ids.shape
        if s > self.config.position_rows:
            raise ValueError(f"{s} tokens are more than the model's {self.config.position_rows} (model.max_positions)")
        places = causal_places(input_ids)
        if self.marks is not None:
            places = places_of(input_ids, self.marks, self.config.two_dimensional)
        positions, inside = (places.positions, places.block_positions) if position_ids is None else position_ids.unbind(1)
        prefix = places.sep if sep is None else sep
        tokens = input_ids.t().contiguous()
        weights = torch.ones(s, b, device=tokens.device)
        mask = AttentionMask(prefix=prefix if bool(prefix.any()) else None)
        samples = torch.arange(b, device=tokens.device)
        batch = MicroBatch(tokens, tokens, weights, positions.t(), samples, mask=mask, block_positions=inside.t())
        head = self.gpt.head
        if head is None:
            raise ValueError("this part of a model has no head")
        return head.local_logits(self.gpt(None, batch)).transpose(0, 1)


def load(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> PlainModel:
    """The model at `path`, to be called or trained like any torch module.

    path: a Hugging Face directory, a checkpoint, a directory of checkpoints or of a run. dtype: of weights and activations, chosen here
    once and for all: the module refuses to run after `.double()`, `.half()` or another cast. Raises CheckpointError.
    """
    path, ctx = Path(path), ParallelContext.single(torch.device(device))
    if is_hf(path):
        model = config_of_hf(path).model
        declared(path, model, model.vocab_size or 0)
        gpt = _empty(model, model.vocab_size or 0, ctx, dtype)
        portions = _portions(gpt)
        load_hf(path, model, portions, {name: portion.spec.shape for name, portion in portions.items()}, ctx)
        return PlainModel(gpt, model, marks_of_hf(read_config(path))).eval()
    path = find(path)
    config = saved_config(path)
    vocab_size = vocab_size_of(read_manifest(path))
    gpt = _empty(config.model, vocab_size, ctx, dtype)
    load_checkpoint(path, {WEIGHTS: _portions(gpt)}, ctx)
    return PlainModel(gpt, config.model, marks_of(config, vocab_size)).eval()


def marks_of_hf(config: dict[str, Any]) -> Marks | None:
    """The marks of the first ChatGLM-6B, which its config.json has; None for other models, which read from left to right."""
    names = ("bos_token_id", "gmask_token_id", "mask_token_id")
    if kind_from(config) != "chatglm_6b" or not all(isinstance(config.get(name), int) for name in names):
        return None
    return Marks(*(config[name] for name in names))


def marks_of(config: Config, vocab_size: int) -> Marks | None:
    """The marks of a run with data.objective=glm, else None. Raises TokenizerError if its tokenizer is no longer there."""
    if config.data.objective != "glm":
        return None
    ids, _ = resolve(config.data.glm, tokenizer_of(config), vocab_size)
    return Marks(ids.sop, ids.gmask, ids.mask)


def _empty(model: ModelConfig, vocab_size: int, ctx: ParallelContext, dtype: torch.dtype) -> GPT:
    return build_gpt(Build(Rows(ctx.tp), dtype, ctx.device, model, vocab_size, seed=0))[0]


def _portions(gpt: GPT) -> dict[str, Portion]:
    return {p.spec.name: Portion.whole(p.spec, p) for p in gpt.logical_parameters()}
