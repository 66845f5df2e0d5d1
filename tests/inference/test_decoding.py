"""Beam search finds what exhaustive search finds, where it is wide enough; a cache that is reordered is the text read anew."""

import itertools
import math

import pytest
import torch

from megatrain.config.schema import ModelConfig
from megatrain.inference.decoding import Beams, Decoder, Sampling, beam_search, best_continuation, continuation
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.parallel.mesh import ParallelContext, Rows

V, LONGEST, END = 4, 4, 3


def table(seed):
    """Log-probabilities of the next token for every text of a tiny language."""
    generator = torch.Generator().manual_seed(seed)
    return {
        text: torch.log_softmax(2 * torch.randn(V, generator=generator, dtype=torch.float64), -1)
        for length in range(LONGEST)
        for text in itertools.product(range(V), repeat=length)
    }


class Language:
    """Sequences side by side, as a model with a cache has them."""

    def __init__(self, steps):
        self.steps, self.texts = steps, [()]

    def step(self, parents, tokens):
        self.texts = [(*self.texts[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        return torch.stack([self.steps[text] for text in self.texts])


def every_text(steps, beams):
    """(score, text) of all texts that end, or are as long as they may be; best first."""
    found = []
    for length in range(1, LONGEST + 1):
        for text in itertools.product(range(V), repeat=length):
            whole = END not in text[:-1] and (text[-1] == END or length == LONGEST)
            if whole:
                total = sum(float(steps[text[:n]][text[n]]) for n in range(length))
                found.append((beams.score(total, length), text))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0, -1.0])
@pytest.mark.parametrize("seed", range(12))
def test_wide_beams_are_exhaustive_search(seed, penalty):
    steps, beams = table(seed), Beams(V**LONGEST, penalty)
    best = every_text(steps, beams)[0]
    found = beam_search(steps[()], Language(steps).step, {END}, LONGEST, beams)
    assert found.tokens == best[1]
    assert beams.score(found.log_probability, len(found.tokens)) == pytest.approx(best[0], abs=1e-12)
    assert found.ended == (best[1][-1] == END)


def test_narrow_beams_are_never_worse_than_greedy_ones():
    better = 0
    for seed in range(60):
        steps = table(seed)
        scores = [
            beam_search(steps[()], Language(steps).step, {END}, LONGEST, Beams(count)).log_probability for count in (1, 2, 3)
        ]
        text = []
        while len(text) < LONGEST and END not in text:
            text.append(int(steps[tuple(text)].argmax()))
        greedy = sum(float(steps[tuple(text[:n])][text[n]]) for n in range(len(text)))
        assert scores[0] >= greedy - 1e-12
        assert max(scores) <= every_text(steps, Beams())[0][0] + 1e-12
        better += scores[2] > scores[0] + 1e-9
    assert better > 5


def test_it_stops_when_nothing_can_become_better():
    steps = {text: torch.tensor([-9.0, -9.0, -9.0, 0.0]).double() for text in table(0)}
    language, calls = Language(steps), []
    found = beam_search(steps[()], lambda *given: calls.append(1) or language.step(*given), {END}, LONGEST, Beams(1))
    assert found.tokens == (END,) and not calls


def gpt(**settings):
    shape = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": 24}
    model = ModelConfig(**{**shape, "init_std": 0.5, **settings})
    ctx = ParallelContext.single()
    return [chunk.eval() for chunk in build_gpt(Build(Rows(ctx.tp), torch.float32, ctx.device, model, 5, seed=7))]


def log_probability(prompt, text):
    """Of a text after a prompt, each token from a cache of its own."""
    total = 0.0
    for n, token in enumerate(text):
        logits = Decoder(gpt()).logits([*prompt, *text[:n]])
        total += float(torch.log_softmax(logits.double(), -1)[token])
    return total


def test_beams_of_a_model_are_exhaustive_search():
    prompt = [0, 1, 2]
    scores = {text: log_probability(prompt, text) for text in itertools.product(range(5), repeat=3)}
    best = max(scores, key=lambda text: scores[text])
    assert tuple(best_continuation(Decoder(gpt()), prompt, 3, Beams(125))) == best
    greedy = list(continuation(Decoder(gpt()), prompt, 3, Sampling(greedy=True), 0))
    assert list(best_continuation(Decoder(gpt()), prompt, 3, Beams(1))) == greedy


def test_beams_do_not_forget():
    with pytest.raises(ValueError, match=r"beam search of 30 tokens after a prompt of 3 .* Use --max-tokens 21"):
        best_continuation(Decoder(gpt()), [0, 1, 2], 30, Beams(2))
    assert len(best_continuation(Decoder(gpt()), [0, 1, 2], 21, Beams(2))) == 21
    with pytest.raises(
        ValueError, match=r"after a prompt of 24 .* Use a prompt of 23 tokens at most, or --greedy, which goes on"
    ):
        best_continuation(Decoder(gpt()), [0] * 24, 1, Beams(2))
    assert len(best_continuation(Decoder(gpt()), [0] * 23, 1, Beams(2))) == 1
    assert len(list(continuation(Decoder(gpt()), [0] * 24, 1, Sampling(greedy=True), 0))) == 1


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_model_decodes_as_far_as_it_has_positions_however_short_it_was_trained(position):
    text = [n % 5 for n in range(600)]
    longer = Decoder(gpt(seq_length=24, max_positions=600, position=position))
    whole = longer.logits(text)
    longer.restart()
    longer.seen = []
    for token in text[:3]:
        longer.logits([token])
    torch.testing.assert_close(longer.logits(text[3:]), whole)  # the cache has grown from 512
    assert longer.caches[0][0].keys.shape[0] == 600 and longer.seen == text
    longer.logits([1])
    assert longer.seen == [*text[-299:], 1]


def test_scores_are_divided_by_a_penalty():
    assert Beams(1, 0.0).score(-2.0, 9) == -2.0
    assert Beams(1, 1.0).score(-2.0, 7) == pytest.approx(-1.0)
    assert math.isclose(Beams(1, 0.5).score(-2.0, 7), -2.0 / 2**0.5)
