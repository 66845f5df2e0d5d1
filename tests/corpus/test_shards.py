"""Documents come back from a shard as they were."""

import json

import pytest
import zstandard

from megatrain.corpus.document import Document
from megatrain.corpus.shards import documents_of, writing

DOCUMENTS = [
    Document(
        "a\nb\u2028 汉字 🙂\x00",
        "web",
        "raw/ä.jsonl",
        1 << 40,
        "text",
        "zh",
        {"gopher.words": 2.5},
        {"url": "x", "n": [1, None]},
    ),
    Document("", "code", "b.py", 0, "code"),
]


def test_documents_come_back_as_they_were(tmp_path):
    with writing(tmp_path / "a.jsonl.zst") as write:
        for document in DOCUMENTS:
            write(document)
    assert list(documents_of(tmp_path / "a.jsonl.zst")) == DOCUMENTS
    lines = zstandard.ZstdDecompressor().stream_reader((tmp_path / "a.jsonl.zst").read_bytes()).read().decode().split("\n")
    assert [json.loads(line)["text"] for line in lines[:-1]] == [document.text for document in DOCUMENTS]


def test_the_same_documents_are_the_same_bytes_and_half_a_shard_is_none(tmp_path):
    for name in ("a", "b"):
        with writing(tmp_path / name) as write:
            write(DOCUMENTS[0])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(RuntimeError, match="stop"), writing(tmp_path / "c") as write:
        write(DOCUMENTS[0])
        raise RuntimeError("stop")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_none_is_a_shard_too(tmp_path):
    with writing(tmp_path / "a"):
        pass
    assert list(documents_of(tmp_path / "a")) == []
