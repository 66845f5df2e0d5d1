"""A file that is one document: its encoding, its line ends, and what is no text."""

import gzip

import pytest

from megatrain.corpus.document import Tally
from megatrain.corpus.reading.choices import ReadConfig, SourceConfig
from megatrain.corpus.reading.documents import read_unit
from megatrain.corpus.reading.units import cut_units


@pytest.fixture
def read(tmp_path):
    """Reads a file with these bytes: (texts, counts, [(name, where, said)])."""

    def read_bytes(data, name="a.txt", limits=None, **source):
        (tmp_path / name).write_bytes(data)
        config = ReadConfig((SourceConfig("web", (str(tmp_path / name),), **source),), **(limits or {}))
        tally = Tally()
        documents = [document for unit in cut_units(config) for document in read_unit(unit, config, tally)]
        assert [document.at for document in documents] == [0] * len(documents)
        places = [(name, place.where, place.said) for name, places in tally.places.items() for place in places]
        return [document.text for document in documents], dict(tally.counts), places

    return read_bytes


def test_encodings_and_line_ends(read):
    one = {"read.documents": 1}
    for data, encoding in (
        ("A 漢\n".encode(), "auto"),
        ("A 漢\n".encode("utf-8-sig"), "auto"),
        ("A 漢\n".encode("utf-16"), "auto"),
        ("\ufeffA 漢\n".encode("utf-16-be"), "auto"),
        ("A 漢\n".encode("utf-32"), "auto"),
        ("A 漢\n".encode("utf-16-le"), "utf-16-le"),
        ("A 漢\n".encode("gb18030"), "GB18030"),
        ("A 漢\n".encode("utf-8-sig"), "shift_jis"),
    ):
        assert read(data, encoding=encoding) == (["A 漢\n"], one, [])
        assert read(gzip.compress(data), "a.MD.gz", encoding=encoding) == (["A 漢\n"], one, [])
    assert read(b"a\r\nb\rc\r\n") == (["a\nb\rc\n"], {"read.crlf": 1, **one}, [])
    assert read(b"\xef\xbb\xbf") == ([], {"read.empty": 1}, [])
    counts = {"read.empty_file": 1, "read.empty": 1}
    assert read(b"") == ([], counts, [("read.empty_file", "", "the file is empty.")])


def test_what_is_broken_is_told_by_line(read):
    said = (
        "not utf-8 (byte 0xe9: invalid continuation byte). If all of the source is encoded otherwise, say how in its `encoding:`, for "
        "example gb18030 or windows-1252."
    )
    place = ("read.invalid_text", "line 3", said)
    assert read(b"a\n\ncaf\xe9\n\xff") == (["a\n\ncaf\ufffd\n\ufffd"], {"read.invalid_text": 1, "read.documents": 1}, [place])
    assert read(b"a\n\ncaf\xe9\n\xff", limits={"broken_text": "refuse"}) == ([], {"read.invalid_text": 1}, [place])
    assert read(b"a\n\ncaf\xe9\n\xff", encoding="latin-1")[0] == ["a\n\ncafé\nÿ"]
    assert read(b"a\nb\0c\0")[1:] == ({"read.nul": 1, "read.documents": 1}, [("read.nul", "line 2", "2 NULs.")])
    assert read(b"a\nb\0c\0")[0] == ["a\nbc"]
    assert read(b"ab\xed\xa0\x80c")[0] == ["ab\ufffd\ufffd\ufffdc"]


def test_what_is_no_text_is_left_out(read):
    for data, said in (
        (b"\x7fELF\2\1\1" + bytes(9), "the file is no text: it has many NULs."),
        (b"BZh91AY", "the file is compressed by bzip2, which its name does not say. Unpack it: bzip2 -dc OLD > NEW"),
        (
            "A text\n".encode("utf-16-le"),
            "this is UTF-16LE, not UTF-8. Convert it: iconv -f utf-16le -t utf-8 OLD > NEW, or say in `encoding:` of its source how it is "
            "encoded.",
        ),
    ):
        assert read(data) == ([], {"read.no_text": 1}, [("read.no_text", "", said)])


def test_a_long_or_broken_file_is_left_out(read):
    said = "the document has more than 9 bytes. If it is meant, raise read.longest."
    for name, data in (("a.txt", b"0123456789"), ("a.txt.gz", gzip.compress(b"0123456789"))):
        assert read(data, name, limits={"longest": 9}) == ([], {"read.too_long": 1}, [("read.too_long", "", said)])
        assert read(data, name, limits={"longest": 10})[0] == ["0123456789"]
    texts, counts, places = read(gzip.compress(b"a text " * 99)[:-9], "a.txt.gz")
    assert (texts, counts) == ([], {"read.damaged": 1}) and places[0][2].endswith("; it is left out.")


def test_source_code(read):
    assert read(b"fn main() {}\r\n", "main.rs", kind="code")[0] == ["fn main() {}\n"]
    assert read(b"all:\n\tcc a.c\n", "Makefile", kind="code")[0] == ["all:\n\tcc a.c\n"]
    assert read(b'{"a": 1}\n', "package.json", kind="code")[0] == ['{"a": 1}\n']
