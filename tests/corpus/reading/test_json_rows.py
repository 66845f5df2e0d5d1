"""Rows of JSON: what is broken costs its row alone, is counted, and named with file and line."""

import gzip
import json
import os
import subprocess
import sys

import orjson
import pytest
import zstandard

from megatrain.corpus.document import Tally
from megatrain.corpus.reading.choices import ReadConfig, SourceConfig
from megatrain.corpus.reading.documents import read_unit
from megatrain.corpus.reading.file_reading import ChangedError
from megatrain.corpus.reading.units import cut_units
from megatrain.data.prepare.read import ReadError


@pytest.fixture
def read(tmp_path):
    """Reads a file with these bytes: (texts, counts of problems, [(where, said)])."""

    def read_bytes(data, name="a.jsonl", unit_bytes=1 << 20, limits=None, **source):
        file = tmp_path / name
        file.write_bytes(data)
        config = ReadConfig((SourceConfig("web", (str(file),), **source),), unit_bytes=unit_bytes, **(limits or {}))
        tally = Tally()
        read_bytes.documents = [document for unit in cut_units(config) for document in read_unit(unit, config, tally)]
        counts = {name.removeprefix("read."): count for name, count in tally.counts.items() if name != "read.documents"}
        said = [(place.where, place.said) for places in tally.places.values() for place in places]
        assert {place.file for places in tally.places.values() for place in places} <= {str(file)}
        return [document.text for document in read_bytes.documents], counts, said

    return read_bytes


GOOD = b'{"text": "good"}\n'
ENCODED = "If all of the source is encoded otherwise, say how in its `encoding:`, for example gb18030 or windows-1252."
OBJECT = 'Each line must be one object like {"text": "..."}.'
MENDED = [
    (b'{"text": "a\xff\xfeb"}', "a\ufffd\ufffdb", "invalid_text", f"not utf-8 (byte 0xff: invalid start byte). {ENCODED}"),
    (b'{"text": "a\xe4\xb8"}', "a\ufffd", "invalid_text", f"not utf-8 (byte 0xe4: invalid continuation byte). {ENCODED}"),
    (
        b'{"text": "a\\ud800b"}',
        "a\ufffdb",
        "lone_surrogate",
        r"half of a surrogate pair (\ud800..\udfff), which is not a character.",
    ),
    (
        b'{"text": "\\ude00\\ud83d"}',
        "\ufffd" * 2,
        "lone_surrogate",
        r"half of a surrogate pair (\ud800..\udfff), which is not a character.",
    ),
    (b'{"text": "a\\u0000b\\u0000"}', "ab", "nul", "2 NULs."),
    (b'{"text": "a\0b"}\0', "ab", "nul", "2 NULs in the line."),
]


@pytest.mark.parametrize(("row", "text", "name", "said"), MENDED)
def test_broken_text_is_mended_or_refused(read, row, text, name, said):
    data = GOOD + b"\n" + row + b"\n" + GOOD
    assert read(data) == (["good", text, "good"], {name: 1}, [("line 3", said)])
    refuse = {"broken_text": "refuse"}
    assert read(data, limits=refuse) == (["good", "good"], {name: 1}, [("line 3", said)])
    with pytest.raises(ReadError) as error:
        read(data, limits={**refuse, "on_error": "stop"})
    skip = "With read.on_error=skip it is left out and counted."
    assert str(error.value).endswith(f"a.jsonl, line 3: {said} {skip}")


REFUSED = [
    (b'{"text": "a"', "no_json", f"not JSON (Expecting ',' delimiter: line 1 column 13 (char 12)). {OBJECT}"),
    (b'{"text": "a"} x', "no_json", f"not JSON (Extra data: line 1 column 15 (char 14)). {OBJECT}"),
    (b"{1: 2}", "no_json", f"not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)). {OBJECT}"),
    (b"[" * 3000, "no_json", None),
    (b'{"text": 5}', "no_string", "the value of 'text' is int, not a string."),
    (b'{"text": null}', "no_string", "the value of 'text' is NoneType, not a string."),
    (b'{"text": ["a"]}', "no_string", "the value of 'text' is list, not a string."),
    (
        b'{"Text": "a", "5": 1}',
        "no_key",
        "there is no key 'text'; the row has 'Text', '5'. Say in `key:` of web which is the text.",
    ),
    (b"{}", "no_key", "there is no key 'text'; the row has none. Say in `key:` of web which is the text."),
    (b'"text"', "no_object", f"a JSON str, not an object. {OBJECT}"),
    (b"NaN", "no_object", f"a JSON float, not an object. {OBJECT}"),
    (b"[]", "no_object", None),
    (b'{"text": "a", "text": "b"}', "duplicate_key", "the key 'text' is there twice. Which of them counts?"),
    (b'{"text": "a\\ud800", "text": "b"}', "duplicate_key", "the key 'text' is there twice. Which of them counts?"),
    (b'{"text": "a", "url": 1, "url": 2}', "duplicate_key", "the key 'url' is there twice. Which of them counts?"),
    (b'{"text": "a", "\\u0074ext": "b"}', "duplicate_key", "the key 'text' is there twice. Which of them counts?"),
    (b'{"te\\u0078t": "a", "tex\\u0074" :"b"}', "duplicate_key", "the key 'text' is there twice. Which of them counts?"),
    (b'{"\\u0075\\u0072\\u006C": 1, "text": "a", "ur\\u006c": 2}', "duplicate_key", None),
    (
        b'{"text": "a", "url": ' + b"[" * 101 + b"]" * 101 + b"}",
        "deep_value",
        "the value of 'url' has more than 100 lists and objects within each other.",
    ),
    (b'{"text": "a", "url": ' + b"[" * 900 + b"NaN" + b"]" * 900 + b"}", "deep_value", None),
    (b'{"text": ' + b'{"a":' * 600 + b'"\\ud800"' + b"}" * 600 + b"}", "deep_value", None),
    (b'{"x": ' + b"[" * 1015 + b"]" * 1015 + b', "text": "a", "text": "b"}', "deep_value", None),
]


@pytest.mark.parametrize(("row", "name", "said"), REFUSED)
def test_a_bad_row_costs_a_row(read, row, name, said):
    data = GOOD + row + b"\n" + GOOD
    texts, counts, places = read(data, keep=("url",))
    assert (texts, list(counts)[-1], places[-1][0]) == (["good", "good"], name, "line 2")
    assert said is None or places[-1][1] == said
    with pytest.raises(ReadError, match=r"a\.jsonl, line 2: "):
        read(data, limits={"on_error": "stop"}, keep=("url",))


@pytest.mark.parametrize(
    "row",
    [
        b'{"text": "a\tb", "score": NaN, "n": 1e999}',
        b'{"text": "a\\tb"}\r',
        b'\xef\xbb\xbf{"text": "a\\tb"}',
        b'{"n": ' + b"1" * 5000 + b', "text": "a\tb"}',
        b'{"meta": {"text": 1, "url": [{"text": 5}]}, "text": "a\\tb"}',
        b'{"other": "\\ud800", "text": "a\\tb"}',
        b'{"other": 1, "other": 2, "text": "a\\tb", "quoted": "\\"text\\" and \\"text\\""}',
        b'{"other": {"\\u0074ext": 1}, "te\\u0078t": "a\\tb", "quoted": "\\"\\u0074ext\\""}',
    ],
)
def test_what_does_no_harm_is_read(read, row):
    assert read(row + b"\n" + b"  \t\r\n" + row) == (["a\tb", "a\tb"], {}, [])


def test_a_field_may_be_as_deep_as_what_is_written_takes(read):
    assert read(b'{"text": "a", "url": ' + b'{"a":' * 50 + b"[" * 50 + b"]" * 50 + b"}" * 50 + b"}", keep=("url",))[0] == ["a"]
    orjson.dumps(read.documents[0].marks)


def test_an_escaped_key_of_any_letters_is_known(read):
    escaped = "".join(rf"\u{unit:04X}" for unit in (0x6F22, 0x2F, 0xD83D, 0xDE00))
    row = f'{{"漢/😀": "a", "{escaped}": "b"}}'
    for encoding in ("utf-8", "utf-16", "gb18030"):
        found = read(row.encode(encoding), key="漢/😀", encoding=encoding)[1]
        assert found == {"duplicate_key": 1}
    assert read('{"漢\\/": "a", "漢/": "b"}'.encode(), key="漢/")[1] == {"duplicate_key": 1}


def test_fields_that_are_kept_and_documents_are_as_their_source_says(read):
    read(b'{"url": {"a": ["\\udc00x", 1]}, "body": "t", "id": 7}\n', key="body", keep=("url", "id", "no"), language="en")
    (document,) = read.documents
    assert document.marks == {"url": {"a": ["\ufffdx", 1]}, "id": 7}
    assert (document.source, document.at, document.kind, document.language) == ("web", 0, "text", "en")
    assert read(b'{"body": ""}\n{"body": "\\u0000"}', key="body") == ([], {"empty": 2, "nul": 1}, [("line 2", "1 NULs.")])


@pytest.mark.parametrize("encoding", ["gb18030", "shift_jis", "utf-16", "utf-32-be", "utf-8-sig"])
def test_encodings(read, encoding):
    rows = "".join(json.dumps({"text": text, "鍵": "値"}, ensure_ascii=False) + "\n" for text in ("漢字", "日本"))
    texts = read(rows.encode(encoding), encoding=encoding, key="text", keep=("鍵",))
    assert texts == (["漢字", "日本"], {}, []) and read.documents[1].marks == {"鍵": "値"}
    if encoding in ("utf-16", "utf-8-sig"):  # a mark tells it, also against what is declared
        assert read(rows.encode(encoding))[0] == read(rows.encode(encoding), encoding="gb18030")[0] == ["漢字", "日本"]


def test_broken_bytes_of_other_encodings(read):
    assert read(b'{"text": "a\xffb"}\n', encoding="gb18030")[:2] == (["a\ufffdb"], {"invalid_text": 1})
    texts = '{"text": "a\ud800b"}\n{"text": "c"}\n'.encode("utf-16", "surrogatepass")
    assert read(texts)[:2] == (["a\ufffd\ufffd\ufffdb", "c"], {"invalid_text": 1})
    assert read(texts + b"x")[:2] == (["a\ufffd\ufffd\ufffdb", "c"], {"invalid_text": 2})


def test_files_that_are_no_text(read):
    for data, said in (
        ('{"text": "a"}\n'.encode("utf-16-le"), "this is UTF-16LE, not UTF-8. Convert it"),
        (gzip.compress(GOOD), "the file is compressed by gzip, which its name does not say. Unpack it: gzip -dc OLD > NEW"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "this is a Git LFS pointer"),
    ):
        texts, counts, places = read(data)
        assert (texts, counts, places[0][0]) == ([], {"no_text": 1}, "") and places[0][1].startswith(said)


def test_a_long_line_is_passed_over(read):
    long = b'{"text": "' + b"x" * 90 + b'"}\n'
    said = "the line has more than 99 bytes. If it is meant, raise read.longest."
    for unit_bytes in (1 << 20, 50, 7):
        got = read(GOOD + long + GOOD, limits={"longest": 99}, unit_bytes=unit_bytes)
        assert got == (["good", "good"], {"too_long": 1}, [("line 2", said)])
    assert read(long, limits={"longest": 102})[0] == ["x" * 90]


@pytest.mark.parametrize("size", [1 << 28, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_a_huge_line_takes_little_memory(tmp_path, size):
    file = tmp_path / "a.jsonl"
    with file.open("wb") as out:
        out.write(GOOD + b'{"text": "')
        out.seek(size, os.SEEK_CUR)  # a hole, which takes no room on the disk
        out.write(b'"}\n' + GOOD)
    program = f"""
from pathlib import Path
from megatrain.corpus.document import Tally
from megatrain.corpus.reading.choices import ReadConfig, SourceConfig
from megatrain.corpus.reading.documents import read_unit
from megatrain.corpus.reading.units import cut_units
config, tally = ReadConfig((SourceConfig("web", ({str(file)!r},)),)), Tally()
documents = [document.at for unit in cut_units(config) for document in read_unit(unit, config, tally)]
most = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
print(documents, dict(tally.counts), most < 150_000)
"""
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed == f"[0, {size + 30}] {{'read.documents': 2, 'read.too_long': 1}} True\n"


def test_a_line_of_many_values_is_not_made_into_objects(read):
    row = b'{"text": "a", "x": [' + b"[]," * (1 << 20) + b"0]}\n"
    said = "more than 2,097,152 bytes of the line are no text but other values."
    assert read(row + GOOD) == (["good"], {"many_values": 1}, [("line 1", said)])


def test_lines_are_told_by_number_in_every_unit(read):
    data = b"".join(b'{"text": "%d"}\n' % n if n % 10 else b"bad\n" for n in range(40))
    for unit_bytes in (1 << 20, 60, 1):
        texts, counts, places = read(data, unit_bytes=unit_bytes)
        assert [int(text) for text in texts] == [n for n in range(40) if n % 10]
        assert counts == {"no_json": 4} and [where for where, _ in places] == ["line 1", "line 11", "line 21", "line 31"]


def test_far_into_a_file_the_byte_is_told(read, monkeypatch):
    monkeypatch.setattr("megatrain.corpus.reading.file_reading.FARTHEST", 20)
    assert [where for where, _ in read(GOOD * 3 + b"bad\n", unit_bytes=40)[2]] == ["the line from byte 51"]


def test_places_are_few_and_counts_whole(read):
    texts, counts, places = read(b"bad\n" * 100)
    assert (texts, counts, len(places)) == ([], {"no_json": 100}, 20)


PACK = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}


@pytest.mark.parametrize("kind", PACK)
def test_of_a_compressed_file_cut_short_what_came_before_is_kept(read, kind):
    rows = [json.dumps({"text": os.urandom(200).hex()}) for _ in range(2000)]
    packed = PACK[kind]("\n".join(rows).encode())
    assert read(packed, f"a.jsonl{kind}")[1:] == ({}, []) and len(read.documents) == 2000
    (texts, counts, places) = read(packed[: len(packed) // 2], f"a.jsonl{kind}")
    assert 500 < len(texts) < 1200 and texts == [json.loads(row)["text"] for row in rows[: len(texts)]]
    assert counts == {"damaged": 1} and places[0][1].startswith("the file was cut short or is damaged (")
    with pytest.raises(ReadError, match="cut short or is damaged"):
        read(packed[: len(packed) // 2], f"a.jsonl{kind}", limits={"on_error": "stop"})
    assert read(b"", f"a.jsonl{kind}") == ([], {"empty_file": 1}, [("", "the file is empty.")])
    assert read(b"plain text", f"a.jsonl{kind}")[1] == {"damaged": 1}
    assert read(PACK[kind](GOOD) * 2, f"a.JSONL{kind.upper()}")[0] == ["good", "good"]


@pytest.mark.parametrize("kind", PACK)
def test_a_bomb_costs_its_file(read, kind):
    packed = PACK[kind](GOOD + b" " * (90 << 20) + b"\n" + GOOD)
    said = "than 250 times as many: text does not. If it is meant, unpack it: "
    texts, counts, places = read(packed, f"a.jsonl{kind}")
    assert texts == ["good"] and counts == {"too_long": 1, "bomb": 1} and said in places[1][1]
    assert places[1][1].endswith("OLD > NEW, or raise read.unpacked_ratio or read.unpacked_mib.")
    assert read(packed, f"a.jsonl{kind}", limits={"unpacked_ratio": 10**6})[0] == ["good", "good"]
    counts = read(packed, f"a.jsonl{kind}", limits={"unpacked_ratio": 10**6, "unpacked_mib": 30})[1]
    assert counts == {"bomb": 1}


def test_a_file_that_changes_is_noticed(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD * 9)
    config = ReadConfig((SourceConfig("web", (str(file),)),), unit_bytes=60)
    units = cut_units(config)
    tally = Tally()
    documents = read_unit(units[0], config, tally)
    assert next(documents).text == "good"
    with file.open("ab") as grown:
        grown.write(GOOD)
    with pytest.raises(ChangedError, match=r"a\.jsonl was written to while it was read\."):
        list(documents)
    tally = Tally()
    assert list(read_unit(units[1], config, tally)) == [] and tally.counts == {"read.changed": 1}
    assert tally.places["read.changed"][0].said == "the file was written to after the run began, and is left out."
    documents = read_unit(cut_units(config)[-1], config, tally)
    next(documents)
    file.write_bytes(b"")
    with pytest.raises(ChangedError):
        list(documents)
    file.unlink()
    list(read_unit(units[1], config, tally))
    assert tally.places["read.unreadable"][0].said == "the file cannot be read: No such file or directory."
