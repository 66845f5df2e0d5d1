"""Lines that were there before: the same as those that a dictionary finds."""

import random
import re

import numpy as np
import pytest

from megatrain.corpus.duplicates.key_files import KeyFile, KeyFileError, written
from megatrain.corpus.duplicates.line_copies import lines_task
from megatrain.corpus.duplicates.normal import without
from megatrain.corpus.duplicates.parameters import DedupConfig


def removed_by_hand(texts, cut, least, gone=()):
    seen, removed = set(), {}
    for row, text in enumerate(texts):
        if row in gone:
            continue
        for number, line in enumerate(re.split(cut, text)):
            form = " ".join(re.sub(r"[^\w\s]", "", re.sub(r"\d", "0", line.lower())).split())
            if len(form) < least:
                continue
            if form in seen:
                removed.setdefault(row, []).append(number)
            seen.add(form)
    return removed


@pytest.mark.parametrize(("part", "cut"), [("lines", r"\n"), ("paragraphs", r"\n\n+")])
def test_lines_of_any_units_and_parts_are_those_of_a_dictionary(deduplicated, part, cut):
    draw = random.Random(3)
    texts = ["".join(draw.choice("aB1 .\n\n") for _ in range(draw.randrange(25))) for _ in range(160)]
    expected = removed_by_hand(texts, cut, 2)
    assert len(expected) > 20
    for units in ([texts], [texts[:1], [], texts[1:70], texts[70:]]):
        for parts in (1, 3):
            found = deduplicated(units, DedupConfig(exact="none", near=False, lines=part, line_letters=2, parts=parts))
            assert found.lines == expected
            assert found.instead == {}


def test_lines_of_removed_documents_do_not_count(deduplicated):
    texts = [
        "one line that is here first",
        "another line of this text",
        "one line that is here first",
        "One line that is here, first!\nmore",
    ]
    lines = DedupConfig(near=False, lines="lines")
    assert deduplicated([texts], lines).lines == {3: [0]}
    copied = [texts[0], texts[0], texts[3]]
    found = deduplicated([copied], lines)
    assert (found.instead, found.lines) == ({1: 0}, {2: [0]})
    assert without(copied[2], "lines", found.lines[2]) == "more"


def test_short_lines_stay_and_lines_of_one_document_repeat(deduplicated):
    texts = ["Yes.\nA menu of the site\nYes.\na  MENU of the site", "A menu of the site"]
    assert deduplicated([texts], DedupConfig(near=False, lines="lines")).lines == {0: [3], 1: [0]}


def test_lines_of_code_stay(deduplicated):
    line = "import of the same module"
    found = deduplicated([[f"#!\n{line}\n{line}", line, f"#! {line}", f"x\n{line}"]], DedupConfig(near=False, lines="lines"))
    assert found.lines == {3: [1]}


def test_counts_that_are_not_those_of_the_lines_are_an_error(tmp_path, deduplicated):
    settings = DedupConfig(near=False, lines="lines")
    found = deduplicated([["a line of twelve letters\nb", "c"]], settings)
    unit = KeyFile(found.units[0], "fingerprints")
    with written(tmp_path / "bent", "fingerprints") as writer:
        writer.about = unit.about
        writer.block({name: unit.read(name) for name in unit.blocks[0].columns} | {"lines.counts": np.array([9, 9], np.uint32)})
    (tmp_path / "bent").replace(found.units[0])
    with pytest.raises(KeyFileError, match="unit-0 is damaged: its lines are not as many as it says"):
        lines_task(0, 1, found.units, found.removed, settings, tmp_path / "out")
