"""Random numbers of the data are a function of their key, and are spread evenly."""

import numpy as np

from megatrain.data.draws import Draws, permutation


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
