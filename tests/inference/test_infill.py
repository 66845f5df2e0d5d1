"""BlankPlaces that are filled: with a cache and without, under every layout, in the order of the text, by sampling and by beams."""

from dataclasses import replace

import pytest
import tiny_checkpoint
import torch
from tokenizer_models import sentencepiece

from megatrain.assembly import mesh_shape
from megatrain.checkpoint.save import Contents, save
from megatrain.config.load import dump, from_dict
from megatrain.data.samples.infilling import Sentinels
from megatrain.inference.beams import Beams, best_continuation
from megatrain.inference.engine import Engine, EngineSettings
from megatrain.inference.infill import Filling, parsed
from megatrain.inference.paged_model import ForwardModel
from megatrain.inference.requests import Request, Sampling, Scored
from megatrain.inference.text import TextStream
from megatrain.inference.text_places import BlankPlaces, Segment
from megatrain.inference.text_plans import PlannedText
from megatrain.inference.trained import laid_out, load_chunks, saved_config
from megatrain.kernels.attention_mask import AttentionMask
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.parallel.mesh import MeshShape, ParallelContext, Rows
from megatrain.parallel.pipeline_parallel import Unsharded
from megatrain.parallel.portion import Portion
from megatrain.testing import simulate
from megatrain.training import schedule_of
from megatrain.verbs.generate import main

IDS = Sentinels(sop=257, eop=258, cls=259, mask=260, gmask=261, smask=262, noise=263, eos=256)
V = 264
SHAPES = {
    "glm-1": {"family": "glm"},
    "chatglm-6b": {"position": "rope_2d", "norm_placement": "deepnorm"},
    "glm-130b": {"position": "rope", "norm_placement": "deepnorm"},
}


def config_of(shape="glm-1", **model):
    sizes = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 48, "vocab_size": V, "init_std": 0.4}
    data = {"objective": "glm", "tokenizer": "bytes", "glm": {"objective_mix": {"sentence": 0.0}}}
    return from_dict({"model": {**sizes, **SHAPES[shape], **model}, "data": data, "train": {"precision": "fp32"}})


def chunks_of(config, ctx=None):
    ctx = ctx or ParallelContext.single()
    build = Build(Rows(ctx.tp), torch.float32, ctx.device, config.model, config.model.vocab_size, seed=7)
    return [chunk.eval() for chunk in build_gpt(build)]


def engine_of(config, chunks=None, ctx=None):
    weights = ForwardModel(
        ctx or ParallelContext.single(), chunks or chunks_of(config), schedule_of(config, 1, backward=False), Unsharded()
    )
    return Engine(weights, settings=EngineSettings(block=4, cache_tokens=2048))


def filling_of(engine):
    """abc [MASK] de [gMASK]."""
    return Filling(engine, [[97, 98, 99], [100, 101], []], [IDS.mask, IDS.gmask], IDS, 256)


def fill(filling, max_tokens, sampling, seed, beams=None):
    """The tokens of the next blank."""
    request = filling.request(Request((0,), max_tokens, sampling, seed))
    if beams is None:
        tokens = [scored.token for scored in filling.engine.run([request])[0].tokens]
    else:
        tokens = list(best_continuation(filling.engine, request, beams).text_tokens)
    filling.fill(request, tokens)
    return tokens


def test_a_prompt_and_its_blanks():
    assert parsed("a[MASK]b[sMASK][gMASK]", IDS) == (["a", "b", "", ""], [260, 262, 261])
    assert parsed("def f(", IDS) == (["def f(", ""], [261])
    assert parsed("[mask] [XMASK]", IDS) == (["[mask] [XMASK]", ""], [261])


def whole_logits(config, tokens, positions, inside, sep):
    """Logits [v] after the last token, of everything at once and without a cache."""
    (model,) = chunks_of(config)
    s = len(tokens)
    columns = [torch.tensor(x)[:, None] for x in (tokens, tokens, [0.0] * s, positions)]
    mask = AttentionMask(prefix=torch.tensor([sep]))
    batch = MicroBatch(*columns, torch.zeros(1, dtype=torch.int64), mask=mask, block_positions=torch.tensor(inside)[:, None])
    with torch.no_grad():
        return model.head.logits(model(None, batch))[-1, 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_and_uncached_decoding_give_the_same_numbers(shape):
    config = config_of(shape)
    filling = filling_of(engine_of(config))
    first = filling.request(Request((0,), 5, Sampling(temperature=4.0), 1))
    assert first.tokens == (259, 97, 98, 99, 260, 100, 101, 261, 257)
    tokens = fill(filling, 5, Sampling(temperature=4.0), 1)
    request = filling.request(Request((0,), 5, Sampling(temperature=4.0), 3, score_from=9))
    (answer,) = filling.engine.run([request])
    assert answer.tokens and tokens and filling.engine.stats.prefix_hits >= 4
    ids = [*request.tokens, *(scored.token for scored in answer.tokens)]
    positions, inside = (x.tolist() for x in request.places.positions(0, len(ids)))
    for n in range(9, len(ids)):
        logits = whole_logits(config, ids[:n], positions[:n], inside[:n], 8)
        if n >= len(request.tokens):
            logits = logits.index_fill(0, torch.tensor(request.sampling.never), -torch.inf)
        scored = (*answer.prompt, *answer.tokens)[n - 9]
        assert scored.logprob == pytest.approx(float(torch.log_softmax(logits.double(), -1)[ids[n]]), abs=1e-5)
    at = {"glm-130b": list(range(8 + 1 + len(tokens), len(ids)))}.get(shape, [7] * (len(ids) - 9 - len(tokens)))
    assert positions[8:] == [4] * (1 + len(tokens)) + at
    assert inside[8:] == [*range(1, 2 + len(tokens)), *range(1, len(ids) - 8 - len(tokens))]


def test_the_end_of_a_piece_is_not_written():
    (model,) = chunks = chunks_of(config_of())
    plain = fill(filling_of(engine_of(config_of(), chunks)), 8, Sampling(greedy=True), 0)
    with torch.no_grad():  # the head is the embedding: an end of piece a little longer than the third token is preferred to it
        model.embedding.tokens.weight[IDS.eop] = 1.001 * model.embedding.tokens.weight[plain[2]]
    again = fill(filling_of(engine_of(config_of(), chunks)), 8, Sampling(greedy=True), 0)
    assert again == plain[: plain.index(plain[2])]


def test_what_is_not_text_is_not_written():
    engine = engine_of(config_of())
    for seed in range(6):
        filling = filling_of(engine)
        for _ in (0, 1):
            assert all(token < 256 for token in fill(filling, 8, Sampling(temperature=3.0), seed))
        assert all(token < 256 for token in fill(filling_of(engine), 4, Sampling(), 0, Beams(8)))


def test_a_model_whose_length_is_used_up_stops():
    filling = filling_of(engine_of(config_of(seq_length=16)))
    texts = [fill(filling, 100, Sampling(), n) for n in (0, 1)]
    assert 2 <= len(texts[0]) <= 5 and len(filling.tokens) <= 16
    with pytest.raises(ValueError, match=r"the prompt has 8 tokens and 2 blanks, and model\.max_positions is 11"):
        filling_of(engine_of(config_of(seq_length=11)))


def saved(directory, config, layout=None):
    def write(ctx):
        parameters = chunks_of(config, ctx)[0].logical_parameters()
        weights = {p.spec.name: Portion.whole(p.spec, p.detach()) for p in parameters}
        return save(directory / "checkpoints", Contents(5, {}, dump(config)), {"weights": weights}, ctx)

    return simulate(layout or MeshShape(), write)[0]


@pytest.mark.parametrize("beams", [None, Beams(3, 0.5)], ids=["sampling", "beams"])
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (2, ["parallel.tensor_parallel_size=2"]),
        (2, ["parallel.pipeline_parallel_size=2"]),
        (4, ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]),
        (2, ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2", "parallel.schedule=zb_v"]),
    ],
    ids=["tp2", "pp2", "tp2-pp2", "pp2-zb_v"],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_fills_alike(tmp_path, shape, size, layout, beams):
    def both(engine):
        filling = filling_of(engine)
        return [fill(filling, 6, Sampling(), n, beams) for n in (0, 1)]

    path = saved(tmp_path, config_of(shape), MeshShape(tp=2))
    config = laid_out(saved_config(path), layout, size)
    wanted = both(engine_of(config_of(shape)))

    def on_rank(ctx):
        return both(engine_of(config, load_chunks(path, config, ctx), ctx))

    filled = simulate(mesh_shape(config.parallel, size), on_rank)
    assert filled == [wanted] * size


def worth(engine, texts):
    """Log-probability of each text in the first blank, with tokens that are never said counted."""
    made = filling_of(engine).request(Request((0,), 0))
    start = len(made.tokens)
    asked = [replace(made, tokens=(*made.tokens, *text), score_from=start) for text in texts]
    return [sum(scored.logprob for scored in answer.prompt) for answer in engine.run(asked)]


def test_beams_that_are_wide_enough_find_the_best_text():
    """Of all texts of two tokens, none is better than what 200 beams find, were all tokens sayable."""
    engine = engine_of(config_of())
    request = filling_of(engine).request(Request((0,), 2))
    every = replace(request, sampling=Sampling(), ends=frozenset())
    found = best_continuation(engine, every, Beams(V))
    pairs = [(a, b) for a in range(0, V, 3) for b in range(0, V, 5)]
    values = worth(engine, [found.tokens, *pairs])
    assert values[0] == pytest.approx(found.log_probability, abs=1e-4)
    assert values[0] >= max(values[1:]) - 1e-4


def test_what_is_written_is_seen_by_the_next_blank():
    engine, probabilities = engine_of(config_of()), []
    for more in ([], [120]):
        filling = filling_of(engine)
        first = filling.request(Request((0,), 4))
        filling.fill(first, [65, *more])
        request = filling.request(Request((0,), 1, Sampling(greedy=True), top=3))
        probabilities.append(engine.run([request])[0].tokens[0].top)
    assert probabilities[0] != probabilities[1]


def arguments(checkpoint, **more):
    return tiny_checkpoint.arguments(checkpoint, **{"prompt": "ab[MASK]cd", "max_tokens": 6, "greedy": True, **more})


def test_the_program_writes_the_text_with_its_blanks_filled(tmp_path, capsys):
    saved(tmp_path, config_of())
    for prompt, ends in (("ab[MASK]cd", "cd\n"), ("ab", "\n")):
        assert main(arguments(tmp_path, prompt=[prompt])) == 0
        text = capsys.readouterr().out
        assert text.startswith("ab") and text.endswith(ends) and "[MASK]" not in text and len(text) > len(prompt) - 4
    assert main(arguments(tmp_path, beams=3, greedy=False)) == 0
    assert capsys.readouterr().out.endswith("cd\n")


def test_blanks_are_decoded_after_what_stands_before(tmp_path, capsys, monkeypatch):
    tokenizer = sentencepiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    filled = tokenizer.encode("once upon 你", add_special_tokens=False).ids[1:]

    def pretended(_request, manner, before, show):
        stream = TextStream(manner.codec, before)
        show(text := "".join(map(stream.push, filled)))
        return PlannedText(text, tuple(Scored(token, 0.0, greedy=True) for token in filled), "stop")
        yield

    monkeypatch.setattr("megatrain.inference.text_plans.written", pretended)
    saved(tmp_path, config_of(vocab_size=tokenizer.get_vocab_size() + 8))
    for beams in (None, 1, 2):
        main(arguments(tmp_path, prompt=["once[MASK] a[gMASK]"], tokenizer=str(tmp_path / "tokenizer.json"), beams=beams))
        assert capsys.readouterr().out == "once upon 你 a upon 你\n"


def test_a_conversation_with_a_glm_has_its_positions(tmp_path, capsys, monkeypatch):
    seen = []

    def pretended(request, _settings, _before, _show):
        seen.append(request)
        return PlannedText("x", (), "stop")
        yield

    monkeypatch.setattr("megatrain.verbs.prompt_plans.written", pretended)
    saved(tmp_path, config_of())
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "a[gMASK]"}]}\n')
    main(arguments(tmp_path, prompt=None, input=str(tmp_path / "in.jsonl"), chat_template="chatglm"))
    (request,) = seen
    assert request.tokens == (*b"a[gMASK]", IDS.gmask, IDS.sop)
    assert request.places == BlankPlaces(9, (Segment(9, 8),))
    assert IDS.eop in request.ends
    assert '"text": "x"' in capsys.readouterr().out


def test_each_blank_of_each_text_has_random_numbers_of_its_own(tmp_path, monkeypatch):
    seen = []

    def pretended(request, _settings, _before, _show):
        seen.append((request.seed, request.first_draw))
        return PlannedText("x", (), "stop")
        yield

    monkeypatch.setattr("megatrain.inference.text_plans.written", pretended)
    saved(tmp_path, config_of())
    main(arguments(tmp_path, prompt="a[MASK]b[MASK]", max_tokens=6, greedy=False, n=2, seed=3))
    assert seen == [(3, 0), (3, 6), (4, 0), (4, 6)]
    main(arguments(tmp_path, prompt="a[MASK]b[MASK]", max_tokens=10**20, greedy=False, seed=3))
    assert seen[4:] == [(3, 0), (3, config_of().model.positions)]
