"""Files kept beside checkpoints: a tokenizer and those beside it, but none that a link fetches from elsewhere."""

import base64
import json
import os
from dataclasses import replace

import pytest

from megatrain.checkpoint.together import ContentError
from megatrain.companions import keep_tokenizer, take_along
from megatrain.config.schema import Config
from megatrain.config.source import ConfigError
from megatrain.data.tokenizer import load_tokenizer
from megatrain.data.tokenizers.fitting import train_tokenizer, trained_on
from megatrain.huggingface.families import FAMILIES
from megatrain.huggingface.model_files import COMPANIONS, Weights, copy_files, keep_companions, model_keys
from megatrain.init_from import config_of_hf, shapes_of

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 101, "n_positions": 16}


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_text("hush")
    return path


def config_for(tokenizer, checkpoints):
    config = Config()
    checkpoint = replace(config.checkpoint, dir=str(checkpoints))
    return replace(config, data=replace(config.data, tokenizer=str(tokenizer)), checkpoint=checkpoint)


def test_a_tokenizer_of_the_hubs_cache_is_kept_with_the_files_beside_it(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    (snapshot / "additional_chat_templates").mkdir(parents=True), blobs.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (blobs / f"of {name}").write_text(json.dumps({"is": name}))
        (snapshot / name).symlink_to(f"../../blobs/of {name}")
    (blobs / "of rag").write_text("rag")
    (snapshot / "additional_chat_templates/rag.jinja").symlink_to("../../../blobs/of rag")
    keep_tokenizer(config_for(snapshot / "tokenizer.json", tmp_path / "checkpoints"))
    kept = tmp_path / "checkpoints/tokenizer"
    listed = ["additional_chat_templates", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in kept.iterdir()) == listed
    take_along(tmp_path / "checkpoints", tmp_path / "further")
    assert (tmp_path / "further/tokenizer/additional_chat_templates/rag.jinja").read_text() == "rag"
    assert not any(file.is_symlink() for file in kept.iterdir())
    keep_companions(snapshot, tmp_path / "checkpoints")
    assert json.loads((tmp_path / "checkpoints/hf/config.json").read_text()) == {"is": "config.json"}


def test_a_folder_of_chat_templates_that_is_a_link_is_not_copied(tmp_path):
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    model.mkdir(), elsewhere.mkdir()
    (elsewhere / "a.jinja").write_text("a")
    (model / "additional_chat_templates").symlink_to(elsewhere)
    with pytest.raises(ContentError, match=r"additional_chat_templates/a\.jinja is not copied: it is a link that leads out"):
        copy_files(model, tmp_path / "target", COMPANIONS)
    (model / "additional_chat_templates").unlink()
    (model / "additional_chat_templates").mkdir(), (tmp_path / "target").mkdir()
    (model / "additional_chat_templates/a.jinja").write_text("a")
    (tmp_path / "target/additional_chat_templates").symlink_to(elsewhere)
    with pytest.raises(OSError, match=r"additional_chat_templates is a link, to .*elsewhere, and a run writes there alone"):
        copy_files(model, tmp_path / "target", COMPANIONS)


def test_a_link_to_a_secret_is_not_copied(tmp_path, secret):
    model, target = tmp_path / "model", tmp_path / "checkpoints"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    (model / "tokenizer_config.json").symlink_to(secret)
    why = rf"tokenizer_config\.json is not copied: it is a link that leads out of its folder, to {secret}"
    for copy in (
        lambda: keep_tokenizer(config_for(model / "tokenizer.json", target)),
        lambda: keep_companions(model, target),
        lambda: copy_files(model, target / "tokenizer", COMPANIONS),
    ):
        with pytest.raises(ContentError, match=why):
            copy()
    (tmp_path / "old/tokenizer").mkdir(parents=True)
    (tmp_path / "old/tokenizer/added.json").symlink_to(secret)
    with pytest.raises(ContentError, match="is not copied"):
        take_along(tmp_path / "old", target)
    assert not [file for file in target.rglob("*") if file.is_file() and file.read_text() == "hush"]


def test_a_folder_that_is_a_link_out_is_not_taken_along(tmp_path, secret):
    (tmp_path / "old").mkdir()
    (tmp_path / "private").mkdir()
    (tmp_path / "private/key").write_text("hush")
    (tmp_path / "old/tokenizer").symlink_to("../private")
    with pytest.raises(ContentError, match="leads out"):
        take_along(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [0, -1, 2**40, 10**9, 1.5, "x", [], 10**39])
@pytest.mark.parametrize("key", ["n_embd", "n_layer", "n_head", "vocab_size", "n_positions"])
def test_a_config_of_absurd_sizes_is_refused(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    assert config_of_hf(tmp_path).model.num_layers == 2
    (tmp_path / "config.json").write_text(json.dumps({**GPT2, key: value}))
    with pytest.raises((ConfigError, ContentError), match=r"config\.json"):
        config_of_hf(tmp_path)


def test_numbers_of_ten_thousand_digits_and_links_out_are_refused_by_name(tmp_path, secret):
    file = tmp_path / "model/config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(GPT2).replace("101", "9" * 10_000))
    with pytest.raises(
        ContentError, match=r"config\.json cannot be read: it has a number of 10,000 digits, 99999999999999999999\.\.\."
    ):
        model_keys(file.parent)
    file.unlink()
    file.symlink_to(secret)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: it is a link that leads out of its folder"):
        shapes_of(str(file.parent))


def test_an_index_that_is_a_fifo_and_a_shard_that_is_a_link_out_are_refused(tmp_path, secret):
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(ContentError, match=r"index\.json cannot be read: it is no plain file"):
        Weights(tmp_path, FAMILIES["gpt2"])
    (tmp_path / "model.safetensors.index.json").unlink()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(secret)
    with pytest.raises(ContentError, match=r"model\.safetensors is a link that leads out of its folder"):
        Weights(folder, FAMILIES["gpt2"])


def test_no_link_in_the_checkpoint_directory_is_written_through(tmp_path):
    model, target, foreign = tmp_path / "model", tmp_path / "checkpoints", tmp_path / "foreign"
    for folder in (model, target, foreign):
        folder.mkdir()
    (foreign / "tokenizer.json").write_text("precious")
    for name in ("tokenizer.json", "config.json"):
        (model / name).write_text("{}")
    (tmp_path / "old/tokenizer").mkdir(parents=True)
    (target / "tokenizer").symlink_to(foreign)
    (target / "hf").symlink_to(foreign)
    for name, copy in (
        ("tokenizer", lambda: keep_tokenizer(config_for(model / "tokenizer.json", target))),
        ("hf", lambda: keep_companions(model, target)),
        ("tokenizer", lambda: take_along(tmp_path / "old", target)),
    ):
        with pytest.raises(
            OSError, match=f"{target}/{name} is a link, to {foreign}, and a run writes there alone what is its own"
        ):
            copy()
    (target / "hf").unlink()
    (target / "hf").mkdir()
    (target / "hf/config.json").symlink_to(foreign / "tokenizer.json")
    with pytest.raises(OSError, match=f"{target}/hf/config.json is a link, to {foreign}/tokenizer.json"):
        keep_companions(model, target)
    assert (foreign / "tokenizer.json").read_text() == "precious" and len(list(foreign.iterdir())) == 1


def test_a_rank_file_is_kept_as_a_tokenizer_json_with_the_same_ids(tmp_path):
    source = tmp_path / "model/cl100k_base.tiktoken"
    source.parent.mkdir()
    tokens = [*(bytes((value,)) for value in range(256)), b"th"]
    source.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)))
    keep_tokenizer(config_for(source, tmp_path / "checkpoints"))
    kept, own = load_tokenizer(tmp_path / "checkpoints/tokenizer/tokenizer.json"), load_tokenizer(source)
    assert (kept.identity, kept.eod, kept.encode("th<|endoftext|>")) == (own.identity, 100257, own.encode("th<|endoftext|>"))


def test_a_trained_tokenizer_is_kept_with_what_it_was_trained_on(tmp_path):
    (tmp_path / "a.txt").write_text("some words")
    train_tokenizer([tmp_path / "a.txt"], 260, tmp_path / "own.json")
    keep_tokenizer(config_for(tmp_path / "own.json", tmp_path / "checkpoints"))
    kept = tmp_path / "checkpoints/tokenizer/tokenizer.json"
    assert trained_on(kept, load_tokenizer(kept).identity).documents == 1
