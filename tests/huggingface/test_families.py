"""Hugging Face's families, against transformers itself."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import megatrain
from megatrain.checkpoint.together import CheckpointError, ContentError, DamagedCheckpointError
from megatrain.config.schema import ModelConfig
from megatrain.huggingface import model_files as hf_files
from megatrain.huggingface.config import config_of, kind_of, model_of, same_model
from megatrain.huggingface.families import FAMILIES, parts_of, rows_of
from megatrain.verbs.exchange import convert, export_hf, import_hf

hf = pytest.importorskip("transformers", reason="pip install 'megatrain[test]'")
from hf_models import CASES, V, made, tensors_of, write, write_chatglm  # noqa: E402

ALL = [*CASES, "chatglm"]
REFERENCE = {"chatglm": "glm"}


def directory(case, path):
    return write_chatglm(path / "hf") if case == "chatglm" else write(case, path / "hf")


def tokens(rows=2, length=40):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(5))


def apart(got, want):
    """Largest difference, in standard deviations of what is wanted."""
    return float((got - want).detach().abs().max() / want.detach().std())


@pytest.mark.parametrize("case", ALL)
def test_logits_loss_and_gradients_are_those_of_transformers(tmp_path, case):
    theirs, ours = made(REFERENCE.get(case, case)), megatrain.load(directory(case, tmp_path))
    ids = tokens()
    want, got = theirs(ids).logits, ours(ids)
    assert apart(got, want) < 3e-5
    losses = []
    for model, logits in ((theirs, want), (ours, got)):
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    if case != "chatglm":  # whose gradients are not under the names of the transformers model
        compare_gradients(theirs, ours)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 3e-5), (torch.bfloat16, 0.5), (torch.float16, 0.05)])
def test_the_dtype_of_a_plain_module_is_chosen_at_load(tmp_path, dtype, close):
    path, ids = directory("llama", tmp_path), tokens()
    model, want = megatrain.load(path, dtype=dtype), megatrain.load(path)(ids)
    assert model(ids).dtype == dtype and apart(model(ids).float(), want) < close
    for cast, to in ((megatrain.load(path).to(dtype), dtype), (model.float(), torch.float32)):
        was = torch.float32 if to == dtype else dtype
        with pytest.raises(ValueError, match="no cast changes") as told:
            cast(ids)
        assert str(told.value) == (
            f"embedding.tokens is {to}, and this model was loaded to compute in {was}, which no cast changes afterwards: "
            f"megatrain.load(PATH, dtype={to})"
        )
        cast.to(was)(ids)


def test_the_rows_of_a_model_are_those_of_as_many_layers_as_it_has():
    """Whatever its tensors are called."""
    names = ["embedding.tokens", "final_norm.weight", "layers.0.attention_norm.weight", "layers.1.attention_norm.weight"]
    stored = [row.name for row in rows_of(FAMILIES["llama"], names, 2)]
    assert stored == [
        "model.embed_tokens.weight",
        *(f"model.layers.{n}.input_layernorm.weight" for n in (0, 1)),
        "model.norm.weight",
    ]
    for strange in ("layers.norm.weight", "layers.x", "layers.2.attention_norm.weight"):
        with pytest.raises(ContentError, match=f"LlamaForCausalLM has no place for 1 of the model's tensors: {strange}"):
            list(rows_of(FAMILIES["llama"], [*names, strange], 2))


def compare_gradients(theirs, ours):
    """Every gradient of ours lies in theirs where the family's table says."""
    of = {name: p.grad for name, p in theirs.named_parameters()}
    parts = parts_of(FAMILIES[theirs.config.model_type], {p.spec.name: p.spec.shape for p in ours.parameters()}, ours.config)
    typical = torch.cat([grad.flatten() for grad in of.values()]).square().mean().sqrt()
    for p in ours.parameters():
        part = parts[p.spec.name]
        want = part.read(of[part.stored], tuple(slice(0, n) for n in p.shape))
        assert (p.grad - want).abs().max() < 1e-4 * max(want.abs().max(), typical), p.spec.name


@pytest.mark.parametrize("case", ALL)
def test_import_and_export_give_the_same_bytes(tmp_path, case):
    source = directory(case, tmp_path)
    (source / "tokenizer.json").write_text('{"some": "tokenizer"}')
    (source / "generation_config.json").write_text('{"top_p": 0.5}')
    import_hf(source, tmp_path / "run")
    ids = tokens()
    assert torch.equal(megatrain.load(tmp_path / "run")(ids), megatrain.load(source)(ids))
    export_hf(tmp_path / "run", tmp_path / "back", None, None)
    want, got = tensors_of(source), tensors_of(tmp_path / "back")
    assert got.keys() == {name for name in want if "inv_freq" not in name}
    assert all(got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]) for name in got)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("case", ALL)
def test_an_export_without_its_origin_is_understood_by_transformers(tmp_path, case):
    import_hf(directory(case, tmp_path), tmp_path / "run")
    (tmp_path / "run/checkpoints/hf/config.json").unlink()
    export_hf(tmp_path / "run", tmp_path / "back", None, None)
    assert torch.equal(megatrain.load(tmp_path / "back")(tokens()), megatrain.load(tmp_path / "run")(tokens()))
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert apart(model(tokens()).logits, made(REFERENCE.get(case, case))(tokens()).logits) < 3e-5


@pytest.mark.parametrize("case", ["gpt2", "bloom", "glm4", "qwen3"])
def test_a_sharded_bf16_directory_round_trips(tmp_path, case):
    source = write(case, tmp_path / "hf", torch.bfloat16, max_shard_size="30KB")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    import_hf(source, tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "back", None, None)
    want, got = tensors_of(source), tensors_of(tmp_path / "back")
    assert got.keys() == want.keys()
    assert all(got[n].dtype == torch.bfloat16 and torch.equal(got[n], want[n]) for n in want)


def test_large_exports_are_sharded(tmp_path, monkeypatch):
    import_hf(write("llama", tmp_path / "hf"), tmp_path / "run")
    monkeypatch.setattr("megatrain.huggingface.model_files.SHARD_BYTES", 50_000)
    export_hf(tmp_path / "run", tmp_path / "back", None, None)
    files = sorted(file.name for file in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert torch.equal(megatrain.load(tmp_path / "back")(tokens()), megatrain.load(tmp_path / "hf")(tokens()))
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "back").lm_head.weight.shape == (V, 48)


@pytest.mark.parametrize("case", ["gpt2", "bloom", "chatglm"])
def test_names_without_the_prefix_and_buffers_are_understood(tmp_path, case):
    from safetensors.torch import save_file

    source = directory(case, tmp_path)
    want = megatrain.load(source)(tokens())
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(source).items()}
    if case == "gpt2":
        bare |= {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64) for n in range(3)}
    save_file(bare, source / "model.safetensors")
    assert torch.equal(megatrain.load(source)(tokens()), want)


@pytest.mark.parametrize("case", ["llama 3.1, tied, wide heads", "llama, yarn", "glm", "qwen2, window"])
def test_old_keys_of_config_json_are_read(tmp_path, case):
    source = write(case, tmp_path / "hf")
    want = megatrain.load(source)(tokens())
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    config.pop("layer_types", None)
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    (source / "config.json").write_text(json.dumps(config))
    assert torch.equal(megatrain.load(source)(tokens()), want)


def test_weights_alone_in_another_dtype(tmp_path):
    import_hf(write("glm", tmp_path / "hf"), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "half", True, "bfloat16")
    for name, p in megatrain.load(tmp_path / "half", dtype=torch.bfloat16).named_parameters():
        assert torch.equal(p, megatrain.load(tmp_path / "run").get_parameter(name).bfloat16())
    export_hf(tmp_path / "half", tmp_path / "back", tmp_path / "hf", None)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("case", ["gpt2", "llama, yarn", "bloom"])
def test_the_number_of_positions_survives_a_shorter_sequence(tmp_path, case):
    source = write(case, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    keys = model_of(config)
    assert keys["max_positions"] == keys["seq_length"] == (2048 if case == "bloom" else 64)
    short = ModelConfig(**{**keys, "seq_length": 16})
    back = config_of(short, short.vocab_size, kind_of(short, short.vocab_size))
    assert model_of(back)["max_positions"] == keys["max_positions"] and same_model(back, config)


def change(path, **keys):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **keys}))


BAD_CONFIGS = {
    "another family": ({"model_type": "t5"}, "model_type 't5'; known are gpt2, llama"),
    "no family": ({"model_type": None}, "model_type None"),
    "biases": ({"attention_bias": True}, "attention_bias=True, and a llama can be read with False alone"),
    "an activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "a scaling": ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'; linear, llama3 and yarn"),
    "a scaling without factor": ({"rope_parameters": {"rope_type": "linear"}}, "gives no factor"),
    "yarn of another temperature": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 3}},
        "attention_factor",
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised"),
    "a width of text": ({"hidden_size": "48"}, "hidden_size"),
    "another width": ({"hidden_size": 96}, r"is \[101, 48\] of torch.float32, and the model gives \[101, 96\]"),
    "more layers": ({"num_hidden_layers": 4}, "lacks 9 tensors: model.layers.3"),
    "fewer layers": ({"num_hidden_layers": 2}, "has, and the model section does not give, 9 tensors: model.layers.2"),
    "tied, and not": ({"tie_word_embeddings": True}, "lm_head.weight that is not its embedding"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_does_not_fit_is_refused(tmp_path, case):
    keys, message = BAD_CONFIGS[case]
    source = write("llama", tmp_path / "hf")
    change(source, **keys)
    with pytest.raises((ContentError, ValueError), match=message):
        megatrain.load(source)


def test_a_table_of_other_positions_is_refused_with_what_to_set(tmp_path):
    source = write("gpt2", tmp_path / "hf")
    rows = json.loads((source / "config.json").read_text())["n_positions"]
    change(source, n_positions=rows // 2)
    with pytest.raises(ContentError, match=rf"wpe\.weight is .*\(in training: model\.max_positions={rows}, whatever"):
        megatrain.load(source)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 5])
def test_an_index_that_leads_out_of_the_directory_is_refused(tmp_path, name):
    source = write("gpt2", tmp_path / "hf", max_shard_size="30KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.wte.weight"] = name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ContentError, match="must give each tensor the name of a safetensors file beside it"):
        megatrain.load(source)


def test_pickles_are_refused(tmp_path):
    source = write("gpt2", tmp_path / "hf")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ContentError, match=r"pytorch_model.bin holds pickles, which can run code.*save_pretrained"):
        megatrain.load(source)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_of_8_bits_are_refused(tmp_path, dtype):
    source = write("llama 3.1, tied, wide heads", tmp_path / "hf")
    name = "model.layers.0.mlp.up_proj.weight"
    file = source / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].to(dtype)}, file, {"format": "pt"})
    with pytest.raises(ContentError, match=rf"{name} is of {dtype}\. Weights of 8 bits .* in bfloat16, float16 or float32"):
        megatrain.load(source)


def test_a_cut_file_is_refused(tmp_path):
    source = write("gpt2", tmp_path / "hf")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors"):
        megatrain.load(source)


def test_export_does_not_write_over_files_or_into_another_family(tmp_path):
    import_hf(write("glm", tmp_path / "hf"), tmp_path / "run")
    with pytest.raises(CheckpointError, match="is not empty"):
        export_hf(tmp_path / "run", tmp_path / "hf", None, None)
    other = write("llama", tmp_path / "llama")
    with pytest.raises(ContentError, match=r"a llama of Hugging Face cannot have .*rope_interleaved=True"):
        export_hf(tmp_path / "run", tmp_path / "back", other, None)


def test_a_text_longer_than_the_positions_is_refused(tmp_path):
    with pytest.raises(ValueError, match="65 tokens are more than the model's 64"):
        megatrain.load(write("gpt2", tmp_path / "hf"))(tokens(1, 65))


def test_an_export_that_fails_leaves_nothing_and_one_like_nothing_is_refused(tmp_path, monkeypatch):
    import_hf(write("glm", tmp_path / "hf"), tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for like in ("nowhere", "empty"):
        with pytest.raises(CheckpointError, match=rf"--like .*{like} has no config\.json and no files of a tokenizer"):
            export_hf(tmp_path / "run", tmp_path / "back", tmp_path / like, None)

    def full(_tensors, path, _metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(hf_files, "save_file", full)
        with pytest.raises(CheckpointError, match=r"cannot be written: No space left on device"):
            export_hf(tmp_path / "run", tmp_path / "back", None, None)
    assert list((tmp_path / "back").iterdir()) == []
    export_hf(tmp_path / "run", tmp_path / "back", None, None)  # once there is room
