"""Random numbers of the data are a function of their key, and are spread evenly."""

import time

import numpy as np

from megatrain.data.draws import Draws, hash64, permutation
from megatrain.testing.trace import RandomSamples


def test_a_stream_is_a_function_of_its_key():
    stream, again = Draws(1, 2, 3), Draws(1, 2, 3)
    whole = stream.uniform(100)
    assert np.array_equal(np.concatenate([again.uniform(30), again.uniform(70)]), whole)
    assert not np.intersect1d(whole, Draws(1, 2, 4).uniform(100)).size
    assert not np.intersect1d(whole, Draws(1, 23).uniform(100)).size


def test_the_numbers_are_pinned():
    """A run that resumes under another release must mask as before."""
    assert Draws(1, 2).uniform(3).tolist() == [0.9006109088931584, 0.28014258045387286, 0.007557212222805365]
    assert Draws(7).below(10, 8).tolist() == [7, 6, 5, 6, 3, 1, 9, 9]
    assert permutation(8, 5).tolist() == Draws(5).permutation(8).tolist()


def test_random_samples_are_those_of_the_hash_one_by_one():
    samples = RandomSamples(50_257, 128, seed=3)
    start = hash64(hash64(4) ^ 7)
    assert samples.sample(7).tolist() == [hash64(start + i) % 50_257 for i in range(129)]
    start = hash64(hash64(5) ^ 7)
    ends = [i > 0 and hash64(start + i) % 3 == 0 for i in range(129)]
    assert samples.document_numbers(7).tolist() == np.cumsum(ends).tolist()
    began = time.perf_counter()
    for n in range(100):
        RandomSamples(50_257, 4096).sample(n)
    assert time.perf_counter() - began < 1.0  # one by one it takes 20 times as long


def test_they_are_spread_evenly():
    numbers = Draws(3).uniform(200_000)
    assert abs(numbers.mean() - 0.5) < 0.003 and abs(numbers.var() - 1 / 12) < 0.001
    counts = np.bincount(Draws(4).below(7, 70_000), minlength=7)
    assert counts.size == 7 and abs(counts - 10_000).max() < 400
    assert {Draws(n).between(2, 4) for n in range(60)} == {2, 3, 4}
    firsts = np.bincount([Draws(n).permutation(5)[0] for n in range(5000)], minlength=5)
    assert abs(firsts - 1000).max() < 150


def test_neighbouring_keys_are_not_alike():
    numbers = np.array([Draws(9, n).one() for n in range(20_000)])
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03 and abs(numbers.mean() - 0.5) < 0.01
