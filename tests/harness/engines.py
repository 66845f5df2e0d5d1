"""Small models with random weights, as engines."""

import torch

from megatrain.config.schema import ModelConfig
from megatrain.inference.engine import Engine, EngineSettings
from megatrain.inference.paged_model import ForwardModel
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.parallel.mesh import ParallelContext, Rows
from megatrain.parallel.pipeline_parallel import Unsharded
from megatrain.parallel.schedules import Schedule

SMALL = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": 24, "init_std": 0.5}


def weights_of(ctx=None, vocab_size=5, dtype=torch.float32, **model):
    """This rank's share of a model, whose layers are dealt evenly to the stages."""
    ctx, config = ctx or ParallelContext.single(), ModelConfig(**{**SMALL, **model})
    stages = ctx.pp.size
    each = config.num_layers // stages
    pieces = [range(stage * each, (stage + 1) * each) for stage in range(stages)]
    build = Build(Rows(ctx.tp), dtype, ctx.device, config, vocab_size, seed=7)
    chunks = [chunk.eval() for chunk in build_gpt(build, pieces, tuple(range(stages)), ctx.pp.rank)]
    return ForwardModel(ctx, chunks, Schedule("1f1b", stages, 1, 1, backward=False), Unsharded())


def engine_of(weights=None, codec=None, *, vocab_size=5, **settings):
    """An engine over them."""
    return Engine(weights or weights_of(vocab_size=vocab_size), codec, EngineSettings(**{"cache_tokens": 4096, **settings}))
