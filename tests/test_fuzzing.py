"""The fuzzers' cases come again with their seed."""

import fuzzing
import pytest


@pytest.fixture
def fresh():
    fuzzing.seed.cache_clear()
    yield
    fuzzing.seed.cache_clear()


def test_a_seed_of_the_environment_gives_the_same_cases_whatever_their_number(fresh, monkeypatch):
    monkeypatch.setenv(fuzzing.SEED, "7")
    few = [(name, draw.random()) for name, draw in fuzzing.cases(0.0, "config")]
    many = [(name, draw.random()) for (name, draw), _ in zip(fuzzing.cases(60.0, "config"), range(3), strict=False)]
    assert [name for name, _ in many] == [f"case {n} of MEGATRAIN_FUZZ_SEED=7" for n in range(3)]
    assert few == many[:1]
    assert len({value for _, value in many}) == 3


def test_without_one_a_session_has_a_seed_of_its_own_and_keeps_it(fresh, monkeypatch):
    monkeypatch.delenv(fuzzing.SEED, raising=False)
    first = fuzzing.seed()
    assert first == fuzzing.seed()
    fuzzing.seed.cache_clear()
    assert first != fuzzing.seed()


def test_more_follow_until_they_are_enough():
    seen = []
    for name, _ in fuzzing.cases(0.0, "config", lambda: len(seen) == 3):
        seen.append(name)
    assert len(seen) == 3


def test_how_long(monkeypatch):
    monkeypatch.delenv(fuzzing.SECONDS, raising=False)
    assert (fuzzing.seconds(), fuzzing.seconds(slow=True)) == (6.0, 300.0)
    monkeypatch.setenv(fuzzing.SECONDS, "3")
    assert (fuzzing.seconds(), fuzzing.seconds(slow=True)) == (3.0, 3.0)
