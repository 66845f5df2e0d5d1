"""Reading documents: every format and compression, every kind of broken file."""

import gzip
import json
import os

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.prepare import read, unpack
from megatrain.data.prepare.read import Lines, ReadError, read_documents, read_pieces, total_bytes

ROWS = [{"text": "first\ndocument", "id": 1}, {"text": "zweites\u2028Dokument 日本"}, {"text": ""}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zst(content):
    return zstandard.ZstdCompressor().compress(content)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zst}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl(tmp_path, suffix):
    path = tmp_path / f"a.v2.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES[:-1]))
    documents = list(read_documents([path]))
    assert [d.text for d in documents] == [row["text"] for row in ROWS]
    assert [d.source for d in documents] == [f"{path}:{i}" for i in (1, 2, 3)]
    assert [p.text for p in read_pieces([path])] == [row["text"] for row in ROWS]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_txt_is_one_document(tmp_path, suffix, chunk, monkeypatch):
    monkeypatch.setattr(read, "CHUNK_BYTES", max(chunk, 8))
    monkeypatch.setattr(unpack, "CHUNK_BYTES", max(chunk, 8))
    text = "zeile eins\r\nдва 日本語 🙂\n" * 40
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + text.encode()))
    (document,) = read_documents([path])
    assert (document.text, document.source) == (text, str(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_compressed_parts_in_one_file(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES[:9]) + COMPRESS[suffix](LINES[9:]))
    assert [d.text for d in read_documents([path])] == [row["text"] for row in ROWS]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=6), st.integers(8, 40))
@settings(max_examples=40)
def test_any_lines_at_any_chunk_size(tmp_path_factory, texts, chunk):
    path = tmp_path_factory.mktemp("r") / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n\n" for t in texts), encoding="utf-8", newline="\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "CHUNK_BYTES", chunk)
        assert [d.text for d in read_documents([path])] == texts


def test_another_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "text": 5}')
    assert [d.text for d in read_documents([tmp_path / "a.jsonl"], key="content")] == ["x"]


def test_numbers_of_any_length_are_passed_over(tmp_path):
    digits = "9" * 6000
    for text in (f'{{"id": {digits}, "text": "x"}}', f'{{"id": -{digits}, "e": 1e{digits}, "n": NaN, "text": "x"}}'):
        (tmp_path / "a.jsonl").write_text(text)
        assert [d.text for d in read_documents([tmp_path / "a.jsonl"])] == ["x"]
    (tmp_path / "a.jsonl").write_text(f'{{"text": {digits}}}')
    with pytest.raises(ReadError, match=r"a\.jsonl:1: the value of 'text' is int, not a string"):
        list(read_documents([tmp_path / "a.jsonl"]))


def test_json_is_read_as_jsonl(tmp_path):
    for name, compress in (("a.json", bytes), ("a.json.gz", gzip.compress)):
        (tmp_path / name).write_bytes(compress(LINES))
        assert [d.source for d in read_documents([tmp_path / name])] == [f"{tmp_path / name}:{n}" for n in (1, 2, 3)]


BROKEN = {
    "a.jsonl": {
        "not JSON": (b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2: not JSON"),
        "a list": (b"[1]\n", r"a\.jsonl:1: a JSON list, not an object"),
        "no key": (b'{"body": "a"}\n', r"a\.jsonl:1: .*no key 'text'.*'body'.*--key"),
        "no string": (b'\n{"text": null}\n', r"a\.jsonl:2: the value of 'text' is NoneType"),
        "not UTF-8": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl:2: not UTF-8 \(byte 0xe9, byte 10 of the line"),
        "half a pair": (b'{"text": "\\ud83d"}\n', r"a\.jsonl:1: the text holds half of a surrogate pair"),
        "deep": (b"[" * 200000, r"a\.jsonl:1: not JSON"),
        "deep objects": (b'{"text":' * 200000, r"a\.jsonl:1: not JSON"),
        "an array": (b'[\n {"text": "a"}\n]', r'a\.jsonl:1: not JSON .*jq -c "\.\[\]" OLD > NEW\.jsonl'),
        "objects over lines": (b'{\n "text": "a"\n}', r"a\.jsonl:1: not JSON .*jq -c \. OLD > NEW\.jsonl"),
    },
    "a.txt": {
        "not UTF-8": (b"abc\nd\xe9f\n", r"a\.txt:2: not UTF-8 \(byte 0xe9, byte 5 of the file"),
        "cut in a character": ("abc\n\né".encode()[:-1], r"a\.txt:3: not UTF-8 \(byte 0xc3, byte 5 of the file"),
    },
    "a.jsonl.gz": {
        "cut short": (gzip.compress(LINES)[:-12], r"a\.jsonl\.gz is not a whole \.gz file"),
        "not gzip": (LINES, r"a\.jsonl\.gz is not a whole \.gz file"),
        "damaged": (
            gzip.compress(LINES)[:20] + b"\xff" * 9 + gzip.compress(LINES)[29:],
            r"a\.jsonl\.gz is not a whole \.gz file",
        ),
    },
    "a.txt.zst": {
        "cut short": (zst(LINES)[:-5], r"a\.txt\.zst is not a whole \.zst file"),
        "second frame cut": (zst(LINES) + zst(LINES)[:-5], r"a\.txt\.zst is not a whole \.zst file"),
        "not zstd": (LINES, r"a\.txt\.zst is not a whole \.zst file"),
    },
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in BROKEN.items() for kind in kinds])
def test_broken_files_name_file_and_line(tmp_path, name, kind):
    content, message = BROKEN[name][kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ReadError, match=message):
        list(read_documents([tmp_path / name]))
    with pytest.raises(ReadError, match=message):
        list(read_pieces([tmp_path / name]))


def test_half_a_pair_that_is_written_out_is_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "\\ud83d \ud83d\ude42"}')
    assert [d.text for d in read_documents([tmp_path / "a.jsonl"])] == ["\\ud83d 🙂"]


@pytest.mark.parametrize("name", ["a", "a.gz", "a.parquet", "a.txt.bz2"])
def test_unknown_kinds_of_file_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ReadError, match=r"what kind of file.*\.txt.*\.jsonl"):
        total_bytes([tmp_path / name])


def test_missing_files_and_directories_are_refused(tmp_path):
    (tmp_path / "d.txt").mkdir()
    os.mkfifo(tmp_path / "f.jsonl")
    for name, message in (
        ("none.txt", "does not exist"),
        ("d.txt", "is a directory"),
        ("f.jsonl", "is no plain file: write what it"),
    ):
        with pytest.raises(ReadError, match=message):
            total_bytes([tmp_path / name])
        with pytest.raises(ReadError, match="cannot be read"):
            list(read_documents([tmp_path / name]))


def test_progress_hears_of_every_byte(tmp_path):
    paths = []
    for suffix, compress in COMPRESS.items():
        paths.append(tmp_path / f"a.jsonl{suffix}")
        paths[-1].write_bytes(compress(LINES * 50))
    counts = []
    list(read_documents(paths, on_bytes=counts.append))
    assert sum(counts) == total_bytes(paths) == sum(p.stat().st_size for p in paths)


def test_a_stretch_without_white_space_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "PIECE_CHARACTERS", 5)
    (tmp_path / "a.txt").write_text("x" * 50 + " tail and more")
    assert [p.text for p in read_pieces([tmp_path / "a.txt"])] == ["x" * 50, " tail", " and more"]
    assert [p.text for p in read_pieces([tmp_path / "a.txt"], divide=False)] == ["x" * 50 + " tail and more"]


def test_a_line_may_be_so_long_and_says_where_it_is(tmp_path):
    line = json.dumps({"text": "x" * 50}).encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n" + line)
    assert len(list(read_documents([tmp_path / "a.jsonl"], key=Lines(longest=len(line))))) == 3
    with pytest.raises(
        ReadError, match=r"a\.jsonl:2: the line, from byte 14 of the text, is too long\. .*at most 61 bytes.*1M"
    ):
        list(read_pieces([tmp_path / "a.jsonl"], key=Lines(longest=len(line) - 1)))


def test_a_long_line_is_refused_before_all_of_it_is_read(tmp_path):
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(10**12)  # a hole
    with pytest.raises(
        ReadError, match=r"a\.jsonl:1: the line, from byte 0.* at most 33,554,432 bytes here.*--max-line 953675M"
    ):
        list(read_documents([tmp_path / "a.jsonl"]))


@pytest.mark.parametrize("divide", [True, False])
def test_a_compressed_document_without_a_place_to_cut(tmp_path, divide):
    text = b"x" * 4000
    for name, compress in (("a.txt.gz", gzip.compress), ("a.txt.zst", zst)):
        (tmp_path / name).write_bytes(compress(text))
        with pytest.raises(
            ReadError, match=r"a\.txt\..*: 4,000 characters of one document have to be in memory\..*--max-line 1M"
        ):
            list(read_pieces([tmp_path / name], key=Lines(longest=3999), divide=divide))
        assert [p.text for p in read_pieces([tmp_path / name], key=Lines(longest=4000), divide=divide)] == [text.decode()]
    (tmp_path / "a.txt").write_bytes(text)
    assert [p.text for p in read_pieces([tmp_path / "a.txt"], key=Lines(longest=1), divide=divide)] == [text.decode()]


@pytest.mark.parametrize(
    "values",
    [b"[]," * 900_000 + b"0", b'"a",' * 600_000 + b'"a"', b'"\\"",' * 600_000 + b'"\\\\"', b'{"a":1},' * 500_000 + b"0"],
    ids=["lists", "strings", "escapes", "objects"],
)
def test_a_line_of_small_values_is_refused_before_it_is_parsed(tmp_path, values, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b", "more": [' + values + b"]}\n")
    rows = iter([{"text": "a"}])
    monkeypatch.setattr(read._ROW, "decode", lambda _line: next(rows))
    with pytest.raises(
        ReadError, match=r"a\.jsonl:2: more than 2,097,152 bytes of the line are no text.*jq -c '{text}' OLD > NEW"
    ):
        list(read_documents([tmp_path / "a.jsonl"]))


def test_a_long_text_may_have_any_characters(tmp_path):
    text = '[]{},:\\"\n' * 400_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert [d.text for d in read_documents([tmp_path / "a.jsonl"])] == [text]
