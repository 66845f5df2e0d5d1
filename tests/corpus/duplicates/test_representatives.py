"""Which documents stay: decisions in order, whatever is held in memory at a time."""

import random

import numpy as np
import pytest

from megatrain.corpus.duplicates import fingerprints, near, representatives
from megatrain.corpus.duplicates.key_files import KeyFileError, written
from megatrain.corpus.duplicates.parameters import DedupConfig


def pages(draw, number):
    """Pages of some templates."""
    texts = []
    for _ in range(number):
        words = [f"t{draw.randrange(4)}-{i}" if i % 30 == 0 else f"t{number % 3}-{i}" for i in range(90)]
        for _ in range(draw.randrange(3)):
            words[draw.randrange(90)] = f"x{draw.randrange(1000)}"
        texts.append(" ".join(words))
    return texts


def test_the_result_does_not_depend_on_what_is_held_at_a_time(deduplicated, monkeypatch):
    texts = pages(random.Random(2), 150)
    lines = DedupConfig(lines="lines", line_letters=1, parts=2)
    expected = deduplicated([texts], lines)
    assert 100 < len(expected.instead) < 150
    monkeypatch.setattr(fingerprints, "_BATCH_LETTERS", 1000)
    monkeypatch.setattr(fingerprints, "_BLOCK_DOCUMENTS", 11)
    monkeypatch.setattr(near, "_BATCH", 20)
    monkeypatch.setattr(representatives, "_WINDOW", 3000)
    found = deduplicated([texts[:31], texts[31:]], lines)
    assert (found.instead, found.agreement, found.lines) == (expected.instead, expected.agreement, expected.lines)


def test_with_few_to_compare_with_less_is_removed_and_nothing_wrong(deduplicated, monkeypatch):
    texts = pages(random.Random(2), 150)
    expected = deduplicated([texts], DedupConfig())
    monkeypatch.setattr(near, "SMALL", 1)
    assert deduplicated([texts], DedupConfig()).instead == expected.instead
    monkeypatch.setattr(representatives, "MOST_KEPT", 1)
    found = deduplicated([texts], DedupConfig())
    assert 0 < len(found.instead) <= len(expected.instead)
    assert all(other not in found.instead for other in found.instead.values())
    assert min(found.agreement.values()) >= 0.7


def test_a_copy_of_a_document_that_goes_has_the_one_that_stays(deduplicated):
    words = [f"w{i}" for i in range(100)]
    near_it = " ".join(words[4:])
    found = deduplicated([[" ".join(words), near_it, near_it, near_it.upper()]], DedupConfig())
    assert found.instead == {1: 0, 2: 0, 3: 0}
    assert found.reason == {1: "duplicates.near", 2: "duplicates.exact", 3: "duplicates.near"}
    assert found.agreement[1] == found.agreement[2] == found.agreement[3] < 1


@pytest.mark.parametrize(("document", "first"), [([1, 9], [0, 0]), ([1], [7]), ([1, 2], [0])])
def test_numbers_that_cannot_be_are_an_error(deduplicated, tmp_path, document, first):
    found = deduplicated([["a b c d e", "f g h i j"]], DedupConfig())
    with written(tmp_path / "copies", "copies") as writer:
        writer.block({"document": np.array(document), "first": np.array(first)})
    with pytest.raises(
        KeyFileError, match=r"copies is damaged: document (or first is beyond the 2 documents|and first are not)"
    ):
        representatives.merge(found.places, found.units, [tmp_path / "copies"], [], DedupConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
