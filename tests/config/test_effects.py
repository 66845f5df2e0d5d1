"""What is given and cannot have an effect is refused, with what it hangs on; where it can, it is taken."""

from dataclasses import replace

import pytest
import yaml

from megatrain.config.keys import knobs
from megatrain.config.load import dump, from_dict, load, load_overrides
from megatrain.config.schema import Config, ModelConfig
from megatrain.config.source import ConfigError
from megatrain.config.validate import validate

ROPE, GLM = {"model.position": "rope"}, {"data.objective": "glm", "data.tokenizer": "bytes"}
LONGER = {**ROPE, "model.rope_factor": 4.0}
PROMPTS = {"log.samples.prompts": ["a"], "data.tokenizer": "bytes"}
DRAWN = {**PROMPTS, "log.samples.temperature": 0.5}
TASKS = {"eval.tasks": ["quiz_en"], "data.tokenizer": "bytes"}
CASES = [
    # key, a value, what it hangs on as it is by default, and others beside which it has an effect
    ("model.max_positions", 512, None, {}),
    ("model.deepnorm_alpha", 2.0, "model.norm_placement=pre", {"model.norm_placement": "deepnorm"}),
    ("model.rope_theta", 5e5, "model.position=learned", ROPE),
    ("model.rope_fraction", 0.5, "model.position=learned", ROPE),
    ("model.rope_interleaved", True, "model.position=learned", {"model.position": "rope_2d"}),
    ("model.rope_angle_dtype", "fp16", "model.position=learned", ROPE),
    ("model.rope_scaling", "linear", "model.position=learned and model.rope_factor=1.0", LONGER),
    ("model.rope_factor", 2.0, "model.position=learned and model.rope_scaling=none", {**ROPE, "model.rope_scaling": "yarn"}),
    (
        "model.rope_original_length",
        64,
        "model.position=learned and model.rope_factor=1.0 and model.rope_scaling=none",
        {**LONGER, "model.rope_scaling": "llama3"},
    ),
    (
        "model.rope_low_freq_factor",
        2.0,
        "model.position=learned and model.rope_factor=1.0 and model.rope_scaling=none",
        {**LONGER, "model.rope_scaling": "llama3"},
    ),
    (
        "model.rope_high_freq_factor",
        8.0,
        "model.position=learned and model.rope_factor=1.0 and model.rope_scaling=none",
        {**LONGER, "model.rope_scaling": "llama3"},
    ),
    (
        "model.rope_beta_fast",
        16.0,
        "model.position=learned and model.rope_factor=1.0 and model.rope_scaling=none",
        {**LONGER, "model.rope_scaling": "yarn"},
    ),
    (
        "model.rope_beta_slow",
        2.0,
        "model.position=learned and model.rope_factor=1.0 and model.rope_scaling=none",
        {**LONGER, "model.rope_scaling": "yarn"},
    ),
    ("parallel.zero_ranks", 1, None, {}),
    ("log.slow_ratio", 2.0, None, {}),
    ("log.slow_intervals", 4, None, {}),
    ("parallel.reduce_dtype", "bf16", None, {}),
    ("model.window_pattern", ("local", "global"), "model.window=null", {"model.window": 16}),
    ("model.sparse_local_blocks", 2, "model.sparse_block=null", {"model.sparse_block": 16}),
    ("model.sparse_global_blocks", 0, "model.sparse_block=null", {"model.sparse_block": 16}),
    ("model.softmax_fp32", False, "model.position=learned and train.precision=bf16", {"model.position": "alibi"}),
    ("model.residual_fp32", True, None, {}),
    ("model.init_std", 0.01, None, {}),
    ("model.embedding_grad_steps", [10, 10], "model.embedding_grad_scale=1.0", {"model.embedding_grad_scale": 0.1}),
    (
        "parallel.layer_split",
        [8],
        "parallel.pipeline_parallel_size=1 and parallel.virtual_pipeline_size=1",
        {"parallel.layer_split": [4, 4], "parallel.virtual_pipeline_size": 2, "parallel.schedule": "interleaved"},
    ),
    ("data.glm.objective_mix.mode", "weighted", "data.objective=next_token", GLM),
    ("data.glm.objective_mix.blank", 0.6, "data.objective=next_token", GLM),
    ("data.glm.objective_mix.sentence", 0.6, "data.objective=next_token", GLM),
    ("data.glm.objective_mix.document", 0.6, "data.objective=next_token", GLM),
    (
        "data.glm.objective_granularity",
        "sample",
        "data.objective=next_token and data.glm.objective_mix.mode=sample",
        GLM,
    ),
    ("data.glm.blank.mask_ratio", 0.3, "data.objective=next_token", GLM),
    ("data.glm.blank.poisson_lambda", 2.0, "data.objective=next_token", GLM),
    ("data.glm.blank.min_span", 2, "data.objective=next_token", GLM),
    ("data.glm.blank.max_span", 9, "data.objective=next_token", GLM),
    ("data.glm.blank.min_gap", 2, "data.objective=next_token", GLM),
    ("data.glm.blank.overflow", "clip", "data.objective=next_token", GLM),
    ("data.glm.blank.on_unplaceable", "redraw", "data.objective=next_token", GLM),
    ("data.glm.blank.span_layout", "uniform", "data.objective=next_token", GLM),
    ("data.glm.blank.single_span_prob", 0.1, "data.objective=next_token", GLM),
    (
        "data.glm.blank.decoder_noise_prob",
        0.1,
        "data.objective=next_token and data.glm.objective_mix.blank=0.5 and data.glm.blank.single_span_prob=0.0",
        GLM,
    ),
    ("data.glm.document.min_ratio", 0.25, "data.objective=next_token and data.glm.objective_mix.document=0.2", GLM),
    ("data.glm.document.max_ratio", 0.75, "data.objective=next_token and data.glm.objective_mix.document=0.2", GLM),
    ("data.glm.document.reserve_tokens", 4, "data.objective=next_token and data.glm.objective_mix.document=0.2", GLM),
    ("data.glm.document.suffix_prob", 1.0, "data.objective=next_token and data.glm.objective_mix.document=0.2", GLM),
    (
        "data.glm.document.length_granularity",
        "sample",
        "data.objective=next_token and data.glm.objective_mix.document=0.2",
        GLM,
    ),
    ("data.glm.sentence.mask_ratio", 0.3, "data.objective=next_token and data.glm.objective_mix.sentence=0.3", GLM),
    (
        "data.glm.sentence.end_chars",
        ".",
        "data.objective=next_token and data.glm.objective_mix.sentence=0.3 and data.glm.short_seq_prob=0.0",
        GLM,
    ),
    *((f"data.glm.tokens.{name}", 300, "data.objective=next_token", GLM) for name in ("cls", "eos", "mask", "sop", "eop")),
    *(
        (f"data.glm.tokens.{name}", 300, "data.objective=next_token and data.glm.task_masks=true", GLM)
        for name in ("gmask", "smask")
    ),
    (
        "data.glm.tokens.noise",
        300,
        "data.objective=next_token and data.glm.blank.decoder_noise_prob=0.0",
        {**GLM, "data.glm.blank.decoder_noise_prob": 0.1},
    ),
    ("data.glm.text_length", 100, "data.objective=next_token", GLM),
    ("data.glm.shuffle_spans", False, "data.objective=next_token", GLM),
    ("data.glm.task_masks", False, "data.objective=next_token", GLM),
    ("data.glm.position_dim1", "original_start", "data.objective=next_token", GLM),
    (
        "data.glm.position_dim2",
        False,
        "data.objective=next_token and model.position=learned",
        {**GLM, "model.position": "learned_2d"},
    ),
    ("data.glm.short_seq_prob", 0.1, "data.objective=next_token", GLM),
    ("data.glm.loss_norm", "microbatch", "data.objective=next_token", GLM),
    ("optim.min_lr", 0.0, None, {}),
    ("optim.decay_fraction", 0.2, "optim.lr_schedule=cosine", {"optim.lr_schedule": "wsd"}),
    ("optim.master", "split", None, {}),
    ("optim.betas", [0.9, 0.99], None, {"optim.name": "adam"}),
    ("optim.eps", 1e-6, None, {}),
    ("optim.momentum", 0.8, "optim.name=adamw", {"optim.name": "sgd"}),
    ("train.steps", 500, None, {}),
    *(
        (f"train.{name}", 16, "train.precision=bf16", {"train.precision": "fp16"})
        for name in ("loss_scale", "loss_scale_window", "loss_scale_hysteresis", "loss_scale_min")
    ),
    *(
        (f"train.{name}", value, "train.on_spike=warn", {"train.on_spike": "rollback"})
        for name, value in (("spike_window", 5), ("spike_warmup_steps", 9), ("spike_retries", 1))
    ),
    (
        "train.spike_remedy",
        "shrink_embedding_gradient",
        "train.on_spike=warn and train.spike_warmup_steps=20",
        {"train.on_spike": "rollback"},
    ),
    ("checkpoint.keep_every", 100, None, {}),
    ("checkpoint.in_memory_peer", False, "checkpoint.in_memory_every=0", {"checkpoint.in_memory_every": 5}),
    ("checkpoint.weights_only", True, "checkpoint.resume=auto", {"checkpoint.resume": "runs/other"}),
    *((f"log.samples.{name}", value, "log.samples.prompts=[]", PROMPTS) for name, value in (("every", 5), ("max_tokens", 9))),
    ("log.samples.temperature", 0.7, "log.samples.prompts=[]", PROMPTS),
    ("log.samples.top_p", 0.9, "log.samples.prompts=[] and log.samples.temperature=0.0", DRAWN),
    ("log.samples.seed", 3, "log.samples.prompts=[] and log.samples.temperature=0.0", DRAWN),
    *((f"eval.{name}", value, "eval.tasks=[]", TASKS) for name, value in (("every", 5), ("limit", 9), ("num_fewshot", 2))),
]
TURNED_OFF = [
    ("model.residual_fp32", True, {"train.precision": "fp32"}, "train.precision=fp32"),
    ("model.rope_scaling", "yarn", ROPE, "model.position=rope and model.rope_factor=1.0"),
    ("model.rope_factor", 4.0, ROPE, "model.position=rope and model.rope_scaling=none"),
    ("model.rope_beta_fast", 16.0, {**LONGER, "model.rope_scaling": "llama3"}, "and model.rope_scaling=llama3"),
    ("model.init_std", 0.01, {"model.init": "fan_in"}, "model.init=fan_in and model.embedding_init_std=null"),
    ("model.init_std", 0.01, {"model.init": "xavier", "model.embedding_init_std": 0.02}, "model.embedding_init_std=0.02"),
    ("data.glm.objective_granularity", "sample", {**GLM, "data.glm.objective_mix.mode": "weighted"}, "mode=weighted"),
    ("data.glm.document.suffix_prob", 1.0, {**GLM, "data.glm.objective_mix.document": 0}, "document=0.0"),
    ("data.glm.tokens.gmask", 300, {**GLM, "data.glm.task_masks": False}, "data.glm.task_masks=false"),
    ("optim.min_lr", 0.0, {"optim.lr_schedule": "constant"}, "optim.lr_schedule=constant"),
    ("optim.master", "split", {"train.precision": "fp32"}, "train.precision=fp32"),
    ("parallel.reduce_dtype", "bf16", {"train.precision": "fp64"}, "train.precision=fp64"),
    ("optim.betas", [0.9, 0.99], {"optim.name": "sgd"}, "optim.name=sgd"),
    ("parallel.zero_ranks", 1, {"parallel.zero_stage": 0}, "parallel.zero_stage=0"),
    ("log.slow_ratio", 2.0, {"log.stragglers_every": 0}, "log.stragglers_every=0"),
    ("log.slow_intervals", 4, {"log.stragglers_every": 0}, "log.stragglers_every=0"),
    ("optim.eps", 1e-6, {"optim.name": "sgd"}, "optim.name=sgd"),
    ("train.steps", 500, {"train.tokens": 1e9}, "train.tokens=1000000000.0"),
    (
        "train.spike_remedy",
        "shrink_embedding_gradient",
        {"train.on_spike": "rollback", "train.spike_warmup_steps": 0},
        "train.spike_warmup_steps=0",
    ),
    ("checkpoint.keep_every", 100, {"checkpoint.keep": 0}, "checkpoint.keep=0"),
    ("checkpoint.weights_only", True, {"checkpoint.resume": "never"}, "checkpoint.resume=never"),
]
"""Others that have an effect by default, or not beside these values."""


def tree_of(values):
    tree = {"model": {"vocab_size": 400}, "data": {"train": "PREFIX"}}
    for key, value in values.items():
        *groups, name = key.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return tree


def test_every_knob_that_has_not_always_an_effect_is_tried():
    assert {knob.key for knob in knobs() if knob.effect is not None} == {key for key, *_ in CASES}


@pytest.mark.parametrize(("key", "value", "hangs_on", "beside"), CASES, ids=[case[0] for case in CASES])
def test_what_is_given_has_an_effect_or_is_refused(key, value, hangs_on, beside):
    validate(from_dict(tree_of({key: value, **beside})), 1)
    if hangs_on is None:
        return
    with pytest.raises(ConfigError) as raised:
        validate(from_dict(tree_of({key: value})), 1)
    (knob,) = (knob for knob in knobs() if knob.key == key)
    said = str(raised.value)
    assert said.startswith(f"{key}=") and said.endswith(".") and "\n" not in said
    assert f" has no effect: it has one when {knob.effect.words}, and here {hangs_on}. Change that, or leave {key} out" in said


@pytest.mark.parametrize(("key", "value", "beside", "here"), TURNED_OFF)
def test_what_others_turn_off_is_refused(key, value, beside, here):
    validate(from_dict(tree_of(beside)), 1)
    with pytest.raises(ConfigError, match=rf"^{key}=.* has no effect: .*{here}\. Change that"):
        validate(from_dict(tree_of({key: value, **beside})), 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"train": [{"path": "P", "set": "web"}]},
            r"data\.train\[0\]\.set=web has no effect: only held-out text is told apart",
        ),
        ({"train": "P", "valid": [{"path": "V", "weight": 0.5}]}, r"data\.valid\[0\]\.weight=0\.5 has no effect: of held-out"),
    ],
)
def test_what_a_corpus_says_in_vain_is_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        validate(from_dict({"model": {"vocab_size": 101}, "data": data}), 1)


def test_the_whole_message():
    with pytest.raises(ConfigError) as raised:
        validate(from_dict(tree_of({"model.rope_scaling": "linear", "model.rope_factor": 4.0})), 1)
    assert str(raised.value) == (
        "model.rope_scaling=linear has no effect: it has one when model.position is rope or rope_2d, and model.rope_factor is "
        "above 1, and here model.position=learned and model.rope_factor=4.0. Change that, or leave model.rope_scaling out (its "
        "default is none)."
    )


def test_defaults_pass_however_they_are_given(tmp_path):
    for text in (dump(Config()), dump(from_dict({"optim": {"name": "sgd"}, "train": {"precision": "fp32"}}))):
        file = tmp_path / "whole.yaml"
        file.write_text(text)
        validate(load(file, ["data.train=PREFIX", "data.tokenizer=bytes"]).config, 1)


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"preset": "llama3.1_8b", "position": "learned"}, {"rope_theta": 10000.0, "rope_scaling": "none", "rope_factor": 1.0}),
        ({"preset": "chatglm_6b", "norm_placement": "pre"}, {"deepnorm_alpha": None}),
        ({"preset": "qwen3_8b", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"preset": "llama2_7b", "rope_scaling": "yarn", "rope_factor": 2.0}, {"rope_scaling": "yarn"}),
    ],
)
def test_a_presets_keys_without_effect_are_left_at_their_defaults_and_the_saved_config_loads(tmp_path, given, left):
    file, again = tmp_path / "run.yaml", tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model": given, "data": {"train": "PREFIX"}}))
    loaded = load(file)
    validate(loaded.config, 1)
    assert {key: getattr(loaded.config.model, key) for key in left} == left
    again.write_text(dump(loaded.config, loaded.origins))
    assert load(again).config == loaded.config
    validate(load(again).config, 1)


def test_what_comes_with_first_weights_is_nobodys_mistake():
    came = {"position": "rope", "rope_scaling": "linear", "rope_factor": 1.0, "max_positions": 64, "residual_fp32": True}
    tree = {"model": {"init_from": "HERE", "seq_length": 128}, "train": {"precision": "fp32"}, "data": {"train": "P"}}
    model = from_dict(tree, lambda path: came).model
    assert (model.position, model.rope_scaling, model.residual_fp32) == ("rope", "none", False)
    assert (model.max_positions, model.positions) == (None, 128)  # rotary positions go on for ever
    with pytest.raises(ConfigError, match=r"^model\.residual_fp32=true has no effect"):
        validate(from_dict({**tree, "model": {**tree["model"], "residual_fp32": True, "vocab_size": 9}}, lambda path: came), 1)


def test_overrides_of_a_saved_config_have_an_effect_and_the_saved_values_may_have_none():
    saved = replace(Config(), model=ModelConfig(rope_theta=5e5))  # of an earlier release
    assert load_overrides(saved, ["train.micro_batch_size=2"]).model.rope_theta == 5e5
    with pytest.raises(ConfigError, match=r"^command line: data\.glm\.text_length=64 has no effect"):
        load_overrides(saved, ["data.glm.text_length=64"])
