"""Blanks that are filled: with a cache and without, under every layout, in the order of the text, by sampling and by beams."""

import argparse
import itertools

import pytest
import torch
from tokenizer_models import sentencepiece

from megatrain.assembly import mesh_shape
from megatrain.checkpoint.save import Contents, save
from megatrain.config.load import dump, from_dict
from megatrain.data.samples.infilling import Sentinels
from megatrain.inference.decoding import Beams, Decoder, Sampling
from megatrain.inference.infill import Filling, parsed
from megatrain.inference.trained import laid_out, saved_config
from megatrain.kernels.attention_mask import AttentionMask
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.parallel.mesh import MeshShape, ParallelContext, Rows
from megatrain.parallel.portion import Portion
from megatrain.testing import simulate
from megatrain.verbs.generate import load_decoder, main

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


def filling_of(decoder):
    """abc [MASK] de [gMASK]."""
    return Filling(decoder, [[97, 98, 99], [100, 101], []], [IDS.mask, IDS.gmask], IDS, 256)


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
def test_cached_and_uncached_decoding_give_the_same_logits(shape, monkeypatch):
    config, seen = config_of(shape), []
    decoder = Decoder(chunks_of(config))
    feed = decoder.feed

    def watched(tokens, positions, inside, prefix=None):
        logits = feed(tokens, positions, inside, prefix)
        seen.append((tokens[:, 0].tolist(), positions[:, 0].tolist(), inside[:, 0].tolist(), logits[0]))
        return logits

    monkeypatch.setattr(decoder, "feed", watched)
    filling = filling_of(decoder)
    first = list(filling.fill(0, 5, Sampling(temperature=4.0), 1))
    second = list(filling.fill(1, 5, Sampling(temperature=4.0), 3))
    assert seen[0][0] == [259, 97, 98, 99, 260, 100, 101, 261] and first and second
    tokens, positions, inside = [], [], []
    for piece in seen:
        tokens, positions, inside = tokens + piece[0], positions + piece[1], inside + piece[2]
        torch.testing.assert_close(piece[3], whole_logits(config, tokens, positions, inside, 8), rtol=1e-5, atol=1e-5)
    at = {"glm-130b": list(range(8 + 1 + len(first), len(tokens)))}.get(shape, [7] * (len(tokens) - 9 - len(first)))
    assert positions[8:] == [4] * (1 + len(first)) + at
    assert inside[8:] == [*range(1, 2 + len(first)), *range(1, len(tokens) - 8 - len(first))]


def test_the_end_of_a_piece_is_not_written():
    (model,) = chunks = chunks_of(config_of())
    plain = list(filling_of(Decoder(chunks)).fill(0, 8, Sampling(greedy=True), 0))
    with torch.no_grad():  # the head is the embedding: an end of piece a little longer than the third token is preferred to it
        model.embedding.tokens.weight[IDS.eop] = 1.001 * model.embedding.tokens.weight[plain[2]]
    assert list(filling_of(Decoder(chunks)).fill(0, 8, Sampling(greedy=True), 0)) == plain[: plain.index(plain[2])]


def test_what_is_not_text_is_not_written():
    chunks = chunks_of(config_of())
    for seed in range(6):
        filling = filling_of(Decoder(chunks))
        for number in (0, 1):
            assert all(token < 256 for token in filling.fill(number, 8, Sampling(temperature=3.0), seed))
        assert all(token < 256 for token in filling_of(Decoder(chunks)).fill(0, 4, Sampling(), 0, Beams(8)))


def test_a_model_whose_length_is_used_up_stops():
    decoder = Decoder(chunks_of(config_of(seq_length=16)))
    filling = filling_of(decoder)
    texts = [list(filling.fill(n, 100, Sampling(), n)) for n in (0, 1)]
    assert 2 <= len(texts[0]) <= 5 and decoder.length <= 16
    with pytest.raises(ValueError, match=r"the prompt has 8 tokens and 2 blanks, and model\.max_positions is 11"):
        filling_of(Decoder(chunks_of(config_of(seq_length=11))))


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
    def fill(decoder):
        filling = filling_of(decoder)
        return [list(filling.fill(n, 6, Sampling(), n, beams)) for n in (0, 1)]

    path = saved(tmp_path, config_of(shape), MeshShape(tp=2))
    config = laid_out(saved_config(path), layout, size)
    wanted = fill(Decoder(chunks_of(config_of(shape))))
    filled = simulate(mesh_shape(config.parallel, size), lambda ctx: fill(load_decoder(path, config, ctx)))
    assert filled == [wanted] * size


def test_beams_that_are_wide_enough_find_the_best_text():
    """Of all texts of two tokens out of the likeliest twelve for a blank, none is better than what 200 beams find."""
    chunks = chunks_of(config_of())
    best = list(filling_of(Decoder(chunks)).fill(0, 2, Sampling(), 0, Beams(V)))

    def worth(text):
        decoder = Decoder(chunks)
        filling = filling_of(decoder)
        logits, total = filling._feed(0, [[IDS.sop]], 1)[0], 0.0
        for place, token in enumerate(text):
            total += float(torch.log_softmax(logits.double(), -1)[token])
            logits = filling._feed(0, [[token]], place + 2)[0]
        return total

    decoder = Decoder(chunks)
    likely = filling_of(decoder)._feed(0, [[IDS.sop]], 1)[0].topk(12).indices.tolist()
    texts = [t for t in itertools.product(likely, repeat=2) if IDS.eop not in t]
    ended = worth([*best, IDS.eop]) if len(best) < 2 else worth(best)
    assert ended >= max(worth(text) for text in texts) - 1e-9


def test_what_is_written_is_seen_by_the_next_blank():
    chunks = chunks_of(config_of())
    plain, after = filling_of(Decoder(chunks)), filling_of(Decoder(chunks))
    list(plain.fill(0, 1, Sampling(greedy=True), 0))
    list(after.fill(0, 1, Sampling(greedy=True), 0))
    after._feed(0, [[120]], 3)
    assert plain._feed(1, [[IDS.sop]], 1).ne(after._feed(1, [[IDS.sop]], 1)).any()


def arguments(checkpoint, **more):
    given = {
        "prompt": "ab[MASK]cd",
        "max_tokens": 6,
        "seed": 3,
        "tokenizer": None,
        "eod": None,
        "bos": None,
        "greedy": True,
        "beams": None,
    }
    others = {"temperature": 1.0, "top_k": None, "top_p": None, "overrides": [], "length_penalty": 0.0}
    return argparse.Namespace(checkpoint=str(checkpoint), **{**given, **others, **more})


def test_the_program_writes_the_text_with_its_blanks_filled(tmp_path, capsys):
    saved(tmp_path, config_of())
    for prompt, ends in (("ab[MASK]cd", "cd\n"), ("ab", "\n")):
        assert main(arguments(tmp_path, prompt=prompt)) == 0
        text = capsys.readouterr().out
        assert text.startswith("ab") and text.endswith(ends) and "[MASK]" not in text and len(text) > len(prompt) - 4
    assert main(arguments(tmp_path, beams=3, greedy=False)) == 0
    assert capsys.readouterr().out.endswith("cd\n")


def test_blanks_are_decoded_after_what_stands_before(tmp_path, capsys, monkeypatch):
    tokenizer = sentencepiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    filled = tokenizer.encode("once upon 你", add_special_tokens=False).ids[1:]
    monkeypatch.setattr("megatrain.inference.infill.Filling.fill", lambda *_, **__: iter(filled))
    saved(tmp_path, config_of(vocab_size=tokenizer.get_vocab_size() + 8))
    for beams in (None, 1, 2):
        main(arguments(tmp_path, prompt="once[MASK] a[gMASK]", tokenizer=str(tmp_path / "tokenizer.json"), beams=beams))
        assert capsys.readouterr().out == "once upon 你 a upon 你\n"
