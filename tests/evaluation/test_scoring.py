"""Scores of continuations and documents: windows, order, and that nothing depends on what is scored beside it."""

import itertools

import pytest
import torch
from engines import engine_of, weights_of

from megatrain.evaluation.joins import Join
from megatrain.evaluation.scoring import Window, dealt, sums_of, windows, windows_of
from megatrain.inference.requests import Request, Sampling
from megatrain.models.batch import MicroBatch
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.testing import simulate


def predicted(tokens, first, positions):
    """(what each window reads, what it predicts) of a text."""
    found = list(windows(tokens, first, positions))
    return [(window.tokens[:-1], window.tokens[window.first :]) for window in found]


def test_a_document_is_read_in_windows_that_predict_each_token_once():
    document = ("s", 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert predicted(document, 1, 4) == [
        (("s", 0, 1, 2), (0, 1, 2, 3)),
        ((3, 4, 5, 6), (4, 5, 6, 7)),
        ((5, 6, 7, 8), (8, 9)),
    ]
    assert predicted(document, 1, 10) == [(document[:-1], document[1:])]
    assert predicted(("s",), 1, 4) == []
    assert predicted(("g", "s", 0, 1, 2, 3), 2, 3) == [(("g", "s", 0), (0, 1)), ((0, 1, 2), (2, 3))]


def test_windows_fit_and_cover():
    for length, first, positions in itertools.product(range(2, 14), (1, 2, 5), (1, 2, 4, 7)):
        tokens = tuple(range(length))
        found = list(windows(tokens, first, positions))
        assert [token for window in found for token in window.tokens[window.first :]] == list(tokens[first:])
        assert all(window.first >= 1 and len(window.tokens) <= positions + 1 for window in found)
        # As much context as fits.
        assert all(len(window.tokens) == min(positions + 1, window.tokens[-1] + 1) for window in found)


def test_the_end_of_a_long_context_is_used():
    assert windows_of(Join((1, 2, 3), (4, 5)), 4) == [Window((1, 2, 3, 4, 5), 3)]
    assert windows_of(Join((1, 2, 3, 4), (5, 6)), 4) == [Window((2, 3, 4, 5, 6), 3)]
    assert windows_of(Join((1, 2, 3, 4), (5, 6, 7, 8)), 4) == [Window((4, 5, 6, 7, 8), 1)]
    # A continuation that does not fit is read as a document is.
    assert windows_of(Join((1, 2), (3, 4, 5, 6, 7)), 4) == [Window((1, 2, 3, 4, 5), 2), Window((3, 4, 5, 6, 7), 3)]


def test_replicas_get_about_as_many_tokens_each():
    weights = [9, 1, 1, 1, 3, 3, 9, 9]
    for parts in (1, 2, 3, 4, 9):
        found = dealt("abcdefgh", weights, parts)
        assert len(found) == parts and "".join(found) == "abcdefgh"
    assert dealt("abcdefgh", weights, 2) == ["abcdef", "gh"]
    assert dealt("", [], 3) == ["", "", ""]


V = 23
MODEL = {"seq_length": 24, "position": "rope"}
CONTEXTS = [tuple(range(n % 7, n % 7 + n)) for n in (1, 9, 16)]
JOINS = [
    *(Join(tuple(t % V for t in context), choice) for context in CONTEXTS for choice in ((3,), (5, 6, 7), (3, 9))),
    Join(tuple(t * 3 % V for t in range(40)), (4, 5)),
    Join((1, 2), tuple(t * 5 % V for t in range(50))),
    Join((1,), (2,)),
    Join((1,), (2,)),
]


def scored(engine, joins, ctx=None):
    return sums_of(engine, [windows_of(join, engine.max_length) for join in joins], ctx)


def rolling(engine, joins, ctx=None):
    parts = [list(windows((*of.context, *of.continuation), len(of.context), engine.max_length)) for of in joins]
    return sums_of(engine, parts, ctx)


def alone(join, weights):
    """The sum by the model's forward of whole windows, without a cache."""
    chunk, total, greedy = weights.chunks[0], 0.0, True
    for window in windows_of(join, MODEL["seq_length"]):
        ids = torch.tensor(window.tokens[:-1])[:, None]
        zeros = torch.zeros(ids.shape)
        batch = MicroBatch(ids, ids, zeros, torch.arange(len(ids))[:, None], torch.zeros(1, dtype=torch.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(chunk.head.logits(chunk(None, batch))[:, 0].double(), -1)
        for place in range(window.first, len(window.tokens)):
            total += float(logprobs[place - 1, window.tokens[place]])
            greedy &= int(logprobs[place - 1].argmax()) == window.tokens[place]
    return total, greedy


def test_scores_are_those_of_the_training_forward_under_every_layout():
    weights = weights_of(vocab_size=V, **MODEL)
    best = engine_of(weights).run([Request((1, 2, 3), 4, sampling=Sampling(greedy=True))])[0].tokens
    joins = [*JOINS, Join((1, 2, 3), tuple(of.token for of in best))]

    def work(ctx):
        engine = engine_of(weights_of(ctx, vocab_size=V, **MODEL), block=4)
        return scored(engine, joins, ctx), rolling(engine, [*joins, Join((1,), ())], ctx), engine.stats

    single, documents, stats = work(ParallelContext.single())
    for join, found in zip(joins, single, strict=True):
        total, greedy = alone(join, weights)
        assert found == (pytest.approx(total, abs=1e-5), greedy)
    assert single[-1][1] and not all(greedy for _, greedy in single)
    assert documents[-1] == (0.0, True)
    # The prefixes that choices share are read once, and what is asked twice is scored once.
    asked = {window for join in joins for window in windows_of(join, 24)}
    whole = {window for join in joins for window in windows((*join.context, *join.continuation), len(join.context), 24)}
    assert stats.prefix_hits >= 40 and stats.prompt_tokens == sum(
        len(window.tokens) for part in (asked, whole) for window in part
    )
    for layout in (MeshShape(dp=3), MeshShape(tp=2, dp=2), MeshShape(pp=2)):
        ranks = simulate(layout, work)
        assert all(rank[:2] == ranks[0][:2] for rank in ranks)
        for found, wanted in zip(ranks[0][0] + ranks[0][1], single + documents, strict=True):
            assert found == (pytest.approx(wanted[0], abs=1e-5), wanted[1])


def test_an_error_of_one_replica_is_that_of_all():
    def work(ctx):
        engine = engine_of(weights_of(ctx, vocab_size=V, **MODEL))
        with pytest.raises(ValueError, match="token 23 of the prompt is not in the model's vocabulary of 23 tokens"):
            scored(engine, [Join((1,), (2,)), Join((22, 22, 22), (23,))], ctx)
        return scored(engine, [Join((1,), (2,))], ctx)

    found = simulate(MeshShape(dp=2), work)
    assert found[0] == found[1]


def test_a_long_context_that_four_choices_share_is_read_once():
    context = tuple(n * 7 % V for n in range(1000))
    joins = [Join(context, tuple(range(n, n + 3))) for n in range(4)]
    engine = engine_of(weights_of(vocab_size=V, seq_length=1100, position="rope", num_layers=1), prefix_cache=True)
    together = scored(engine, joins)
    assert engine.stats.prompt_tokens == 4 * 1003 and engine.stats.prefix_hits == 3 * 62 * 16
    for join, found in zip(joins, together, strict=True):
        alone = engine_of(engine.model.weights, prefix_cache=False)
        assert found[0] == pytest.approx(scored(alone, [join])[0][0], abs=1e-5)
