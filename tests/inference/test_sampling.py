"""Tokens are chosen as their settings say, each from a number of its own."""

import pytest
import torch
from engines import engine_of

from megatrain.inference.requests import Request, Sampling
from megatrain.inference.sampling import TokenChoice, choose, probabilities, without_never

LOGITS = torch.tensor([0.1, 0.5, 0.2, 0.15, 0.05]).log()


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        (Sampling(), [0.1, 0.5, 0.2, 0.15, 0.05]),
        (Sampling(top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(top_k=2), [0, 5 / 7, 2 / 7, 0, 0]),
        (Sampling(top_k=99), [0.1, 0.5, 0.2, 0.15, 0.05]),
        (Sampling(top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.6), [0, 5 / 7, 2 / 7, 0, 0]),
        (Sampling(top_p=0.8), [0, 0.5 / 0.85, 0.2 / 0.85, 0.15 / 0.85, 0]),
        (Sampling(top_p=1.0), [0.1, 0.5, 0.2, 0.15, 0.05]),
        (Sampling(top_k=2, top_p=0.72), [0, 5 / 7, 2 / 7, 0, 0]),
        (Sampling(top_k=2, top_p=0.7), [0, 1, 0, 0, 0]),
        (Sampling(min_p=0.39), [0, 0.5 / 0.7, 0.2 / 0.7, 0, 0]),
        (Sampling(min_p=0.0), [0.1, 0.5, 0.2, 0.15, 0.05]),
        (Sampling(min_p=1.0), [0, 1, 0, 0, 0]),
        (Sampling(temperature=0.5), [p * p / 0.325 for p in (0.1, 0.5, 0.2, 0.15, 0.05)]),
        (Sampling(temperature=1e-40), [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_probabilities(sampling, want):
    """Also beside rows that are cut otherwise."""
    beside = [Sampling(), sampling, Sampling(top_p=0.3, min_p=0.9)]
    torch.testing.assert_close(probabilities(LOGITS.expand(3, -1), beside)[1], torch.tensor(want, dtype=torch.float32))


def greedy(sampling, prompt=(), answer=()):
    return int(choose(LOGITS[None], [TokenChoice(sampling, 0, 0, prompt, answer)]))


def test_penalties_and_bias():
    assert greedy(Sampling(greedy=True)) == 1
    assert greedy(Sampling(greedy=True, repetition_penalty=3.0), prompt=(1,)) == 2  # log .5 x 3 < log .2
    assert greedy(Sampling(greedy=True, repetition_penalty=2.0), prompt=(1,)) == 1
    assert greedy(Sampling(greedy=True, presence_penalty=1.0), prompt=(1,)) == 1  # the prompt is no answer
    assert greedy(Sampling(greedy=True, presence_penalty=1.0), answer=(1,)) == 2
    assert greedy(Sampling(greedy=True, presence_penalty=0.9), answer=(1, 1, 1)) == 1
    assert greedy(Sampling(greedy=True, frequency_penalty=0.35), answer=(1, 1, 1)) == 2
    assert greedy(Sampling(greedy=True, frequency_penalty=0.3), answer=(1, 1, 1)) == 1
    assert greedy(Sampling(greedy=True, logit_bias=((4, 2.4),))) == 4
    assert greedy(Sampling(greedy=True, logit_bias=((1, -100.0), (2, -100.0)))) == 3


def test_what_is_never_said_has_no_probability():
    choices = [TokenChoice(Sampling(never=(1, 2)), 0, 0), TokenChoice(Sampling(), 0, 0)]
    p = torch.softmax(without_never(LOGITS.expand(2, -1), choices), -1)
    torch.testing.assert_close(p, torch.tensor([[1 / 3, 0, 0, 0.5, 1 / 6], [0.1, 0.5, 0.2, 0.15, 0.05]]))


def draws(seed, n):
    return choose(LOGITS.expand(n, -1), [TokenChoice(Sampling(top_k=3), seed, number) for number in range(n)]).tolist()


def test_draws_follow_the_probabilities_the_seed_and_the_number():
    assert draws(1, 50) == draws(1, 50) != draws(2, 50)
    assert draws(1, 80)[:50] == draws(1, 50)
    counts = torch.bincount(torch.tensor(draws(3, 20000)), minlength=5) / 20000
    torch.testing.assert_close(counts, torch.tensor([0, 0.5, 0.2, 0.15, 0.0]) / 0.85, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.0}, r"temperature=0\.0 cannot be: use a number above 0; greedy for the most probable token"),
        ({"temperature": float("inf")}, "temperature=inf cannot be"),
        ({"top_k": 0}, r"top_k=0 cannot be: use a number from 1 on"),
        ({"top_p": 0.0}, r"top_p=0\.0 cannot be: use a number above 0, at most 1"),
        ({"min_p": 1.5}, r"min_p=1\.5 cannot be: use a number from 0 to 1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0 cannot be: use a number above 0; 1 is none"),
        ({"presence_penalty": float("nan")}, "presence_penalty, frequency_penalty and logit_bias are finite numbers"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(settings, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**settings)


def test_no_global_generator_is_touched():
    before = torch.get_rng_state()
    engine_of().run([Request((1,), 3, seed=5)])
    assert torch.equal(torch.get_rng_state(), before)
