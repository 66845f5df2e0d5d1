"""Beam search finds what exhaustive search finds, where it is wide enough."""

import itertools

import pytest
import torch
from engines import engine_of

from megatrain.inference.beams import Beams, beam_search, best_continuation, searched, width
from megatrain.inference.overflow import whole_answers
from megatrain.inference.requests import Request, Sampling

V, LONGEST, END = 4, 4, 3


def table(seed):
    """Log-probabilities of the next token for every text of a tiny language."""
    generator = torch.Generator().manual_seed(seed)
    return {
        text: torch.log_softmax(2 * torch.randn(V, generator=generator, dtype=torch.float64), -1)
        for length in range(LONGEST)
        for text in itertools.product(range(V), repeat=length)
    }


def search(steps, beams, asked=lambda texts: None):
    """The best text of a language that beams find."""

    def ask(texts):
        asked(texts)
        best = [steps[text].topk(min(V, width({END}, beams))) for text in texts]
        return [list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) for top in best]

    return searched(beam_search({END}, LONGEST, beams), ask)


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
    found = search(steps, beams)
    assert found.tokens == best[1]
    assert beams.score(found.log_probability, len(found.tokens)) == pytest.approx(best[0], abs=1e-12)
    assert found.ended == (best[1][-1] == END)


def test_narrow_beams_are_never_worse_than_greedy_ones():
    better = 0
    for seed in range(60):
        steps = table(seed)
        scores = [search(steps, Beams(count)).log_probability for count in (1, 2, 3)]
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
    calls = []
    assert search(steps, Beams(1), calls.append).tokens == (END,) and calls == [[()]]


def log_probability(prompt, text):
    """Of a text after a prompt."""
    (answer,) = engine_of().run([Request((*prompt, *text), 0, score_from=len(prompt))])
    return sum(scored.logprob for scored in answer.prompt)


def best(prompt, max_tokens, beams, engine=None):
    return best_continuation(engine or engine_of(), Request(tuple(prompt), max_tokens), beams).tokens


def test_beams_of_a_model_are_exhaustive_search():
    prompt = [0, 1, 2]
    scores = {text: log_probability(prompt, text) for text in itertools.product(range(5), repeat=3)}
    assert best(prompt, 3, Beams(125)) == max(scores, key=lambda text: scores[text])
    (answer,) = engine_of().run([Request((0, 1, 2), 3, Sampling(greedy=True))])
    assert best(prompt, 3, Beams(1)) == tuple(scored.token for scored in answer.tokens)


def test_as_many_beams_as_there_are_tokens_and_an_end():
    """More options than tokens would be asked for."""
    texts = [*itertools.product(range(4), repeat=2), (4,), *((first, 4) for first in range(4))]
    scores = {text: log_probability([0, 1, 2], text) for text in texts}
    found = best_continuation(engine_of(), Request((0, 1, 2), 2, ends=frozenset({4})), Beams(5))
    assert found.tokens == max(scores, key=lambda text: scores[text])


def test_beams_read_little_twice():
    engine = engine_of(block=4)
    best([0, 1, 2, 3] * 4, 6, Beams(3), engine)
    assert engine.stats.prefix_hits >= 16 * 5 * 3


def test_beams_do_not_forget():
    with pytest.raises(ValueError, match=r"beam search of 30 tokens after a prompt of 3 .* Use --max-tokens 21"):
        best([0, 1, 2], 30, Beams(2))
    assert len(best([0, 1, 2], 21, Beams(2))) == 21
    with pytest.raises(
        ValueError, match=r"after a prompt of 24 .* Use a prompt of 23 tokens at most, or --greedy, which goes on"
    ):
        best([0] * 24, 1, Beams(2))
    assert len(best([0] * 23, 1, Beams(2))) == 1
    (parts,) = whole_answers(engine_of(), [Request((0,) * 24, 1, Sampling(greedy=True))])
    assert [len(part.tokens) for part in parts] == [1]
