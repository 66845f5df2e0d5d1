"""Places of documents: written with the store, and checked when they are read."""

import os
import re
from pathlib import Path

import pytest

from megatrain.data.indexed import TokenStore, TokenStoreError, TokenStoreWriter
from megatrain.data.origins import FilePlace, OriginsWriter, origin_of, read_origin
from megatrain.data.prepare.text_store import TextStoreWriter
from megatrain.data.tokenizer import load_tokenizer

ORIGINS = [
    FilePlace("a b/ü.jsonl", 7, "byte"),
    FilePlace("c.txt"),
    FilePlace("a b/ü.jsonl", 1 << 40, "byte"),
    FilePlace("\udcff.parquet", 3, "row"),
]


@pytest.fixture
def store(tmp_path):
    with TextStoreWriter(tmp_path / "s", load_tokenizer("bytes")) as writer:
        for text, place in zip(("one", "two!", "three", "4"), ORIGINS, strict=True):
            writer.add_document(text, place)
    return TokenStore(tmp_path / "s")


def test_each_document_has_its_place(store):
    assert [read_origin(store, i) for i in range(4)] == ORIGINS
    assert [str(place) for place in ORIGINS[1:]] == ["c.txt", "a b/ü.jsonl, byte 1,099,511,627,776", r"\udcff.parquet, row 3"]
    with pytest.raises(IndexError, match=r"document 4 is not in 0\.\.3"):
        read_origin(store, 4)


def test_the_file_is_small(store):
    names = len(rb'{"files": ["a b/\u00fc.jsonl", "c.txt", "\udcff.parquet"], "units": ["byte", "", "row"]}')
    assert Path(f"{store.prefix}.documents").stat().st_size == 48 + names + 4 * 12


def test_the_unit_follows_from_the_name_of_the_file():
    assert [origin_of(name, 5).unit for name in ("a.jsonl", "a.JSON.zst", "a.ndjson", "a.parquet", "a.warc.gz", "a.txt")] == [
        "byte", "byte", "byte", "row", "record", "byte",
    ]  # fmt: skip
    assert (origin_of("a.txt", 0).unit, origin_of("gz", 0).unit) == ("", "")


@pytest.mark.parametrize(
    ("place", "said"), [(FilePlace("a", 0, "page"), "'page' is no unit"), (FilePlace("a", -1, "row"), "place -1 is neg")]
)
def test_a_place_that_cannot_be_is_refused(place, said):
    with pytest.raises(ValueError, match=said):
        OriginsWriter().add(place)


def changed(path: Path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)


FAULTS = {
    "empty": (lambda path: path.write_bytes(b""), "it has 0 bytes and does not begin with b'MTORIGIN'"),
    "magic": (lambda path: changed(path, 0, b"X"), "does not begin with b'MTORIGIN'"),
    "documents": (lambda path: changed(path, 8, b"\x05"), "of a store of 5 documents and 13 tokens, and"),
    "names": (lambda path: changed(path, 24, b"\xff" * 8), "18,446,744,073,709,551,615 bytes of names make"),
    "cut": (lambda path: os.truncate(path, 60), "it has 60 bytes, and 4 documents and"),
    "bit": (lambda path: changed(path, path.stat().st_size - 1, b"\x01"), "it was changed: its hash is another one"),
    "fifo": (lambda path: (path.unlink(), os.mkfifo(path)), "it is a pipe"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_of_places_that_was_changed_is_one_clear_error(store, fault):
    path = Path(f"{store.prefix}.documents")
    FAULTS[fault][0](path)
    with pytest.raises(TokenStoreError, match=re.escape(FAULTS[fault][1])) as caught:
        read_origin(store, 0)
    assert str(path) in str(caught.value) and "take this file away" in str(caught.value)


@pytest.mark.parametrize("names", [b"[]", b'{"files": [], "units": []}', b'{"files": [1], "units": [""]}', b"{"])
def test_names_of_another_kind_are_one_clear_error(tmp_path, names, monkeypatch):
    monkeypatch.setattr("megatrain.data.origins.json.dumps", lambda _said: names.decode())
    with TokenStoreWriter(tmp_path / "s", "u1") as writer:
        writer.add_document([1, 2])
        origins = OriginsWriter()
        origins.add(FilePlace("a.txt"))
        writer.origins = origins.contents(2)
    with pytest.raises(TokenStoreError, match=r"s\.documents, which says where documents come from, cannot be read"):
        read_origin(TokenStore(tmp_path / "s"), 0)


def test_a_store_written_without_places_takes_the_older_ones_away(store):
    with TokenStoreWriter(store.prefix, "u1") as writer:
        writer.add_document([1, 2])
    assert read_origin(TokenStore(store.prefix), 0) is None
