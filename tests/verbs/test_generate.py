import argparse
import io
import sys
from dataclasses import replace

import pytest
import torch
from tokenizer_models import sentencepiece

from megatrain.assembly import mesh_shape
from megatrain.checkpoint.save import Contents, save
from megatrain.checkpoint.together import CheckpointError
from megatrain.config.load import dump, from_dict
from megatrain.config.source import ConfigError
from megatrain.inference.decoding import Decoder, Sampling, continuation
from megatrain.inference.trained import laid_out, saved_config
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.parallel.mesh import MeshShape, ParallelContext, Rows
from megatrain.parallel.portion import Portion
from megatrain.testing import simulate
from megatrain.verbs.generate import load_decoder, main

ONE = MeshShape()
SINGLE = ParallelContext.single()
CPU = torch.device("cpu")


def config_of(**model):
    shape = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 24,
        "vocab_size": 261,
        "init_std": 0.4,
        "dropout": 0.5,
    }
    return from_dict({"model": {**shape, **model}, "data": {"tokenizer": "bytes"}, "train": {"precision": "fp32"}})


def model_of(config, ctx=SINGLE):
    return whole_gpt(config.model, config.model.vocab_size, ctx).eval()


def whole_gpt(model, vocab_size, ctx):
    return build_gpt(Build(Rows(ctx.tp), torch.float32, ctx.device, model, vocab_size, seed=7))[0]


def saved(directory, config, layout=ONE, dtype=torch.float32):
    """A run's checkpoint, saved under a layout."""

    def write(ctx):
        parameters = model_of(config, ctx).logical_parameters()
        weights = {p.spec.name: Portion.whole(p.spec, p.detach().to(dtype)) for p in parameters}
        return save(directory / "checkpoints", Contents(5, {}, dump(config)), {"weights": weights}, ctx)

    return simulate(layout, write)[0]


@torch.no_grad()
def full_logits(model, ids):
    """Logits [v] of the next token without a cache."""
    tokens = torch.tensor(ids)[:, None]
    zeros = torch.zeros(len(ids), 1)
    batch = MicroBatch(tokens, tokens, zeros, torch.arange(len(ids))[:, None], torch.zeros(1, dtype=torch.int64))
    return model.head.logits(model(None, batch))[-1, 0]


VARIANTS = [
    {},
    {"position": "rope", "norm": "rmsnorm", "bias": False, "activation": "swiglu"},
    {"position": "rope", "num_query_groups": 1, "tied_embeddings": False},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_cache_changes_nothing(variant):
    model = model_of(config_of(**variant))
    decoder, ids = Decoder([model]), []
    for new in ([3, 1, 4, 1, 5], [9], [2, 6], [5], [3, 5, 8]):
        got = decoder.logits(new)
        ids += new
        torch.testing.assert_close(got, full_logits(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [MeshShape(), MeshShape(tp=2), MeshShape(tp=4, dp=2)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_checkpoint_of_any_layout_gives_the_same_model(tmp_path, variant, layout):
    config = config_of(**variant)
    path = saved(tmp_path, config, layout)
    (model,) = load_decoder(path, config, SINGLE).chunks
    assert saved_config(path) == config
    assert torch.equal(full_logits(model, [1, 2, 3]), full_logits(model_of(config), [1, 2, 3]))


def test_a_checkpoint_of_another_dtype_is_read_as_float32(tmp_path):
    (model,) = load_decoder(saved(tmp_path, config_of(), dtype=torch.bfloat16), config_of(), SINGLE).chunks
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_generation_goes_on_beyond_the_models_length():
    config = config_of()
    model = model_of(config)
    got = list(continuation(Decoder([model]), [1, 2, 3], 60, Sampling(greedy=True), 0))
    assert len(got) == 60
    ids, window = [1, 2, 3], []
    for token in got:
        window = [*window, *ids[len(ids) - (3 if not window else 1) :]]
        if len(window) > 24:
            window = window[-12:]
        assert token == int(full_logits(model, window).argmax())
        ids.append(token)


def test_a_prompt_longer_than_the_model_keeps_its_end():
    model = model_of(config_of())
    ids = [i % 200 for i in range(100)]
    torch.testing.assert_close(Decoder([model]).logits(ids), full_logits(model, ids[-12:]), rtol=1e-4, atol=1e-5)


def test_the_end_token_stops():
    model = model_of(config_of())
    free = list(continuation(Decoder([model]), [1], 20, Sampling(greedy=True), 0))
    assert (
        list(continuation(Decoder([model]), [1], 20, Sampling(greedy=True), 0, ends=[free[3]])) == free[: free.index(free[3])]
    )


LOGITS = torch.tensor([0.1, 0.5, 0.2, 0.15, 0.05]).log()


@pytest.mark.parametrize(
    ("choice", "want"),
    [
        (Sampling(), [0.1, 0.5, 0.2, 0.15, 0.05]),
        (Sampling(greedy=True), [0, 1, 0, 0, 0]),
        (Sampling(top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(top_k=2), [0, 5 / 7, 2 / 7, 0, 0]),
        (Sampling(top_k=99), [0.1, 0.5, 0.2, 0.15, 0.05]),
        (Sampling(top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.6), [0, 5 / 7, 2 / 7, 0, 0]),
        (Sampling(top_p=0.8), [0, 0.5 / 0.85, 0.2 / 0.85, 0.15 / 0.85, 0]),
        (Sampling(top_p=1.0), [0.1, 0.5, 0.2, 0.15, 0.05]),
        (Sampling(top_k=2, top_p=0.72), [0, 5 / 7, 2 / 7, 0, 0]),
        (Sampling(top_k=2, top_p=0.7), [0, 1, 0, 0, 0]),
        (Sampling(temperature=0.5), [p * p / 0.325 for p in (0.1, 0.5, 0.2, 0.15, 0.05)]),
    ],
    ids=str,
)
def test_probabilities(choice, want):
    torch.testing.assert_close(choice.probabilities(LOGITS), torch.tensor(want, dtype=torch.float32))


def test_a_tiny_temperature_is_greedy_and_diverged_logits_are_an_error():
    torch.testing.assert_close(Sampling(temperature=1e-40).probabilities(LOGITS), torch.tensor([0.0, 1, 0, 0, 0]))
    with pytest.raises(ValueError, match="training has diverged"):
        Sampling().probabilities(LOGITS * torch.nan)


def test_draws_follow_the_probabilities_and_the_seed():
    def draw(seed, n):
        generator = torch.Generator().manual_seed(seed)
        return [Sampling(top_k=3).draw(LOGITS, generator) for _ in range(n)]

    assert draw(1, 50) == draw(1, 50) != draw(2, 50)
    counts = torch.bincount(torch.tensor(draw(3, 4000)), minlength=5) / 4000
    torch.testing.assert_close(counts, Sampling(top_k=3).probabilities(LOGITS), atol=0.03, rtol=0)


def test_no_global_generator_is_touched():
    before = torch.get_rng_state()
    list(continuation(Decoder([model_of(config_of())]), [1], 3, Sampling(), 5))
    assert torch.equal(torch.get_rng_state(), before)


def arguments(checkpoint, **more):
    defaults = {"prompt": "ab", "max_tokens": 12, "seed": 3, "tokenizer": None, "eod": None, "bos": None, "greedy": False}
    sampling = {"temperature": 1.0, "top_k": None, "top_p": None, "overrides": [], "beams": None, "length_penalty": 0.0}
    return argparse.Namespace(checkpoint=str(checkpoint), **{**defaults, **sampling, **more})


def test_the_program_prints_the_prompt_and_what_follows(tmp_path, capsys):
    path = saved(tmp_path, config_of(), MeshShape(tp=2))
    texts = []
    for where, seed in ((tmp_path, 3), (tmp_path / "checkpoints", 3), (path, 3), (path, 4)):
        assert main(arguments(where, seed=seed)) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("ab") and texts[0].endswith("\n") and len(texts[0]) > 6
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_one_beam_is_greedy(tmp_path, capsys):
    path = saved(tmp_path, config_of())
    texts = []
    for more in ({"greedy": True}, {"beams": 1}, {"beams": 1, "seed": 9}, {}):
        main(arguments(path, max_tokens=30, **more))  # longer than the model: greedy decoding forgets
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_the_answer_is_decoded_after_the_prompt(tmp_path, capsys, monkeypatch):
    """A blank before the first word of the answer stays, as SentencePiece's decoders take it away only where a text begins."""
    tokenizer = sentencepiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    wanted = tokenizer.encode("once upon a 你", add_special_tokens=False).ids
    monkeypatch.setattr("megatrain.verbs.generate.continuation", lambda *_, **__: iter(wanted[1:]))
    saved(tmp_path, config_of(vocab_size=tokenizer.get_vocab_size()))
    main(arguments(tmp_path, prompt="once", tokenizer=str(tmp_path / "tokenizer.json")))
    assert capsys.readouterr().out == "once upon a 你\n"


@pytest.mark.parametrize(
    ("template", "beside", "data", "prompt", "started", "ends"),
    [
        (False, {}, {}, "once", [262], (2,)),
        (True, {}, {}, "once", [1, 262], (2,)),
        (True, {}, {}, "", [1], (2,)),
        (False, {}, {}, "", [2], (2,)),
        (True, {}, {"bos": "none", "eod": "<unk>"}, "", [0], (0,)),
        (False, {"generation_config.json": '{"eos_token_id": [0, 2]}'}, {"bos": "<s>"}, "once", [1, 262], (2, 0)),
        (False, {"tokenizer_config.json": '{"bos_token": "<s>", "add_bos_token": true}'}, {}, "once", [1, 262], (2,)),
    ],
)
def test_a_text_begins_and_ends_as_the_tokenizer_says(
    tmp_path, capsys, monkeypatch, template, beside, data, prompt, started, ends
):
    tokenizer = sentencepiece(template=template)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (once,) = tokenizer.encode("once", add_special_tokens=False).ids
    for name, content in beside.items():
        (tmp_path / name).write_text(content)
    given = []
    monkeypatch.setattr("megatrain.verbs.generate.continuation", lambda *all: given.append((all[1], all[5])) or iter(()))
    config = config_of(vocab_size=tokenizer.get_vocab_size())
    saved(tmp_path, replace(config, data=replace(config.data, tokenizer=str(tmp_path / "tokenizer.json"), **data)))
    main(arguments(tmp_path, prompt=prompt))
    assert given == [([once if token == 262 else token for token in started], ends)]


LAYOUTS = [
    (1, ["parallel.virtual_pipeline_size=2", "parallel.schedule=zb_v"]),
    (2, ["parallel.pipeline_parallel_size=2"]),
    (2, ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2", "parallel.schedule=interleaved"]),
    (2, ["parallel.tensor_parallel_size=2"]),
    (4, ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]),
    (2, []),
]


@pytest.mark.parametrize(("size", "overrides"), LAYOUTS, ids=str)
@pytest.mark.parametrize("variant", [{"num_layers": 4}, {**VARIANTS[2], "num_layers": 4, "num_query_groups": 2}], ids=str)
def test_every_layout_writes_the_same_text(tmp_path, variant, size, overrides):
    path = saved(tmp_path, config_of(**variant), MeshShape(tp=2))
    alone = Decoder([model_of(config_of(**variant))])
    expected = list(continuation(alone, [1, 2, 3], 30, Sampling(), 5))
    config = laid_out(saved_config(path), overrides, size)

    def write(ctx):
        return list(continuation(load_decoder(path, config, ctx), [1, 2, 3], 30, Sampling(), 5))

    assert simulate(mesh_shape(config.parallel, size), write) == [expected] * size


def test_only_the_layout_can_be_chosen(tmp_path):
    config = saved_config(saved(tmp_path, config_of()))
    with pytest.raises(ConfigError, match=r"model\.num_layers=2: only the layout"):
        laid_out(config, ["model.num_layers=2"], 1)
    with pytest.raises(ConfigError, match="a world of size 1 cannot be split"):
        laid_out(config, ["parallel.pipeline_parallel_size=2"], 1)
    with pytest.raises(ConfigError, match="cannot have"):
        laid_out(config, ["parallel.schedule=zb_v"], 1)


def test_text_appears_token_by_token(tmp_path, monkeypatch):
    shown = []

    class Stream(io.StringIO):
        def flush(self):
            shown.append(self.getvalue())

    saved(tmp_path, config_of())
    monkeypatch.setattr(sys, "stdout", Stream())
    main(arguments(tmp_path, max_tokens=8))
    assert len(set(shown)) >= 2


def test_an_empty_prompt_starts_a_document(tmp_path, capsys):
    saved(tmp_path, config_of())
    assert main(arguments(tmp_path, prompt="")) == 0
    assert capsys.readouterr().out.strip()


def test_a_long_prompt_is_said_to_be_cut(tmp_path, capsys):
    saved(tmp_path, config_of())
    main(arguments(tmp_path, prompt="x" * 40))
    assert "the prompt has 40 tokens, and model.max_positions is 24: the last 12 are used" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, capsys):
    path = saved(tmp_path, config_of())
    damaged = path.with_name("step_00000009")
    damaged.mkdir()
    assert main(arguments(tmp_path)) == 0
    assert f"passed over {damaged}" in capsys.readouterr().err


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no whole checkpoint in"):
        main(arguments(tmp_path / "nowhere"))
    saved(tmp_path, config_of())
    with pytest.raises(ValueError, match=r"--tokenizer is lost\.json, and there is no such file"):
        main(arguments(tmp_path, tokenizer="lost.json"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    config = config_of(vocab_size=50)

    def write(ctx):
        model = whole_gpt(config.model, 50, ctx)
        weights = {p.spec.name: Portion.whole(p.spec, p) for p in model.logical_parameters()}
        return save(tmp_path / "checkpoints", Contents(5, {}, dump(config)), {"weights": weights}, ctx)

    simulate(1, write)
    with pytest.raises(ValueError, match="made token 98 of the prompt, and the checkpoint's vocabulary has 50 tokens"):
        main(arguments(tmp_path))
