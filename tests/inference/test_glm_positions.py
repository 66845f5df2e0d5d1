"""What a GLM may see: changing any token that a position must not see leaves its logits bit-identical; one that it may, changes them."""

from dataclasses import replace

import pytest
import torch

from megatrain.assembly import objective_of
from megatrain.config.glm_data import GlmConfig, ObjectiveMix
from megatrain.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from megatrain.data.loader import Loader
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.parallel.mesh import ParallelContext, Rows
from megatrain.testing.trace import random_source
from megatrain.training import Model, to_micro_batches

V, S = 97, 48
SHAPES = {
    "glm-1": {"position": "learned_2d"},
    "chatglm-6b": {"position": "rope_2d", "norm_placement": "deepnorm"},
    "glm-130b": {"position": "rope", "norm_placement": "deepnorm", "activation": "geglu"},
    "alibi": {"position": "alibi"},
}
KINDS = ("blank", "sentence", "document")


def model_of(shape):
    return ModelConfig(
        family="glm",
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=S,
        vocab_size=V,
        init_std=0.15,
        **SHAPES[shape],
    )


def batch_of(shape, kind, packed):
    """(a whole model, a micro-batch of its objective, with documents apart where `packed`)."""
    mix = ObjectiveMix(**{name: float(name == kind) for name in KINDS})
    data = DataConfig(objective="glm", glm=GlmConfig(objective_mix=mix), isolate_documents=packed, tokenizer="any")
    config = Config(
        model=model_of(shape), data=data, train=TrainConfig(global_batch_size=3, micro_batch_size=3, precision="fp64")
    )
    ctx = ParallelContext.single()
    chunks = build_gpt(Build(Rows(ctx.tp), torch.float64, ctx.device, config.model, V, seed=1))
    samples, compose = random_source(config, V)
    batch = Loader(samples, 3, 3, 0, 1, compose=compose).build(0)
    (micro_batch,) = to_micro_batches(batch, Model(config, ctx, chunks, objective_of(config)))
    return chunks[0].eval(), micro_batch


def may_see(batch, sequence):
    """[s, s] from the definition: its own document, and of that part A, or what comes before."""
    seen = torch.zeros(S, S, dtype=torch.bool)
    prefix, documents = batch.mask.prefix, batch.mask.documents
    for q in range(S):
        for k in range(S):
            end = prefix[sequence] if prefix.dim() == 1 else prefix[q, sequence]
            same = documents is None or bool(documents[q, sequence] == documents[k, sequence])
            seen[q, k] = same and (k < end or k <= q)
    return seen


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_leaks(shape, kind, packed):
    model, batch = batch_of(shape, kind, packed)
    assert batch.loss_weights.any()
    with torch.no_grad():
        before = model.head.logits(model(None, batch))
        for sequence in range(3):
            seen = may_see(batch, sequence)
            for k in range(S):
                tokens = batch.tokens.clone()
                tokens[k, sequence] = (tokens[k, sequence] + 41) % V
                after = model.head.logits(model(None, replace(batch, tokens=tokens)))
                same = (after[:, sequence] == before[:, sequence]).all(-1)
                assert torch.equal(same, ~seen[:, k]), (sequence, k)
                others = [n for n in range(3) if n != sequence]
                assert torch.equal(after[:, others], before[:, others])
