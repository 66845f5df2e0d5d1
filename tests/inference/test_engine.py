"""Requests side by side get what each gets alone: whatever is pre-empted, cached, cut in chunks, or dealt to ranks."""

import random
from dataclasses import replace

import pytest
import torch
from engines import engine_of, weights_of

from megatrain.data.tokenizer import ByteTokenizer
from megatrain.inference.requests import Request, Sampling
from megatrain.parallel.mesh import MeshShape
from megatrain.testing import simulate

V = 97
MODEL = {"num_layers": 4, "hidden_size": 32, "seq_length": 96, "init_std": 0.3, "position": "rope"}


def mixed(count=64, seed=1):
    """Requests of mixed lengths: greedy and sampled, with and without probabilities of the prompt."""
    draw = random.Random(seed)
    start = [draw.randrange(V) for _ in range(40)]
    made = []
    for number in range(count):
        prompt = (start if number % 3 == 0 else [])[: draw.randrange(40)] + [
            draw.randrange(V) for _ in range(draw.randrange(1, 30))
        ]
        sampling = Sampling(greedy=number % 2 == 0, temperature=0.9, top_p=0.9 if number % 5 == 0 else None)
        request = Request(tuple(prompt), draw.randrange(1, 24), sampling, seed=number, top=2 if number % 4 == 0 else None)
        made.append(replace(request, score_from=1) if number % 7 == 0 and len(prompt) > 1 else request)
    return made


def alone(requests, weights):
    return [engine_of(weights, prefix_cache=False).run([request])[0] for request in requests]


def require_same(answers, wanted):
    assert [[s.token for s in a.tokens] for a in answers] == [[s.token for s in a.tokens] for a in wanted]
    assert [(a.finish, a.stop) for a in answers] == [(a.finish, a.stop) for a in wanted]
    for found, of in zip(answers, wanted, strict=True):
        for one, other in zip((*found.prompt, *found.tokens), (*of.prompt, *of.tokens), strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.fixture(scope="module")
def weights():
    return weights_of(vocab_size=V, **MODEL)


@pytest.fixture(scope="module")
def wanted(weights):
    return alone(mixed(), weights)


def tokens_of(requests):
    return sum(len(r.tokens) + r.max_tokens for r in requests)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("settings", [{"block": 4}, {"block": 16, "step_tokens": 24, "most_running": 24}], ids=str)
def test_sixty_four_at_a_time_are_as_one(weights, wanted, settings, prefix_cache):
    """With a cache of 30% of what they need, so that some are pre-empted."""
    few = 0.3 * tokens_of(mixed()) if settings["block"] == 4 else 400
    engine = engine_of(weights, cache_tokens=int(few), prefix_cache=prefix_cache, **settings)
    answers = engine.run(mixed())
    require_same(answers, wanted)
    assert [(a.prompt, a.tokens) for a in answers] == [(a.prompt, a.tokens) for a in wanted], "to the last bit"
    assert engine.stats.preemptions > 0 and engine.stats.blocks_used == 0 and not engine.busy


def test_what_is_cached_changes_nothing(weights, wanted):
    engine = engine_of(weights, block=4)
    require_same(engine.run(mixed()), wanted)
    first = engine.stats.prefix_hits
    require_same(engine.run(mixed()), wanted)
    assert 0 < first < engine.stats.prefix_hits - first


@pytest.mark.parametrize(
    ("layout", "prefix_cache"), [(MeshShape(tp=2), False), (MeshShape(pp=2), False), (MeshShape(tp=2, pp=2), True)], ids=str
)
def test_every_rank_of_every_layout_has_the_same(wanted, layout, prefix_cache):
    """With a cache of 30% of what they need."""
    few = int(0.3 * tokens_of(mixed()))

    def run(ctx):
        engine = engine_of(weights_of(ctx, vocab_size=V, **MODEL), cache_tokens=few, block=4, prefix_cache=prefix_cache)
        return engine.run(mixed()), engine.stats

    ranks = simulate(layout, run)
    assert all(rank == ranks[0] for rank in ranks) and ranks[0][1].preemptions > 0
    require_same(ranks[0][0], wanted)


@pytest.mark.parametrize("position", ["alibi", "learned", "none"])
@pytest.mark.parametrize("more", [{}, {"window": 8}, {"sparse_block": 4, "sparse_local_blocks": 2}], ids=str)
def test_every_mask_and_position(position, more):
    weights, requests = weights_of(vocab_size=V, **{**MODEL, "position": position, **more}), mixed(12)
    engine = engine_of(weights, block=4, cache_tokens=300, step_tokens=20, most_running=8)
    require_same(engine.run(requests), alone(requests, weights))


def test_sampled_text_is_the_same_to_the_last_bit_beside_any_others(weights):
    one = mixed(1, seed=5)[0]
    request = replace(one, sampling=Sampling(temperature=1.3), max_tokens=20, top=None)
    (wanted,) = engine_of(weights).run([request])
    for count in (1, 3, 17):
        answers = engine_of(weights).run([*mixed(count, seed=count), request])
        assert [s.token for s in answers[-1].tokens] == [s.token for s in wanted.tokens]


def test_four_choices_after_one_context_read_it_once(weights):
    context = tuple(random.Random(0).randrange(V) for _ in range(64))
    requests = [Request((*context, a, b), 0, score_from=64) for a, b in ((1, 2), (3, 4), (1, 4), (5, 5))]
    engine = engine_of(weights, block=16)
    require_same(engine.run(requests), alone(requests, weights))
    assert engine.stats.prefix_hits == 3 * 48  # of 64, the last block is read for the token that follows it


def test_a_prompt_of_one_token_with_nothing_to_write_ends_at_once(weights):
    engine = engine_of(weights)
    for score_from in (None, 1):
        (answer,) = engine.run([Request((3,), 0, score_from=score_from)])
        assert (answer.tokens, answer.prompt, answer.finish) == ((), (), "length") and engine.stats.blocks_used == 0


def test_what_is_known_of_old_weights_is_forgotten(weights):
    engine = engine_of(weights_of(vocab_size=V, **MODEL), block=4)
    request = Request(tuple(range(40)), 4, Sampling(greedy=True))
    engine.run([request])
    with torch.no_grad():
        for parameter in engine.model.weights.chunks[0].parameters():
            parameter.mul_(1.1)
    engine.new_weights()
    (answer,) = engine.run([request])
    assert answer.cached_tokens == 0
    require_same([answer], alone([request], engine.model.weights))
    engine.add(request)
    with pytest.raises(ValueError, match="1 requests are under way; weights may change only between them"):
        engine.new_weights()


def test_a_request_that_is_cancelled_leaves_no_block(weights):
    engine = engine_of(weights, block=4, cache_tokens=400)
    numbers = [engine.add(request) for request in mixed(20)]
    for _ in range(3):
        engine.step()
    for number in numbers:
        engine.cancel(number)
    assert not engine.busy and engine.stats.blocks_used == 0 and engine.step() == []
    engine.cancel(numbers[0])
    with pytest.raises(KeyError):
        engine.answer(numbers[0])


def test_updates_add_up_to_the_answers(weights, wanted):
    engine = engine_of(weights, cache_tokens=600)
    numbers = [engine.add(request) for request in mixed()]
    found = {number: [] for number in numbers}
    ended = []
    while engine.busy:
        for update in engine.step():
            found[update.number] += update.tokens
            ended += [update.number] * (update.finish is not None)
    assert sorted(ended) == numbers
    assert [[s.token for s in found[n]] for n in numbers] == [[s.token for s in a.tokens] for a in wanted]
    assert [len(engine.answer(n).tokens) for n in numbers] == [len(found[n]) for n in numbers]


def test_an_end_token_ends_and_is_left_out(weights):
    (free,) = engine_of(weights).run([Request((1, 2), 12, Sampling(greedy=True))])
    tokens = [s.token for s in free.tokens]
    (answer,) = engine_of(weights).run([Request((1, 2), 12, Sampling(greedy=True), ends=frozenset({tokens[4]}))])
    assert [s.token for s in answer.tokens] == tokens[: tokens.index(tokens[4])]
    assert (answer.finish, answer.stop) == ("stop", tokens[4])


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(()), "a request has at least one token and no negative max_tokens; here 0 and 16"),
        (
            Request((1,) * 97),
            r"the prompt has 97 tokens, and the model has 96 positions \(model.max_positions\). Use a shorter prompt",
        ),
        (Request((1, 97)), "token 97 of the prompt is not in the model's vocabulary of 97 tokens"),
        (Request((1,) * 30, 40), r"need keys and values of 70 tokens, and the cache has room for 64. .*\(cache_tokens=70\)"),
        (Request((1, 2), score_from=0), "score_from=0 is no place after the first of a prompt of 2 tokens"),
        (
            Request((1,), sampling=Sampling(logit_bias=((99, 1.0),))),
            "logit_bias names token 99, and the vocabulary has 97 tokens",
        ),
        (Request((1,), top=98), "top=98 of a vocabulary of 97 tokens cannot be told"),
        (Request((1,), stops=("x",)), "text and stop strings need a tokenizer"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_said(weights, request_, said):
    with pytest.raises(ValueError, match=said):
        engine_of(weights, cache_tokens=64).add(request_)


def test_a_model_that_has_diverged_is_said(weights):
    broken = weights_of(vocab_size=V, **MODEL)
    with torch.no_grad():
        broken.chunks[0].embedding.tokens.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="training has diverged"):
        engine_of(broken).run([Request((1,), 1)])


def test_a_stop_string_ends_and_is_cut_off():
    weights, codec = weights_of(vocab_size=257, **MODEL), ByteTokenizer()
    request = Request(tuple(codec.encode("once")), 40, Sampling(temperature=0.7), seed=2, text=True)
    (free,) = engine_of(weights, codec).run([request])
    assert free.text == codec.decode([*request.tokens, *(s.token for s in free.tokens)])[4:]
    stop = free.text[11:14]
    (answer,) = engine_of(weights, codec).run([replace(request, stops=("not there", stop))])
    assert answer.text == free.text[: free.text.index(stop)]
    assert (answer.finish, answer.stop) == ("stop", stop)
    shown, engine = [], engine_of(weights, codec)
    engine.add(replace(request, stops=(stop,)))
    while engine.busy:
        shown += [update.text for update in engine.step()]
    assert "".join(shown) == answer.text and len([text for text in shown if text]) > 3
