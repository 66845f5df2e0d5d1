import pytest
import torch

from megatrain.assembly import layer_pieces
from megatrain.config.load import from_dict
from megatrain.data.tokenizer import load_tokenizer
from megatrain.evaluation.subject import Subject, blank_tokens
from megatrain.inference.engine import Engine, EngineSettings
from megatrain.inference.paged_model import ForwardModel
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.parallel.mesh import ParallelContext, Rows
from megatrain.parallel.pipeline_parallel import Unsharded
from megatrain.training import schedule_of

CTX = ParallelContext.single()
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 272, "init_std": 0.4}


def made(model, data, ctx=CTX, **settings):
    """A model with weights of a large spread that reads bytes, ready to be asked."""
    layout = {"tensor_parallel_size": ctx.tp.size, "pipeline_parallel_size": ctx.pp.size}
    sections = {"model": {**SHAPE, **model}, "data": {"tokenizer": "bytes", **data}, "parallel": layout}
    config, codec = from_dict({**sections, "train": {"precision": "fp32"}}), load_tokenizer("bytes")
    build = Build(Rows(ctx.tp), torch.float32, ctx.device, config.model, 272, seed=7)
    chunks = build_gpt(build, *layer_pieces(config, 272), ctx.pp.rank)
    weights = ForwardModel(ctx, [chunk.eval() for chunk in chunks], schedule_of(config, 1, backward=False), Unsharded())
    engine = Engine(weights, codec, EngineSettings(cache_tokens=16384, **settings))
    return Subject(engine, codec, ctx, blank_tokens(config, codec, engine.vocab_size))


@pytest.fixture(scope="package")
def gpt():
    """A model that reads from left to right, 256 positions."""
    return made({"seq_length": 256}, {})


@pytest.fixture(scope="package")
def glm():
    """A model that fills blanks, 128 positions."""
    return made({"seq_length": 128, "family": "glm"}, {"objective": "glm"})


@pytest.fixture(scope="session")
def make_subject():
    """(keys of the model, of the data, settings of the engine) -> a model ready to be asked."""
    return made
