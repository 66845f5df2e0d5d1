"""A checkpoint of a tiny model with random weights, and the arguments of `megatrain generate`."""

import argparse

import torch

from megatrain.checkpoint.save import Contents, save
from megatrain.config.load import dump, from_dict
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.parallel.mesh import MeshShape, ParallelContext, Rows
from megatrain.parallel.portion import Portion
from megatrain.testing import simulate
from megatrain.verbs.prompt_rows import Wishes

ONE, SINGLE = MeshShape(), ParallelContext.single()


def config_of(**model):
    shape = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 24,
        "vocab_size": 261,
        "init_std": 0.4,
        "dropout": 0.5,
    }
    return from_dict({"model": {**shape, **model}, "data": {"tokenizer": "bytes"}, "train": {"precision": "fp32"}})


def model_of(config, ctx=SINGLE):
    return whole_gpt(config.model, config.model.vocab_size, ctx).eval()


def whole_gpt(model, vocab_size, ctx):
    return build_gpt(Build(Rows(ctx.tp), torch.float32, ctx.device, model, vocab_size, seed=7))[0]


def saved(directory, config, layout=ONE, dtype=torch.float32):
    """A run's checkpoint, saved under a layout."""

    def write(ctx):
        parameters = model_of(config, ctx).logical_parameters()
        weights = {p.spec.name: Portion.whole(p.spec, p.detach().to(dtype)) for p in parameters}
        return save(directory / "checkpoints", Contents(5, {}, dump(config)), {"weights": weights}, ctx)

    return simulate(layout, write)[0]


def arguments(checkpoint, prompt="ab", **more):
    """Those of the command line; prompt: a text, or several."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    where = {"prompt": prompts, "input": None, "output": None, "chat": False, "chat_template": None, "system": None}
    defaults = {**vars(Wishes(max_tokens=12, seed=3)), "tokenizer": None, "eod": None, "bos": None, "overrides": []}
    return argparse.Namespace(checkpoint=str(checkpoint), **{**where, **defaults, **more})
