import io
import json
import sys
from dataclasses import replace

import pytest
import torch
from tiny_checkpoint import arguments, config_of, model_of, saved, whole_gpt
from tokenizer_models import sentencepiece

from megatrain.assembly import mesh_shape
from megatrain.checkpoint.save import Contents, save
from megatrain.checkpoint.together import CheckpointError
from megatrain.config.load import dump
from megatrain.config.source import ConfigError
from megatrain.data.tokenizer import ByteTokenizer
from megatrain.inference.engine import Engine, EngineSettings
from megatrain.inference.opening import Opened, TokenizerWish
from megatrain.inference.overflow import whole_answers
from megatrain.inference.paged_model import ForwardModel
from megatrain.inference.requests import Request, Sampling, Scored
from megatrain.inference.text import TextStream
from megatrain.inference.text_plans import PlannedText
from megatrain.inference.trained import laid_out, load_chunks, saved_config
from megatrain.models.batch import MicroBatch
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.pipeline_parallel import Unsharded
from megatrain.parallel.portion import Portion
from megatrain.testing import simulate
from megatrain.training import schedule_of
from megatrain.verbs.generate import generate, main

SINGLE = ParallelContext.single()
CPU = torch.device("cpu")


def engine_of(chunks, config, ctx=SINGLE):
    weights = ForwardModel(ctx, chunks, schedule_of(config, 1, backward=False), Unsharded())
    return Engine(weights, settings=EngineSettings(cache_tokens=2048))


def continuation(engine, prompt, max_tokens, sampling, seed, ends=()):
    """The tokens after a prompt, in as many parts as the positions make of them."""
    (parts,) = whole_answers(engine, [Request(tuple(prompt), max_tokens, sampling, seed, ends=frozenset(ends))])
    return [scored.token for part in parts for scored in part.tokens]


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
    model, config, ids = model_of(config_of(**variant)), config_of(**variant), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    (answer,) = engine_of([model], config).run([Request(tuple(ids), 6, score_from=1)])
    ids = [*ids, *(scored.token for scored in answer.tokens)]
    wanted = [float(torch.log_softmax(full_logits(model, ids[:n]), -1)[ids[n]]) for n in range(1, len(ids))]
    assert [scored.logprob for scored in (*answer.prompt, *answer.tokens)] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("layout", [MeshShape(), MeshShape(tp=2), MeshShape(tp=4, dp=2)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_checkpoint_of_any_layout_gives_the_same_model(tmp_path, variant, layout):
    config = config_of(**variant)
    path = saved(tmp_path, config, layout)
    (model,) = load_chunks(path, config, SINGLE)
    assert saved_config(path) == config
    assert torch.equal(full_logits(model, [1, 2, 3]), full_logits(model_of(config), [1, 2, 3]))


def test_a_checkpoint_of_another_dtype_is_read_as_float32(tmp_path):
    (model,) = load_chunks(saved(tmp_path, config_of(), dtype=torch.bfloat16), config_of(), SINGLE)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_generation_goes_on_beyond_the_models_length():
    config = config_of()
    model = model_of(config)
    got = continuation(engine_of([model], config_of()), [1, 2, 3], 60, Sampling(greedy=True), 0)
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
    got = continuation(engine_of([model], config_of()), ids, 1, Sampling(greedy=True), 0)
    assert got == [int(full_logits(model, ids[-12:]).argmax())]


def test_the_end_token_stops():
    model = model_of(config_of())
    free = continuation(engine_of([model], config_of()), [1], 20, Sampling(greedy=True), 0)
    assert (
        continuation(engine_of([model], config_of()), [1], 20, Sampling(greedy=True), 0, ends=[free[3]])
        == free[: free.index(free[3])]
    )


def pretended(tokens, asked):
    """A plan that writes given tokens, and keeps its requests in `asked`."""

    def plan(request, manner, before, show=None):
        asked.append(request)
        stream = TextStream(manner.codec, before, manner.stops)
        text = "".join(map(stream.push, tokens)) + stream.finish()
        show(text)
        return PlannedText(text, tuple(Scored(token, 0.0, greedy=True) for token in tokens), "length")
        yield

    return plan


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
    monkeypatch.setattr("megatrain.verbs.prompt_plans.written", pretended(wanted[1:], []))
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
    monkeypatch.setattr("megatrain.verbs.prompt_plans.written", pretended([], given))
    config = config_of(vocab_size=tokenizer.get_vocab_size())
    saved(tmp_path, replace(config, data=replace(config.data, tokenizer=str(tmp_path / "tokenizer.json"), **data)))
    main(arguments(tmp_path, prompt=prompt))
    tokens = tuple(once if token == 262 else token for token in started)
    assert [(request.tokens, request.ends) for request in given] == [(tokens, frozenset(ends))]


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
    alone = engine_of([model_of(config_of(**variant))], config_of(**variant))
    expected = continuation(alone, [1, 2, 3], 30, Sampling(), 5)
    config = laid_out(saved_config(path), overrides, size)

    def write(ctx):
        return continuation(engine_of(load_chunks(path, config, ctx), config, ctx), [1, 2, 3], 30, Sampling(), 5)

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


def run_rows(tmp_path, rows, **more):
    """The rows of --output for rows of --input."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"prompt": None, "input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "out.jsonl"), **more}
    assert main(arguments(tmp_path, **given)) == 0
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_rows_have_the_texts_that_each_prompt_has_alone(tmp_path, capsys):
    saved(tmp_path, config_of())
    prompts = [
        ("ab", {"seed": 3}),
        ("c" * 30, {"greedy": True, "max_tokens": 20}),
        ("x", {"n": 2, "seed": 5, "logprobs": 1}),
        ("", {}),
    ]
    found = run_rows(tmp_path, [{"prompt": prompt, "id": n, **more} for n, (prompt, more) in enumerate(prompts)])
    assert [(row["index"], row["sample"], row["id"]) for row in found] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 0, 2),
        (2, 1, 2),
        (3, 0, 3),
    ]
    assert "1 of 4 prompts have up to 30 tokens, and model.max_positions is 24: the last 12 are used" in capsys.readouterr().err
    alone = [
        ("ab", {"seed": 3}),
        ("c" * 30, {"greedy": True, "max_tokens": 20}),
        ("x", {"seed": 5}),
        ("x", {"seed": 6}),
        ("", {}),
    ]
    for row, (prompt, more) in zip(found, alone, strict=True):
        main(arguments(tmp_path, prompt=prompt, **more))
        assert capsys.readouterr().out == prompt + row["text"] + "\n"
    assert found[2]["text"] != found[3]["text"] and len(found[1]["tokens"]) == 20
    assert all(lp <= top[0][1] for lp, top in zip(found[2]["logprobs"], found[2]["top_logprobs"], strict=True))
    assert [row["prompt_tokens"] for row in found] == [2, 30, 1, 1, 1]


def test_several_texts_on_standard_output(tmp_path, capsys):
    saved(tmp_path, config_of())
    main(arguments(tmp_path, prompt=["ab", "x"], n=2, seed=5))
    texts = capsys.readouterr().out.removesuffix("\n").split("\n---\n")
    assert [text[:1] for text in texts] == ["a", "a", "x", "x"]
    main(arguments(tmp_path, prompt="x", seed=6))
    assert capsys.readouterr().out == texts[3] + "\n"
    (tmp_path / "text.txt").write_text("ab\n")
    main(arguments(tmp_path, prompt=None, input=str(tmp_path / "text.txt"), seed=5))
    assert capsys.readouterr().out == texts[0] + "\n"
    (tmp_path / "in.jsonl").write_text('{"prompt": "x", "seed": 6}\n')
    main(arguments(tmp_path, prompt=None, input=str(tmp_path / "in.jsonl")))
    assert json.loads(capsys.readouterr().out)["text"] == texts[3][1:]


def test_nothing_is_left_of_an_output_that_did_not_come_to_its_end(tmp_path):
    saved(tmp_path, config_of())
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2: beam search of 12 tokens after a prompt of 20 needs"):
        run_rows(tmp_path, [{"prompt": "a"}, {"prompt": "b" * 20}], beams=2)
    with pytest.raises(ValueError, match=r"line 1: there is no chat template beside bytes: a base model goes on with texts"):
        run_rows(tmp_path, [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ValueError, match=r"line 1: the conversation has 141 tokens, and model\.max_positions is 24\. Leave"):
        run_rows(tmp_path, [{"messages": [{"role": "user", "content": "a"}]}], chat_template="alpaca")
    with pytest.raises(
        ValueError, match=r"^--output .*/none/out: No such file or directory.*\. Name a file in a folder that is there"
    ):
        run_rows(tmp_path, [{"prompt": "a"}], output=str(tmp_path / "none/out"))
    with pytest.raises(
        ValueError, match=r"^1,000,000,001 texts are asked for \(prompts x n\), and one call writes 1,048,576 at most"
    ):
        run_rows(tmp_path, [{"prompt": "a", "n": 10**9}, {"prompt": "a"}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "in.jsonl"]


def test_conversations_in_rows(tmp_path):
    saved(tmp_path, config_of(seq_length=256))
    said = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    open_answer = [*said, {"role": "assistant", "content": "b"}]
    first, second, third = run_rows(
        tmp_path,
        [
            {"messages": said},
            {"messages": open_answer, "continue_final_message": True},
            {"prompt": "S\n\n### Instruction:\na\n\n### Response:\n"},
        ],
        chat_template="alpaca",
        seed=4,
    )
    assert first["text"] == third["text"] and first["prompt_tokens"] == second["prompt_tokens"] - 1 == third["prompt_tokens"]


@pytest.mark.parametrize("shape", [MeshShape(tp=2, dp=2), MeshShape(pp=2)], ids=str)
def test_under_every_layout_the_first_rank_writes_the_same_rows(tmp_path, shape):
    config, path = config_of(), saved(tmp_path, config_of())
    rows = [{"prompt": prompt, "n": n} for prompt, n in (("ab", 1), ("x", 2), ("c" * 30, 1))]
    alone = run_rows(tmp_path, rows)
    given = arguments(tmp_path, prompt=None, input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "again.jsonl"))
    broken = arguments(tmp_path, prompt=["b" * 20], beams=2)
    nowhere = arguments(tmp_path, prompt=["a", "b"], output=str(tmp_path / "none/x"))
    laid = laid_out(
        config,
        [f"parallel.{name}_parallel_size=2" for name in ("tensor", "pipeline") if getattr(shape, name[0] + "p") > 1],
        shape.world,
    )

    def run(ctx):
        weights = ForwardModel(ctx, load_chunks(path, laid, ctx), schedule_of(laid, 1, backward=False), Unsharded())
        codec = ByteTokenizer()
        engine = Engine(weights, codec, EngineSettings(cache_tokens=512))
        model = Opened(path, laid, None, ctx, weights, engine, TokenizerWish(), lambda: codec)
        with pytest.raises(ValueError, match="beam search of 12 tokens after a prompt of 20 needs"):
            generate(broken, model)
        with pytest.raises(ValueError, match=r"--output .*none/x: No such file or directory"):
            generate(nowhere, model)
        return generate(given, model)

    assert simulate(shape, run) == [0] * shape.world
    assert [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()] == alone
