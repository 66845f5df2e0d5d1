"""Stores joined are the store of all their documents, byte for byte."""

import pytest

from megatrain.data.indexed import TokenStoreError, origins_path
from megatrain.data.origins import FilePlace
from megatrain.data.prepare import joined_store
from megatrain.data.prepare.joined_store import join_stores
from megatrain.data.prepare.text_store import TextStoreWriter
from megatrain.data.tokenizer import load_tokenizer

SUFFIXES = (".bin", ".idx", ".documents", ".meta.json")
DOCUMENTS = [
    ("one", FilePlace("a.jsonl", 0, "byte")),
    ("", FilePlace("a.jsonl", 9, "byte")),
    ("two, which is longer", FilePlace("a.jsonl", 20, "byte")),
    ("three", FilePlace("c.txt")),
    ("four", FilePlace("a.jsonl", 90, "byte")),
    ("five", FilePlace("b.parquet", 7, "row")),
]


def write(prefix, documents, append_eod=True):
    with TextStoreWriter(prefix, load_tokenizer("bytes"), append_eod=append_eod) as store:
        for text, origin in documents:
            store.add_document(text, origin)


@pytest.fixture
def parts(tmp_path):
    bounds = [(0, 3), (3, 4), (4, 6)]
    for number, (begin, end) in enumerate(bounds):
        write(tmp_path / f"part{number}", DOCUMENTS[begin:end])
    return [tmp_path / f"part{number}" for number in range(len(bounds))]


def test_the_same_bytes_as_one_store_of_all(tmp_path, parts, monkeypatch):
    monkeypatch.setattr(joined_store, "CHUNK_TOKENS", 7)
    write(tmp_path / "whole", DOCUMENTS)
    join_stores(parts, tmp_path / "joined")
    for suffix in SUFFIXES:
        assert (tmp_path / f"joined{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes(), suffix


def test_what_does_not_belong_together_is_refused(tmp_path, parts):
    origins = origins_path(parts[1])
    data = bytearray(origins.read_bytes())
    data[-1] ^= 1
    origins.write_bytes(data)
    with pytest.raises(TokenStoreError, match=r"part1\.documents was changed after it was written\. Make the store again"):
        join_stores(parts, tmp_path / "joined")
    (tmp_path / "part0.meta.json").unlink()
    with pytest.raises(TokenStoreError, match=r"part0 was not made with the tokenizer of .*part0"):
        join_stores(parts, tmp_path / "joined")
    assert not list(tmp_path.glob("joined*"))
