"""Exports with tokenizers, opened as anybody opens a model: transformers' pipeline writes what `megatrain generate` writes."""

import json
import os
import shutil
import stat

import jobs
import pytest
import torch
from tokenizer_models import byte_level, sentencepiece, wordpiece

from megatrain.checkpoint.save import Contents, save
from megatrain.cli import main as cli
from megatrain.config.load import dump, from_dict
from megatrain.data.tokenizer import load_tokenizer
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.parallel.mesh import ParallelContext, Rows
from megatrain.parallel.portion import Portion

hf = pytest.importorskip("transformers", reason="pip install 'megatrain[test]'")

LLAMA = {
    "position": "rope",
    "norm": "rmsnorm",
    "bias": False,
    "activation": "swiglu",
    "num_query_groups": 2,
    "tied_embeddings": False,
}
PROMPT = "once upon a 你 time"


def saved(folder, tokenizer, model, **data):
    """The checkpoint of a run with random weights."""
    if tokenizer != "bytes":
        tokenizer.save(str(folder / "tokenizer.json"))
    name = "bytes" if tokenizer == "bytes" else str(folder / "tokenizer.json")
    vocab_size = load_tokenizer(name).vocab_size + 7
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 64, "init_std": 0.3}
    config = from_dict({"model": {**shape, "vocab_size": vocab_size, **model}, "data": {"tokenizer": name, **data}})
    ctx = ParallelContext.single()
    gpt = build_gpt(Build(Rows(ctx.tp), torch.float32, ctx.device, config.model, vocab_size, seed=3))[0]
    if not config.model.tied_embeddings:
        with torch.no_grad():  # random bytes are no characters, and the library shows each of them
            gpt.get_parameter("head.weight")[3:259] = 0
    weights = {p.spec.name: Portion.whole(p.spec, p.detach()) for p in gpt.logical_parameters()}
    save(folder / "run/checkpoints", Contents(1, {}, dump(config)), {"weights": weights}, ctx)


def written(folder, capsys, prompt, *words):
    """What `megatrain generate` writes."""
    capsys.readouterr()
    assert cli.main(["generate", str(folder / "run"), "--prompt", prompt, "--greedy", "--max-tokens", "30", *words]) == 0
    return capsys.readouterr().out.removesuffix("\n")


def piped(folder, prompt):
    """What transformers' pipeline writes after a prompt, decoded together with it: the pipeline itself decodes only what is new."""
    pipeline = hf.pipeline("text-generation", str(folder))
    ids = pipeline(prompt, max_new_tokens=30, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    texts = [
        pipeline.tokenizer.decode(some, skip_special_tokens=True) for some in (pipeline.tokenizer(prompt)["input_ids"], ids)
    ]
    return prompt + texts[1].removeprefix(texts[0])


CASES = {
    "gpt2": (byte_level(), {}, {}),
    "bytes": ("bytes", {}, {}),
    "bytes that end in a line": ("bytes", {}, {"eod": 10, "bos": "<|endoftext|>"}),
    "llama": (sentencepiece(), LLAMA, {}),
    "llama that begins": (sentencepiece(template=True), LLAMA, {}),
    "llama told to begin": (sentencepiece("metaspace"), LLAMA, {"bos": "<s>", "eod": "</s>"}),
    "llama told not to": (sentencepiece(template=True), LLAMA, {"bos": "none"}),
    "bert's tokenizer": (wordpiece(), {}, {"eod": "[SEP]"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_writes_the_same_text(tmp_path, capsys, case):
    tokenizer, model, data = CASES[case]
    saved(tmp_path, tokenizer, model, **data)
    prompt = "the cat" if case.startswith("bert") else PROMPT
    text = written(tmp_path, capsys, prompt)
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    assert len(text) > len(prompt) and piped(tmp_path / "hf", prompt) == text
    own, theirs = load_tokenizer(tmp_path / "hf/tokenizer.json"), hf.AutoTokenizer.from_pretrained(tmp_path / "hf")
    run = load_tokenizer("bytes" if tokenizer == "bytes" else tmp_path / "tokenizer.json", **data)
    assert (own.ending.eod, own.beginning.opening) == (run.ending.eod, run.beginning.opening)
    assert theirs(prompt)["input_ids"] == [*run.beginning.opening, *run.encode(prompt)]
    assert theirs.eos_token_id == run.ending.eod and theirs.model_max_length == 64


def test_what_is_written_and_who_may_read_it(tmp_path):
    saved(tmp_path, sentencepiece(template=True), LLAMA)
    before = os.umask(0o027)
    try:
        assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "hf").iterdir()}
    names = ("config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json")
    assert modes == dict.fromkeys((*names, "tokenizer_config.json"), 0o640)
    read = {name: json.loads((tmp_path / "hf" / name).read_text()) for name in modes if name.endswith(".json")}
    tokens = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "</s>"}
    assert read["special_tokens_map.json"] == tokens
    assert read["tokenizer_config.json"] == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
    ids = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2}
    assert read["generation_config.json"] == ids and read["config.json"].items() >= ids.items()


def test_what_lay_beside_the_tokenizer_is_exported_as_it_was(tmp_path):
    beside = {
        "tokenizer_config.json": '{"eos_token": "</s>", "add_bos_token": true, "bos_token": "<s>", "own": 1}',
        "special_tokens_map.json": '{"eos_token": "</s>"}',
        "generation_config.json": '{"eos_token_id": [2, 0], "top_p": 0.5}',
        "chat_template.jinja": "{{ messages[0].content }}",
    }
    for name, text in beside.items():
        (tmp_path / name).write_text(text)
    saved(tmp_path, sentencepiece(), LLAMA)
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    assert {name: (tmp_path / "hf" / name).read_text() for name in beside} == beside
    chat = [{"role": "user", "content": "once"}]
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "hf").apply_chat_template(chat, tokenize=False) == "once"
    saved(tmp_path, sentencepiece(), LLAMA, eod="<unk>", bos="none")
    shutil.rmtree(tmp_path / "hf")
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    read = {name: json.loads((tmp_path / "hf" / name).read_text()) for name in beside if name.endswith(".json")}
    assert read["tokenizer_config.json"].items() >= {"eos_token": "<unk>", "add_bos_token": False, "own": 1}.items()
    assert read["generation_config.json"].items() >= {"eos_token_id": [0, 2], "top_p": 0.5}.items()


def test_a_run_keeps_its_tokenizer(tmp_path, capsys):
    """The original may go: text and exports need it no more, nor do runs that start from its weights, nor copies of its checkpoints."""
    (tmp_path / "original").mkdir()
    tokenizer = byte_level()
    tokenizer.save(str(tmp_path / "original/mine.json"))
    (tmp_path / "original/tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "own": 1}')
    (tmp_path / "a.txt").write_text("once upon a time the cat " * 60)
    words = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "original/mine.json")]
    assert cli.main(["data", "tokenize", *words, "--output", str(tmp_path / "data")]) == 0
    tree = jobs.tiny(tmp_path / "data", tmp_path / "run", train={"steps": 3, "precision": "fp32"})
    del tree["model"]["vocab_size"]
    tree["model"]["seq_length"] = 64
    tree["data"]["tokenizer"] = str(tmp_path / "original/mine.json")
    jobs.write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["train", str(tmp_path / "config.yaml")]) == 0
    words = [f"model.init_from={tmp_path / 'run'}", f"log.dir={tmp_path / 'other'}", "data.tokenizer=null"]
    assert cli.main(["train", str(tmp_path / "config.yaml"), *words]) == 0
    assert cli.main(["checkpoint", "convert", str(tmp_path / "run"), str(tmp_path / "copy"), "--weights-only"]) == 0
    shutil.rmtree(tmp_path / "original")
    text = written(tmp_path, capsys, "once")
    for name in ("run", "other", "copy"):
        capsys.readouterr()
        assert cli.main(["export", str(tmp_path / name), str(tmp_path / f"{name}_hf")]) == 0
        kept = tmp_path / name / ("tokenizer" if name == "copy" else "checkpoints/tokenizer") / "tokenizer.json"
        assert capsys.readouterr().out.endswith(f"; with the tokenizer {kept}\n")
        assert json.loads((tmp_path / f"{name}_hf/tokenizer_config.json").read_text()) == {
            "eos_token": "<|endoftext|>",
            "own": 1,
        }
    assert piped(tmp_path / "run_hf", "once") == text
    assert load_tokenizer(tmp_path / "other_hf/tokenizer.json").encode("the cat") == tokenizer.encode("the cat").ids


def test_a_run_without_a_tokenizer_says_so(tmp_path, capsys):
    saved(tmp_path, byte_level(), {})
    (tmp_path / "tokenizer.json").rename(tmp_path / "moved.json")
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    said = f"; without a tokenizer: {tmp_path / 'tokenizer.json'} of the run is not there any more. --like DIR takes one from there\n"
    assert capsys.readouterr().out.endswith(said)
    (tmp_path / "like").mkdir()
    (tmp_path / "moved.json").rename(tmp_path / "like/tokenizer.json")
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "hf2"), "--like", str(tmp_path / "like")]) == 0
    assert (tmp_path / "hf2/tokenizer.json").read_bytes() == (tmp_path / "like/tokenizer.json").read_bytes()


def test_an_imported_model_writes_with_the_tokenizer_that_it_came_with(tmp_path, capsys):
    saved(tmp_path, sentencepiece(template=True), LLAMA)
    text = written(tmp_path, capsys, PROMPT)
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    shutil.rmtree(tmp_path / "run")
    assert cli.main(["import", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    assert written(tmp_path, capsys, PROMPT) == text
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    for file in (tmp_path / "hf").iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
