"""What a config.json means: defaults, nulls and spellings as transformers has them; what contradicts itself is refused by name."""

import json
import re
import warnings

import pytest
import torch

import megatrain
from megatrain.checkpoint.together import CheckpointError, ContentError
from megatrain.config.load import from_dict
from megatrain.config.source import ConfigError
from megatrain.data.indexed import TokenStoreWriter
from megatrain.huggingface.config import config_of, kind_of, model_of
from megatrain.huggingface.model_files import _merged
from megatrain.verbs.exchange import import_hf

hf = pytest.importorskip("transformers", reason="pip install 'megatrain[test]'")
from hf_models import write  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

KINDS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "glm", "glm4", "bloom")
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 64}
OLD = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(kind, **keys):
    sizes = {name: size for name, size in SIZES.items() if kind not in ("gpt2", "bloom") or name in OLD}
    return {"model_type": kind, **sizes, **keys}


def meant(keys):
    """With what null means."""
    model = from_dict({"model": keys}).model
    return {**keys, "head_dim": model.head_size, "num_query_groups": model.query_groups}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there_is_as_in_transformers(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        full = json.loads(hf.AutoConfig.for_model(kind).to_json_string(use_diff=False))
    assert meant(model_of({"model_type": kind})) == meant(model_of(full))


CONTRADICTIONS = {
    "llama": [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_sc",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            r"rope_parameters.rope_theta=500000.0 and rope_theta=10000.0",
        ),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_type": "default"}}, ""),
        (
            {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}},
            r"rope_scaling.rope_type='linear' and rope_sc.*type='yarn'",
        ),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}, "original_max_position_embeddings": 8},
            "=16 and",
        ),
        ({"n_layer": 3}, "num_hidden_layers=2 and n_layer=3"),
        ({"multi_query_group_num": 4}, "num_key_value_heads=2 and multi_query_group_num=4"),
        ({"layer_norm_eps": 1e-5}, "rms_norm_eps=1e-06 and layer_norm_eps=1e-05"),
        ({"n_ctx": 32}, "max_position_embeddings=64 and n_ctx=32"),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, "dtype='bfloat16' and torch_dtype='float16'"),
    ],
    "gpt2": [
        ({"n_embd": 48}, "n_embd=48 and hidden_size=32"),
        ({"n_positions": 64, "n_ctx": 32}, "n_positions=64 and n_ctx=32"),
        ({"n_inner": 100, "intermediate_size": 24}, "n_inner=100 and intermediate_size=24"),
    ],
    "mistral": [
        ({"sliding_window": 7, "use_sliding_window": False}, "sliding_window=7 and use_sliding_window=False"),
        ({"sliding_window": 7, "layer_types": ["full_attention"] * 2}, "sliding_window=7.* and layer_types"),
    ],
    "qwen2": [
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types=.* and use_sliding_window=False"),
        ({"layer_types": ["full_attention"] * 3}, "num_hidden_layers=2 and layer_types"),
    ],
    "bloom": [({"n_embed": 64}, "hidden_size=32 and n_embed=64")],
}


@pytest.mark.parametrize(("kind", "number"), [(kind, n) for kind, of in CONTRADICTIONS.items() for n in range(len(of))])
def test_contradictions_are_refused_by_name(kind, number):
    keys, said = CONTRADICTIONS[kind][number]
    said = said and f"config.json has .*{said}"
    with pytest.raises(ContentError, match=f"{said}.*which contradict each other. Remove the one that is wrong"):
        model_of(config(kind, **keys))


def test_two_spellings_of_the_same_are_one():
    scaling = {**LLAMA3, "original_max_position_embeddings": 16}
    one = model_of(config("llama", rope_parameters={**scaling, "rope_theta": 5e5}))
    assert (one["rope_theta"], one["rope_scaling"], one["rope_original_length"]) == (5e5, "llama3", 16)
    assert model_of(config("llama", rope_theta=500000, rope_scaling={**scaling, "type": "llama3"})) == one
    both = {
        "rope_parameters": {**scaling, "rope_theta": 5e5},
        "rope_scaling": {**scaling, "rope_theta": 5e5},
        "rope_theta": 5e5,
    }
    assert model_of(config("llama", **both, n_layer=2, n_embd=32, torch_dtype="bfloat16", dtype="bfloat16")) == one


KINDS = {"s": "sliding_attention", "f": "full_attention"}


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"max_window_layers": 2}, ("global", "global", "local", "local", "local", "local")),
        ({"max_window_layers": 0}, ("local",)),
        ({"layer_types": [KINDS[k] for k in "sfsfsf"]}, ("local", "global")),
        ({"layer_types": [KINDS[k] for k in "sssssf"]}, ("local",) * 5 + ("global",)),
        ({"layer_types": [KINDS[k] for k in "sfssfs"]}, ("local", "global", "local")),
    ],
    ids=str,
)
def test_windows_in_some_layers_are_a_pattern_there_and_back(given, pattern):
    model = model_of(config("qwen3", num_hidden_layers=6, use_sliding_window=True, sliding_window=5, **given))
    assert (model["window"], model["window_pattern"]) == (5, pattern)
    back = config_of(from_dict({"model": model}).model, 50, "qwen3")
    assert model_of(back) == model
    assert back["layer_types"] == [KINDS["s" if (pattern * 6)[n] == "local" else "f"] for n in range(6)]
    assert back["max_window_layers"] == back["layer_types"].index("sliding_attention")
    layers = from_dict({"model": {**model, "qk_norm": False, "window_pattern": ["local", "global"]}}).model
    with pytest.raises(ContentError, match=r"a mistral of Hugging Face cannot have window_pattern=\('local', 'global'\)"):
        config_of(layers, 50, "mistral")


def test_a_window_that_no_layer_has_is_none():
    model = model_of(config("qwen3", use_sliding_window=True, sliding_window=5, max_window_layers=28))
    assert model["window"] is None and "window_pattern" not in model


def test_null_is_absence_where_transformers_has_it_so():
    plain = model_of(config("llama", rope_scaling=None))
    assert plain == model_of(config("llama", rope_parameters=None, head_dim=None, attention_dropout=None))
    assert plain["rope_theta"] == 10000.0
    assert model_of(config("glm"))["rope_fraction"] == 0.5
    assert model_of(config("glm", partial_rotary_factor=None))["rope_fraction"] == 1.0  # as transformers reads it
    assert model_of(config("mistral"))["window"] == 4096 and model_of(config("mistral", sliding_window=None))["window"] is None
    for kind, name in (
        ("llama", "rms_norm_eps"),
        ("glm", "num_key_value_heads"),
        ("qwen3", "head_dim"),
        ("gpt2", "tie_word_embeddings"),
    ):
        with pytest.raises(ContentError, match=f"config.json has {name}=null"):
            model_of(config(kind, **{name: None}))


LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_parameters.rope_theta"),
        ({"rope_scaling": {"rope_type": None, "rope_theta": 5e5}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": None, "factor": 2.0}}, "rope_scaling.rope_type"),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}},
            "rope_scaling.original_max_position_embeddings",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": None},
            "original_max_position_embeddings",
        ),
    ],
)
def test_a_null_with_which_transformers_builds_no_model_is_refused(said, name):
    for kind in ("llama", "mistral", "qwen2", "qwen3", "glm4"):
        with pytest.raises(ContentError, match=f"^config.json has {re.escape(name)}=null, which says nothing. Give the "):
            model_of(config(kind, **said))
    outside = model_of(config("llama", rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    assert outside["rope_theta"] == 500.0  # transformers takes the one within


REFUSED = {
    "odd": ("glm", {"head_dim": 10, "partial_rotary_factor": 0.5}, "rotates 5 of the 10 numbers of a head"),
    "odd heads": ("llama", {"head_dim": 7}, "rotates 7 of the 7 numbers of a head"),
    "a part of a llama's head": ("llama", {"partial_rotary_factor": 0.5}, "and a llama of transformers rotates whole heads"),
    "no room": ("llama", {"hidden_size": 34}, "hidden_size=34, which num_attention_heads=4 do not divide"),
    "another family's cap": ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0, which a llama .* does not read"),
    "another family's window": ("glm", {"sliding_window": 7}, "sliding_window=7, which a glm of transformers does not read"),
    "another family's biases": ("qwen2", {"attention_bias": False}, "attention_bias=False, which a qwen2"),
    "rotation of a gpt2": ("gpt2", {"n_inner": 24, "rope_theta": 1e4}, "rope_theta=10000.0, which a gpt2"),
    "a factor of no type": ("llama", {"rope_scaling": {"factor": 8.0}}, "rope_scaling.factor=8.0, which .*='default' do not"),
    "frequencies of layers": ("qwen2", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention"),
    "half of llama3": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "llama3.* and gives no low_freq_factor"),
    "a width of text": ("llama", {"hidden_size": "32"}, "hidden_size='32', which is no whole number"),
    "a scaling of text": ("llama", {"rope_scaling": "yarn"}, "rope_scaling='yarn', which is no JSON object"),
    "a factor of cosines": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
        r"make 1 for yarn, whose factor here is always 0.1 log\(factor\) \+ 1 = 1.13863",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_model_section_cannot_say_is_refused_by_name(case):
    kind, keys, said = REFUSED[case]
    with pytest.raises(ContentError, match=said):
        model_of(config(kind, **keys))


def test_original_lengths_are_those_of_transformers():
    assert model_of(config("llama", rope_scaling=LLAMA3))["rope_original_length"] == 64
    assert (
        model_of(config("llama", rope_scaling={"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}))[
            "rope_factor"
        ]
        == 4.0
    )


@pytest.mark.parametrize("part", [1.0, 0.75, 0.5])
def test_a_glm_with_any_part_of_its_heads_rotated_comes_out_as_it_came_in(part):
    model = from_dict({"model": model_of(config("glm", head_dim=8, partial_rotary_factor=part))}).model
    assert kind_of(model, 50) == "glm"
    written = config_of(model, 50, "glm")
    assert written["partial_rotary_factor"] == part and model_of(written)["rope_fraction"] == part
    with pytest.raises(ContentError, match=r"a llama of Hugging Face cannot have .*rope_interleaved=True"):
        config_of(model, 50, "llama")


def test_a_part_of_a_head_that_is_rounded_is_written_so_that_transformers_rounds_alike():
    sizes = model_of(config("glm", head_dim=22, partial_rotary_factor=1.0))
    model = from_dict({"model": {**sizes, "rope_fraction": 0.35}}).model  # 7.7 of 22 numbers: 6
    written = config_of(model, 50, "glm")["partial_rotary_factor"]
    assert int(22 * written) == 6 == model.rotated


def test_an_export_has_nothing_of_its_origin_that_contradicts_it(tmp_path):
    base = config(
        "qwen2", layer_types=["full_attention"] * 2, rope_parameters={"rope_theta": 5e5}, dtype="float32", eos_token_id=7
    )
    new = config_of(
        from_dict({"model": model_of(config("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=0))}).model,
        50,
        "qwen2",
    )
    merged = _merged(base, new, "qwen2", torch.float16)
    assert model_of(merged)["window"] == 5 and model_of(merged)["rope_theta"] == 10000.0
    assert merged["eos_token_id"] == 7 and merged["torch_dtype"] == "float16" and "dtype" not in merged


def test_weights_that_are_not_there_are_told_before_a_model_is_built(tmp_path):
    source = write("llama", tmp_path / "hf")
    weights = source / "model.safetensors"
    data = weights.read_bytes()
    huge = {
        **json.loads((source / "config.json").read_text()),
        "hidden_size": 6 << 10,
        "intermediate_size": 1 << 13,
        "head_dim": 8,
    }
    (source / "config.json").write_text(json.dumps(huge))  # two gigabytes, if it were built
    with TokenStoreWriter(tmp_path / "data", "u2") as store:
        store.add_document(list(range(100)))
    run = {"data": {"train": [{"path": str(tmp_path / "data")}]}, "train": {"steps": 1}, "log": {"dir": str(tmp_path / "run")}}
    run["optim"] = {"warmup_steps": 0}
    run["train"] |= {"global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"}
    for content, said in (
        (data, r"is \[101, 48\] of torch.float32, and the model gives \[101, 6144\]"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n",
            "model.safetensors: this is a Git LFS pointer",
        ),
        (None, "has neither model.safetensors nor model.safetensors.index.json"),
    ):
        weights.unlink()
        if content is not None:
            weights.write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            megatrain.load(source)
        with pytest.raises(CheckpointError, match=said):
            import_hf(source, tmp_path / "run")
        with pytest.raises(CheckpointError, match=said):
            megatrain.build({**run, "model": {"init_from": str(source), "seq_length": 16}})


def test_a_head_that_is_not_there_comes_with_the_way_out(tmp_path):
    source = write("llama", tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ContentError, match=r'has no lm_head.weight.*set "tie_word_embeddings": true in config.json'):
        megatrain.load(source)
    said = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**said, "tie_word_embeddings": True}))
    assert megatrain.load(source).config.tied_embeddings


def test_two_sets_of_weights_are_refused(tmp_path):
    source = write("gpt2", tmp_path / "hf", max_shard_size="30KB")
    save_file({"x": torch.zeros(1)}, source / "model.safetensors")
    with pytest.raises(ContentError, match=r"two sets of weights, of which transformers takes the first"):
        megatrain.load(source)


NO_MODELS = {
    "heads that cannot share": (
        {"num_key_value_heads": 3},
        "model.num_query_groups=3 does not divide model.num_attention_heads=4",
    ),
    "no number": ({"rms_norm_eps": float("nan")}, "model.norm_eps is nan; expected a finite number"),
    "a base of 1": (
        {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "model.rope_theta=1.0 must be greater",
    ),
    "a factor of nothing": (
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        "model.rope_factor=0.0 must be 1 or more",
    ),
    "no length": (
        {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 0}},
        "cannot be read: ZeroDivisionError",
    ),
    "layers without end": ({"num_hidden_layers": 60000}, "holds 1 tensors, and the model has 60000 layers"),
    "a vocabulary without end": ({"vocab_size": 10**30}, "vocab_size=10+, and model.vocab_size must be at most 16777216"),
}


@pytest.mark.parametrize("case", NO_MODELS)
def test_a_model_that_cannot_be_is_told_with_its_file(tmp_path, case):
    keys, said = NO_MODELS[case]
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config("llama", **keys)))
    with pytest.raises((CheckpointError, ConfigError), match=f"{tmp_path}.*{said}"):
        megatrain.load(tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=said):
        import_hf(tmp_path, tmp_path / "run")
