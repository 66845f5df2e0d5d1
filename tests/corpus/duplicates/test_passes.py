"""The passes as workers see them, and files of theirs that are damaged or were made with other settings."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatrain.corpus.duplicates.exact import exact_task
from megatrain.corpus.duplicates.fingerprints import fingerprinting
from megatrain.corpus.duplicates.key_files import KeyFile, KeyFileError, written
from megatrain.corpus.duplicates.near import near_task
from megatrain.corpus.duplicates.outcome import alarms
from megatrain.corpus.duplicates.parameters import DedupConfig
from megatrain.corpus.duplicates.passes import Deduplication
from megatrain.corpus.duplicates.places import UnitRow, UnitStarts

ALL = DedupConfig(lines="lines", bands=3, parts=2)


def test_the_passes_have_the_tasks_that_are_switched_on(tmp_path):
    with fingerprinting(tmp_path / "unit", ALL) as prints:
        prints.add("a text of some words, more than five")
    job = Deduplication([tmp_path / "unit"], lambda name, task: tmp_path / f"{name}-{task}", ALL)
    names = []
    for work in job.passes():
        names.append((work.name, [task.name for task in work.tasks]))
        for task in work.tasks:
            pickle.loads(pickle.dumps(task)).write(tmp_path / f"{work.name}-{task.name}")
    pairs = [f"near-{number:05}" for number in range(6)]
    assert names == [
        ("places", ["places"]),
        ("compared", ["exact-00000", "exact-00001", *pairs]),
        ("decided", ["removed"]),
        ("lines", ["lines-00000", "lines-00001"]),
    ]
    assert job.removals().of(0) == {}


def test_nothing_to_compare(deduplicated):
    assert deduplicated([[], []], DedupConfig(lines="lines")).instead == {}
    assert deduplicated([], DedupConfig()).instead == {}
    off = DedupConfig(exact="none", near=False)
    assert deduplicated([["a b c d e", "a b c d e"]], off).instead == {}


def test_parts_are_as_many_as_memory_demands():
    starts = UnitStarts(np.array([0, 10, 1_000_000]), np.array([0, 5, 40_000_000]))
    assert [starts.parts(memory) for memory in (1 << 20, 1 << 28, 1 << 40)] == [4578, 18, 1]
    assert [starts.of(document) for document in (0, 9, 10, 999_999)] == [(0, 0), (0, 9), (1, 0), (1, 999_989)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exact": "normal"}, "made with dedup.exact=text, and the config has normal"),
        ({"bands": 14, "band_rows": 8}, "made with dedup.bands=20, and the config has 14"),
        ({"shingle_words": 7}, "made with dedup.shingle_words=5, and the config has 7"),
    ],
)
def test_fingerprints_of_other_settings_are_refused(deduplicated, tmp_path, change, said):
    found = deduplicated([["a b c d e"]], DedupConfig())
    with pytest.raises(KeyFileError, match=said):
        exact_task(0, 1, found.units, replace(DedupConfig(), **change), tmp_path / "out")
    exact_task(0, 1, found.units, replace(DedupConfig(), agreement=0.9, parts=3), tmp_path / "out")


BROKEN = {
    "near.rows": (np.zeros((20, 3), np.uint32) + 7, "near.rows has number 7 of 3"),
    "near.keys": (np.arange(60, 0, -1).reshape(20, 3).astype(np.uint64), "near.keys does not ascend"),
    "near.whole": (np.zeros(1, np.uint64), r"its signatures and their hashes are \[\(3, 120\), \(1,\)\], of 3 documents"),
    "size": (np.zeros(3, np.uint64), r"its size has \(3,\) numbers"),
    "near.signatures": (
        np.zeros((2, 120), np.uint32),
        r"its signatures and their hashes are \[\(2, 120\), \(3,\)\], of 3 documents",
    ),
    "exact.high": (np.array([3, 2, 1], np.uint64), "exact.high does not ascend"),
    "exact.rows": (np.array([0, 3, 1], np.uint32), "exact.rows has number 3 of 3"),
    "exact.low": (np.array([0, 3], np.uint64), "exact.high and exact.low and exact.rows are not equally long"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_columns_that_cannot_be_are_named(deduplicated, tmp_path, name):
    found = deduplicated([["a b c d e", "f g h i j", "k l m n o"]], DedupConfig())
    unit, (column, said) = KeyFile(found.units[0], "fingerprints"), BROKEN[name]
    columns = {of: unit.read(of) for of in unit.blocks[0].columns}
    with written(tmp_path / "bent", "fingerprints") as writer:
        writer.about = unit.about
        writer.block(columns | {name: column})
    with pytest.raises(KeyFileError, match=f"bent is damaged: {said}.*Remove it and run the same command again"):
        run_all(tmp_path / "bent", tmp_path / "out")


def run_all(unit: Path, output: Path) -> None:
    exact_task(0, 1, [unit], DedupConfig(), output)
    for band in range(20):
        near_task(band, 0, 1, [unit], DedupConfig(), output)


def test_a_truncated_unit_is_named(deduplicated, tmp_path):
    found = deduplicated([["a b c d e"], ["f g h i j"]], DedupConfig())
    found.units[1].write_bytes(found.units[1].read_bytes()[:-100])
    with pytest.raises(KeyFileError, match="unit-1 is damaged"):
        near_task(0, 0, 1, found.units, DedupConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_report_has_sizes_and_alarms(deduplicated):
    texts = [["one text of words", *["another text of words"] * 5, "a third text of words"], ["one text of words", "last"]]
    found = deduplicated(texts, DedupConfig(near=False))
    removals = found.removals
    assert removals.sizes() == {1: 1, 4: 1}
    assert removals.largest() == [(UnitRow(0, 1), 4), (UnitRow(0, 0), 1)]
    assert removals.largest(1) == [(UnitRow(0, 1), 4)]
    assert [column.tolist() for column in removals.counts()] == [[7, 2], [4, 1]]
    assert alarms(removals, ["web", "books"], DedupConfig(alarm_share=0.5)) == [
        "source web loses 4 of 7 documents (57%) as duplicates, more than dedup.alarm_share=0.5: read some of them beside their "
        "representatives."
    ]
    assert alarms(removals, ["web", "web"], DedupConfig(alarm_share=0.6, alarm_cluster=3)) == [
        "row 1 of unit 0 stays for 4 removed copies, more than dedup.alarm_cluster=3: read some of them beside it."
    ]
    assert alarms(removals, ["web", "web"], DedupConfig(alarm_share=0.6)) == []


def test_more_hashes_than_a_signature_has_are_refused():
    with pytest.raises(
        ValueError,
        match=r"dedup.bands=30 of dedup.band_rows=6 hashes are 180, .* Use bands=20 with band_rows=6, or bands=30 with band_rows=4",
    ):
        DedupConfig(bands=30)
