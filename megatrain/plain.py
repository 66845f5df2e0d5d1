"""`megatrain.load`: a plain module in one process, from a Hugging Face directory or a checkpoint.

model = megatrain.load("runs/demo/checkpoints")       # or a directory with config.json and safetensors files
logits = model(input_ids)                             # [b, s] -> [b, s, v]
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from megatrain.checkpoint.hf_files import is_hf, load_hf, model_keys
from megatrain.checkpoint.load import find
from megatrain.checkpoint.load import load as load_checkpoint
from megatrain.checkpoint.manifest import WEIGHTS, read_manifest
from megatrain.config.load import from_dict
from megatrain.config.schema import ModelConfig
from megatrain.generate import saved_config, vocab_size_of
from megatrain.kernels.attention_mask import causal_mask
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import GPT, build_gpt
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.portion import Portion


class PlainModel(nn.Module):
    """A model as a function of token ids; its parameters have the logical names."""

    def __init__(self, gpt: GPT, config: ModelConfig) -> None:
        super().__init__()
        self.gpt, self.config = gpt, config

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[b, s] int64 -> logits [b, s, v]. Raises ValueError beyond the range of positions."""
        b, s = input_ids.shape
        if s > self.config.seq_length:
            raise ValueError(f"{s} tokens are more than the model's {self.config.seq_length} (model.seq_length)")
        tokens = input_ids.t().contiguous()
        positions = torch.arange(s, device=tokens.device)[:, None].expand(s, b)
        weights = torch.ones(s, b, device=tokens.device)
        mask = causal_mask(self.config.window, self.config.sparse)
        batch = MicroBatch(tokens, tokens, weights, positions, torch.arange(b, device=tokens.device), mask=mask)
        head = self.gpt.head
        if head is None:
            raise ValueError("this part of a model has no head")
        return head.local_logits(self.gpt(None, batch)).transpose(0, 1)


def load(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> PlainModel:
    """The model at `path`, ready to be called or trained as any torch module; see PlainModel.

    path: a Hugging Face directory, a checkpoint, a directory of checkpoints or of a run. Raises CheckpointError.
    """
    path, ctx = Path(path), ParallelContext.single(torch.device(device))
    if is_hf(path):
        model = from_dict({"model": model_keys(path)}).model
        gpt = _empty(model, model.vocab_size or 0, ctx, dtype)
        portions = _portions(gpt)
        load_hf(path, model, portions, {name: portion.spec.shape for name, portion in portions.items()}, ctx)
        return PlainModel(gpt, model).eval()
    path = find(path)
    model = saved_config(path).model
    gpt = _empty(model, vocab_size_of(read_manifest(path)), ctx, dtype)
    load_checkpoint(path, {WEIGHTS: _portions(gpt)}, ctx)
    return PlainModel(gpt, model).eval()


def _empty(model: ModelConfig, vocab_size: int, ctx: ParallelContext, dtype: torch.dtype) -> GPT:
    pieces = [range(model.num_layers)]
    return build_gpt(model, vocab_size, ctx, pieces, [0], sequence_parallel=False, dtype=dtype, seed=0)[0]


def _portions(gpt: GPT) -> dict[str, Portion]:
    return {p.spec.name: Portion.whole(p.spec, p) for p in gpt.logical_parameters()}
