"""Every objective and shape of the GLM family trains to the same numbers under an all-pairs cover of layouts."""

from dataclasses import replace
from functools import lru_cache

import pytest

from megatrain.config.load import from_dict
from megatrain.testing.layouts import Layout, covering, every_layout
from megatrain.verbs.verify import Verifier

ONE = {"blank": 0.0, "sentence": 0.0, "document": 0.0}
GLM1 = {"family": "glm", "num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 24, "vocab_size": 61}
GLM130B = {
    **GLM1,
    "position": "rope",
    "norm_placement": "deepnorm",
    "activation": "geglu",
    "init": "xavier",
    "embedding_grad_scale": 0.1,
    "embedding_grad_steps": [1, 2],
}
CHATGLM2 = {
    **GLM1,
    "position": "rope",
    "rope_interleaved": True,
    "rope_fraction": 0.5,
    "num_query_groups": 2,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "qkv_bias": True,
    "tied_embeddings": False,
}
CASES = {
    "blank, noisy, single": (
        GLM1,
        {"objective_mix": {**ONE, "blank": 1.0}, "blank": {"decoder_noise_prob": 0.2, "single_span_prob": 0.5}},
    ),
    "sentence": (GLM1, {"objective_mix": {**ONE, "sentence": 1.0}}),
    "document": (GLM1, {"objective_mix": {**ONE, "document": 1.0}, "loss_norm": "microbatch"}),
    "weighted": (GLM1, {"objective_mix": {"mode": "weighted", "blank": 1.0, "sentence": 0.5, "document": 2.0}}),
    "short": (GLM1, {"objective_mix": {**ONE, "blank": 1.0}, "short_seq_prob": 0.6}),
    "chatglm-6b": ({**GLM130B, "position": "rope_2d", "activation": "gelu_tanh"}, {"objective_granularity": "sample"}),
    "glm-130b": (
        GLM130B,
        {
            "objective_mix": {"blank": 0.3, "sentence": 0.0, "document": 0.7},
            "document": {"min_ratio": 0.0, "suffix_prob": 1.0, "length_granularity": "sample"},
        },
    ),
    "chatglm2": (CHATGLM2, None),
}


def config_of(case):
    model, glm = CASES[case]
    data = {"train": "random", "tokenizer": "bytes"} | ({} if glm is None else {"objective": "glm", "glm": glm})
    return from_dict(
        {
            "model": {**model, "dropout": 0.1, "init_std": 0.1},
            "data": data,
            "optim": {"lr": 1e-2, "warmup_steps": 1},
            "train": {"steps": 2, "global_batch_size": 16, "micro_batch_size": 2, "precision": "fp64"},
        }
    )


@lru_cache(maxsize=1)
def cover():
    """Layouts with every pair of values, of up to 8 ranks."""
    config = config_of("blank, noisy, single")
    legal = {tuple(vars(layout).values()): layout for layout in every_layout(8) if not layout.problem(config)}
    return [legal[point] for point in covering(list(legal), strength=2)]


def test_the_cover_has_every_kind_of_layout():
    layouts = cover()
    assert {layout.tp for layout in layouts} == {1, 2, 4} and {layout.pp for layout in layouts} >= {1, 2, 4}
    assert {layout.zero for layout in layouts} == {0, 1, 2, 3} and len({layout.schedule for layout in layouts}) == 5


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("case", CASES)
def test_every_pair_of_layouts(case, recompute):
    config = config_of(case)
    config = replace(config, train=replace(config.train, recompute=recompute))
    verifier = Verifier(config, 2, "fp64")
    third = ("none", "selective", "full").index(recompute)
    for layout in [layout for layout in cover() if not layout.problem(config)][third::3]:
        assert max(verifier.check(layout).values()) < 1e-8, layout


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_processes(case):
    verifier = Verifier(config_of(case), 2, "fp64")
    for name in ("tp2-sp-pp2-zb_v", "pp2-interleaved-dp2-zero3"):
        assert max(verifier.check(Layout.parse(name), processes=True).values()) < 1e-8
