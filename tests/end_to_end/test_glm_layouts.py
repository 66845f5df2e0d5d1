"""Every objective and shape of the GLM family trains to the same numbers: all pairs of a case, a recomputation and what makes a layout."""

from dataclasses import replace
from functools import cache
from itertools import product

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


RECOMPUTE = ("none", "selective", "full")


@cache
def layouts():
    """Layouts with every pair of values, of up to 8 ranks."""
    config = config_of("blank, noisy, single")
    legal = {tuple(vars(layout).values()): layout for layout in every_layout(8) if not layout.problem(config)}
    return [legal[point] for point in covering(list(legal), strength=2)]


@cache
def cover():
    """(case, recompute) -> layouts, so that every pair of values of a case, a recomputation and a layout occurs."""
    legal = {
        (case, recompute, *vars(layout).values()): layout
        for case in CASES
        for layout in layouts()
        if not layout.problem(config_of(case))
        for recompute in RECOMPUTE
    }
    chosen = {pair: [] for pair in product(CASES, RECOMPUTE)}
    for point in covering(list(legal), strength=2):
        chosen[point[:2]].append(legal[point])
    return chosen


def test_the_cover_has_every_kind_of_layout():
    found = layouts()
    assert {layout.tp for layout in found} == {1, 2, 4} and {layout.pp for layout in found} >= {1, 2, 4}
    assert {layout.zero for layout in found} == {0, 1, 2, 3} and len({layout.schedule for layout in found}) == 5
    of_a_case = {(case, layout.schedule) for (case, _), few in cover().items() for layout in few}
    assert of_a_case == set(product(CASES, {layout.schedule for layout in found}))
    assert all(cover().values())


def check(case, recompute, few):
    config = config_of(case)
    verifier = Verifier(replace(config, train=replace(config.train, recompute=recompute)), 2, "fp64")
    for layout in few:
        assert max(verifier.check(layout).values()) < 1e-8, layout


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("case", CASES)
def test_every_pair_of_a_case_and_its_layout(case, recompute):
    check(case, recompute, cover()[case, recompute])


@pytest.mark.slow
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("case", CASES)
def test_every_pair_of_layouts(case, recompute):
    few = [layout for layout in layouts() if not layout.problem(config_of(case))]
    check(case, recompute, few[RECOMPUTE.index(recompute) :: len(RECOMPUTE)])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_processes(case):
    verifier = Verifier(config_of(case), 2, "fp64")
    for name in ("tp2-sp-pp2-zb_v", "pp2-interleaved-dp2-zero3"):
        assert max(verifier.check(Layout.parse(name), processes=True).values()) < 1e-8
