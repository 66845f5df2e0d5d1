"""Near duplicates against brute force: the true Jaccard similarity of every pair of documents, from sets of their shingles."""

import random
from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest

from megatrain.corpus.duplicates.key_files import KeyFile
from megatrain.corpus.duplicates.minhash import HASHES, agreeing, band_keys, signatures
from megatrain.corpus.duplicates.near import PAIRS, SMALL, near_task
from megatrain.corpus.duplicates.parameters import DedupConfig

NEAR = DedupConfig(exact="none")
CHINESE = [chr(code) for code in range(0x4E00, 0x4E00 + 2500)]


def shingles(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(one: list[str], other: list[str]) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def edited(words: list[str], draw: random.Random) -> list[str]:
    """The words with scattered ones replaced, a block of them, the end cut off, or something put in front."""
    n, share = len(words), draw.choice([0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.2, 0.35])
    kind = draw.randrange(4)
    if kind == 0:
        return [draw.choice(words) if draw.random() < share else word for word in words]
    at, length = draw.randrange(n), int(share * n)
    block = [f"new{draw.randrange(10**6)}" for _ in range(length)]
    return [words[:at] + block + words[at + length :], words[: n - length], block + words][kind - 1]


def planted(draw: random.Random, number: int) -> list[list[str]]:
    """Documents of words, some edited ones of others before them."""
    vocabulary = [f"w{i}" for i in range(3000)]
    texts: list[list[str]] = []
    for _ in range(number):
        fresh = not texts or draw.random() < 0.4
        texts.append(
            [draw.choice(vocabulary) for _ in range(draw.randrange(80, 250))] if fresh else edited(draw.choice(texts), draw)
        )
    return texts


def first_independent_set(near: dict[int, set[int]], number: int) -> dict[int, int]:
    instead: dict[int, int] = {}
    for document in range(number):
        stay = [other for other in near[document] if other < document and other not in instead]
        if stay:
            instead[document] = min(stay)
    return instead


def test_removed_are_those_that_brute_force_finds(deduplicated):
    draw = random.Random(11)
    texts = planted(draw, 120)
    found = deduplicated([[" ".join(words) for words in texts]], NEAR)
    sets = [shingles(words) for words in texts]
    similar = {(i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i, j in combinations(range(120), 2)}
    alike = {j for (i, j), value in similar.items() if value >= 0.8 and i not in found.instead}
    closest = [max(similar[i, j] for i in range(j)) for j in range(1, 120)]
    assert len(alike) > 25
    assert len(alike & found.instead.keys()) / len(alike) >= 0.98
    unlike = {j for j, value in enumerate(closest, 1) if value <= 0.6}
    assert len(unlike) > 40
    assert unlike & found.instead.keys() == set()
    assert all(other not in found.instead for other in found.instead.values())
    assert min(found.agreement.values()) >= 0.7


def test_it_is_the_first_independent_set_of_all_pairs_that_share_a_band(deduplicated):
    """For any number of parts, and any units."""
    draw = random.Random(12)
    texts = [" ".join(words) for words in planted(draw, 200)]
    signed, _ = signatures(texts)
    keys = band_keys(signed, 20, 6)
    near, agree = defaultdict(set), {}
    for i, j in combinations(range(200), 2):
        if (keys[:, i] == keys[:, j]).any() and (signed[i] == signed[j]).sum() >= 84:
            near[j].add(i)
            agree[j, i] = (signed[i] == signed[j]).sum() / HASHES
    expected = first_independent_set(near, 200)
    assert len(expected) > 50
    for units in ([texts], [texts[:3], [], texts[3:120], texts[120:]]):
        for parts in (1, 3):
            found = deduplicated(units, DedupConfig(exact="none", parts=parts))
            assert found.instead == expected
            assert found.agreement == {j: agree[j, i] for j, i in expected.items()}
            assert set(found.reason.values()) == {"duplicates.near"}


def test_chinese_is_compared_by_characters(deduplicated):
    draw = random.Random(13)
    texts = [[draw.choice(CHINESE) for _ in range(300)] for _ in range(40)]
    copies = [
        [draw.choice(CHINESE) if draw.random() < share else letter for letter in text]
        for text in texts
        for share in (0.01, 0.3)
    ]
    found = deduplicated([["".join(text) for text in texts + copies]], NEAR)
    assert {j for j in found.instead if j % 2} == set()  # 30% of the characters are others: J is about 0.1
    assert len(found.instead) >= 38
    assert all((j - 40) // 2 == i for j, i in found.instead.items())


def test_a_chain_does_not_swallow_what_is_not_alike(deduplicated):
    words = [f"w{i}" for i in range(400)]
    chain = [words[start : start + 200] for start in range(0, 200, 20)]
    assert [round(jaccard(chain[0], other), 2) for other in chain[:4]] == [1.0, 0.81, 0.66, 0.53]
    found = deduplicated([[" ".join(text) for text in chain]], NEAR)
    assert found.instead == {1: 0, 2: 0, 4: 3, 5: 3, 7: 6, 9: 8}
    assert all(jaccard(chain[document], chain[other]) > 0.6 for document, other in found.instead.items())


def test_twenty_thousand_copies_take_a_second(deduplicated):
    texts = ["this page has moved, please update your bookmarks"] * 20_000
    found = deduplicated([texts[:9_000], texts[9_000:]], DedupConfig(bands=2))
    assert found.instead == dict.fromkeys(range(1, 20_000), 0)
    assert found.removals.sizes() == {19_999: 1}


def similar_to_one(number: int, length: int, draw: random.Random) -> list[str]:
    """Texts that differ from one in a word each."""
    words = [f"w{i}" for i in range(length)]
    places = [draw.randrange(length) for _ in range(number)]
    return [" ".join([*words[:at], f"x{i}", *words[at + 1 :]]) for i, at in enumerate(places)]


def test_a_large_group_is_compared_with_those_that_stay(deduplicated, tmp_path):
    """Of 300 pages of one template, J about 0.9; before them one that is near some of them alone."""
    draw = random.Random(5)
    texts = similar_to_one(300, 120, draw)
    texts = [" ".join(f"w{i}" for i in range(28, 120)), *texts, "a text of something else entirely, with words enough"]
    signed, _ = signatures(texts)
    keys = band_keys(signed, 20, 6)
    near = defaultdict(set)
    for i, j in combinations(range(len(texts)), 2):
        if (keys[:, i] == keys[:, j]).any() and (signed[i] == signed[j]).sum() >= 84:
            near[j].add(i)
    expected = first_independent_set(near, len(texts))
    assert set(expected.values()) > {0}  # some are near the first one, the others near one of themselves
    for units, parts in (([texts], 1), ([texts[:150], texts[150:]], 3)):
        assert deduplicated(units, DedupConfig(exact="none", parts=parts)).instead == expected
    found = deduplicated([texts], NEAR)
    near_task(3, 0, 1, found.units, NEAR, tmp_path / "pairs")
    file = KeyFile(tmp_path / "pairs", PAIRS)
    assert file.about["groups"] == 1
    assert len(file.read("member")) > SMALL


@pytest.mark.parametrize(("agreement", "instead"), [(0.7, {1: 0}), (0.95, {})])
def test_how_alike_is_a_setting(deduplicated, agreement, instead):
    words = [f"w{i}" for i in range(200)]
    texts = [" ".join(words), " ".join(words[20:])]
    assert deduplicated([texts], DedupConfig(agreement=agreement)).instead == instead


def test_texts_without_words_and_short_ones(deduplicated):
    texts = ["", " \n", "", "page not found", "Page  not found", "page not there", "404"]
    found = deduplicated([texts], NEAR)
    assert found.instead == {4: 3}
    assert deduplicated([texts], DedupConfig()).reason == {2: "duplicates.exact", 4: "duplicates.near"}


def test_agreeing_counts_equal_numbers():
    one, other = np.arange(HASHES, dtype=np.uint32), np.arange(HASHES, dtype=np.uint32)
    other[[3, 50, 119]] = 7777
    assert agreeing(one, other) == HASHES - 3


@pytest.mark.slow
def test_shares_by_similarity():
    """Of 20,000 pairs each by true similarity: from 0.8 at least 0.98 are found, up to 0.6 under 0.01, up to 0.5 under 0.0001."""
    draw = random.Random(17)
    counts = {(0.8, 1.0): [0, 0], (0.5, 0.6): [0, 0], (0.0, 0.5): [0, 0]}
    while min(total for total, _ in counts.values()) < 20_000:
        texts = [[str(draw.randrange(10**6)) for _ in range(120)] for _ in range(2000)]
        others = [list(words) for words in texts]
        for other in others:  # scattered words, or a block of them, so that each similarity comes about
            length = draw.choice((1, 2, 30, 40))
            for at in draw.sample(range(120 - length), draw.randrange(1, 10) if length < 3 else 1):
                other[at : at + length] = [str(draw.randrange(10**6)) for _ in range(length)]
        signed, _ = signatures([" ".join(words) for words in texts + others])
        keys = band_keys(signed, 20, 6)
        found = (keys[:, :2000] == keys[:, 2000:]).any(0) & ((signed[:2000] == signed[2000:]).sum(1) >= 84)
        for i, (one, other) in enumerate(zip(texts, others, strict=True)):
            value = jaccard(one, other)
            for (low, high), count in counts.items():
                if low <= value <= high:
                    count[0] += 1
                    count[1] += int(found[i])
    shares = {bounds: removed / total for bounds, (total, removed) in counts.items()}
    print(counts)
    assert shares[0.8, 1.0] >= 0.98
    assert shares[0.5, 0.6] < 0.01
    assert shares[0.0, 0.5] < 0.0001


@pytest.mark.slow
def test_a_hundred_thousand_unrelated_documents_have_no_pair(deduplicated):
    draw = np.random.default_rng(1)
    frequent = np.array([f"w{i}" for i in range(20_000)])
    ranks = np.minimum(draw.zipf(1.2, (100_000, 120)) - 1, 19_999)
    texts = [" ".join(words) for words in frequent[ranks]]
    assert deduplicated([texts[:40_000], texts[40_000:]], DedupConfig(parts=2)).instead == {}
