"""Published shapes: exact parameter counts of built models, without memory, against those that were published."""

from dataclasses import replace

import pytest
import torch
import yaml

from megatrain.config.load import dump, from_dict, load, restored
from megatrain.config.presets import PRESETS
from megatrain.config.source import ConfigError
from megatrain.config.validate import validate_layout
from megatrain.models.gpt import GPT, logical_parameters
from megatrain.models.layers import Build
from megatrain.parallel.mesh import ParallelContext, Rows
from megatrain.runtime.flops import parameter_count

PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1.5b": 1_557_611_200,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3.1_8b": 8_030_261_248,
    "llama3.1_70b": 70_553_706_496,
    "llama3.1_405b": 405_853_388_800,
    "llama3.2_1b": 1_235_814_400,
    "llama3.2_3b": 3_212_749_824,
    "mistral_7b": 7_241_732_096,
    "qwen2_0.5b": 494_032_768,
    "qwen2_1.5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512,
    "qwen2_72b": 72_706_203_648,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "bloom_560m": 559_214_592,
    "bloom_1b1": 1_065_314_304,
    "bloom_1b7": 1_722_408_960,
    "bloom_3b": 3_002_557_440,
    "bloom_7b1": 7_069_016_064,
    "bloom_176b": 176_247_271_424,
    "glm_10b": 9_880_682_496,
    "chatglm_6b": 6_173_286_400,  # the embedding once
    "chatglm2_6b": 6_243_584_000,
    "chatglm3_6b": 6_243_584_000,
    "glm4_9b": 9_399_951_360,
}
"""As the model cards and the numbers of elements in the published weights say."""
ABOUT = {
    "gpt3_175b": (174_600e6, 1e-3),  # arXiv:2005.14165, table D.1
    "glm_base": (110e6, 1e-2),  # arXiv:2103.10360, section 3.1, and the model cards
    "glm_large": (335e6, 1e-2),
    "glm_410m": (410e6, 1e-2),
    "glm_515m": (515e6, 1e-2),
    "glm_2b": (2e9, 5e-2),
    "glm_130b": (130e9, 2e-2),  # arXiv:2210.02414
}
"""Rounded where they were published."""


def test_every_preset_is_checked():
    assert set(PRESETS) == {*PUBLISHED, *ABOUT}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_of_built_models(name):
    config = from_dict({"model": {"preset": name}})
    validate_layout(config, 1)
    meta, ctx = torch.device("meta"), ParallelContext.single()
    build = Build(Rows(ctx.tp), torch.bfloat16, meta, config.model, config.model.vocab_size, seed=0)
    model = GPT(build, range(1))  # blocks are alike
    assert all(p.is_meta for p in model.parameters())
    one_layer = sum(p.spec.numel for p in logical_parameters([model]))
    block = sum(p.spec.numel for p in model.stack.blocks[0].parameters())
    built = one_layer + (config.model.num_layers - 1) * block
    assert built == parameter_count(config.model, config.model.vocab_size)
    if name in PUBLISHED:
        assert built == PUBLISHED[name]
    else:
        published, within = ABOUT[name]
        assert built == pytest.approx(published, rel=within)


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].get("position", "learned")[:7] == "learned"])
def test_a_shorter_sequence_leaves_the_published_table_of_positions(name):
    whole, short = (from_dict({"model": {"preset": name, **more}}).model for more in ({}, {"seq_length": 128}))
    assert short.seq_length == 128 and short.positions == whole.positions == whole.seq_length
    assert parameter_count(short, whole.vocab_size) == parameter_count(whole, whole.vocab_size)


def test_what_was_saved_by_an_older_release_has_no_longer_table_than_it_had():
    text = dump(from_dict({"model": {"preset": "gpt2_124m", "seq_length": 128, "max_positions": None}}))
    older = yaml.safe_load("".join(line for line in text.splitlines(keepends=True) if "max_positions" not in line))
    assert restored(older).model.positions == 128


def test_explicit_keys_win(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: {preset: llama3_8b, num_layers: 4}\n")
    loaded = load(file, ["model.seq_length=128"])
    model = loaded.config.model
    assert (model.num_layers, model.seq_length, model.hidden_size, model.rope_theta) == (4, 128, 4096, 500000.0)
    assert loaded.origins["model.hidden_size"] == "preset llama3_8b"
    assert loaded.origins["model.seq_length"] == "command line"
    again = tmp_path / "again.yaml"
    again.write_text(dump(loaded.config, loaded.origins))
    assert load(again).config == loaded.config
    assert replace(model, preset=None) != model


@pytest.mark.parametrize(
    ("name", "message"), [("llama3-8b", "Did you mean llama3_8b"), ("17", "expected one of gpt2_124m"), (17, "text")]
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"model": {"preset": name}})
