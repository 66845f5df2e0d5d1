"""Records of WARC files: pages and texts; what is broken costs its record."""

import gzip
import io
import zlib

import pytest
import zstandard
from fastwarc.stream_io import BrotliWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.corpus.document import Tally
from megatrain.corpus.reading.choices import ReadConfig, SourceConfig
from megatrain.corpus.reading.documents import read_unit
from megatrain.corpus.reading.file_reading import FileReading
from megatrain.corpus.reading.units import FilePart, cut_units
from megatrain.corpus.reading.warc import records_of

PAGE = "<title>T</title><main><p>{} 漢字</p></main>"


def record(kind, body, *fields, length=None):
    lines = ["WARC/1.0", f"WARC-Type: {kind}", f"Content-Length: {len(body) if length is None else length}", *fields]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body + b"\r\n\r\n"


def answer(body, *fields, status="200 OK", kind="text/html"):
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", *fields]
    return record("response", "\r\n".join(lines).encode() + b"\r\n\r\n" + body, "WARC-Target-URI: <http://a/b>")


def page(text="one"):
    return answer(PAGE.format(text).encode())


@pytest.fixture
def read(tmp_path):
    def read_bytes(data, name="a.warc", **values):
        (tmp_path / name).write_bytes(data)
        config = ReadConfig((SourceConfig("web", (str(tmp_path / name),)),), **values)
        tally = Tally()
        documents = [document for unit in cut_units(config) for document in read_unit(unit, config, tally)]
        places = [(name, place.where, place.said) for name, places in tally.places.items() for place in places]
        return [(document.at, document.text) for document in documents], dict(tally.counts), places, documents

    return read_bytes


def brotli(data):
    stream = io.BytesIO()
    writer = BrotliWriter(stream)
    writer.write(data)
    writer.close()
    return stream.getvalue()


def test_pages_and_texts(read):
    data = (
        record("warcinfo", b"software: x\r\n")
        + page()
        + record("conversion", "plain 漢\r\ntext".encode(), "Content-Type: text/plain", "warc-target-uri: http://c")
        + record("resource", PAGE.format("two").encode(), "Content-Type: text/html")
        + record("request", b"GET / HTTP/1.1\r\n\r\n")
        + answer(b"", status="404 Not Found")
        + answer(b"%PDF", kind="application/pdf")
        + answer("three 漢".encode("gb18030"), kind="Text/Plain; x=y; Charset='GBK'")
        + answer(PAGE.format("four").encode("gb18030"), kind='text/html; charset="gb2312"')
        + answer(b"", kind="text/plain")
    )
    texts, counts, _, documents = read(data)
    assert texts == [(1, "one 漢字"), (2, "plain 漢\ntext"), (3, "two 漢字"), (7, "three 漢"), (8, "four 漢字")]
    assert counts == {"read.documents": 5, "read.http_status": 1, "read.other_content": 1, "read.crlf": 1, "read.empty": 1}
    assert [document.marks for document in documents[:3]] == [
        {"url": "http://a/b", "title": "T"},
        {"url": "http://c"},
        {"title": "T"},
    ]
    assert read(b"".join(gzip.compress(part) for part in (page(), page("two"))), "a.warc.gz")[0] == [
        (0, "one 漢字"),
        (1, "two 漢字"),
    ]
    assert read(zstandard.compress(data), "a.warc.zst")[0] == texts
    assert read(b"")[1] == {"read.empty_file": 1}


@pytest.mark.parametrize("lying", [False, True])
def test_bodies_that_are_packed(read, lying):
    body = PAGE.format("one").encode()
    raw = zlib.compressobj(wbits=-15)
    packed = {
        "gzip": gzip.compress(body),
        "x-GZip": gzip.compress(body),
        "deflate": zlib.compress(body),
        "Deflate": raw.compress(body) + raw.flush(),
        "zstd": zstandard.ZstdCompressor(write_content_size=False).compress(body),
        "br": brotli(body),
        "identity": body,
        "deflate, gzip": gzip.compress(zlib.compress(body)),
    }
    data = b"".join(answer(body if lying else part, f"Content-Encoding: {name}") for name, part in packed.items())
    texts, counts, _, _ = read(data)
    assert texts == [(n, "one 漢字") for n in range(8)] and counts == {"read.documents": 8}


def test_bodies_that_are_in_chunks_cut_or_too_large(read):
    body = PAGE.format("one").encode()
    chunks = b"5;x=y\r\n" + body[:5] + b"\r\n%X\r\n" % len(body[5:]) + body[5:] + b"\r\n0\r\n\r\n"
    chunked = "Transfer-Encoding: chunked"
    data = answer(chunks, chunked) + answer(body, chunked) + answer(gzip.compress(body)[:-8], "Content-Encoding: gzip")
    assert [text for _, text in read(data)[0]] == ["one 漢字"] * 3
    bomb = answer(gzip.compress(bytes(1 << 20)), "Content-Encoding: gzip")
    long = answer(b"x" * 70_000)
    texts, counts, places, _ = read(bomb + long + answer(b"x", "Content-Encoding: lzw") + page(), page_bytes=65_536)
    assert texts == [(3, "one 漢字")]
    assert places == [
        ("read.http_body", "record 0", "the body of the answer unpacks to more than 65,536 bytes."),
        ("read.http_body", "record 2", "the body of the answer is encoded in a way that is not known."),
        ("read.too_long", "record 1", "the record has more than 65,536 bytes. If it is meant, raise read.page_bytes."),
    ]
    assert counts == {"read.documents": 1, "read.http_body": 2, "read.too_long": 1}


def test_an_answer_that_ends_within_its_fields_is_no_text(read):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
    texts, counts, places, _ = read(record("response", head) + record("response", head + b"\r\n" + PAGE.format("one").encode()))
    assert texts == [(1, "one 漢字")] and counts == {"read.documents": 1, "read.http_body": 1}
    assert places == [("read.http_body", "record 0", "the record ends within the fields of the answer, or they have no end.")]


BROKEN = "no record begins here: it is left out, up to the next line that begins one."


@pytest.mark.parametrize(
    "junk",
    [
        b"junk\r\nmore junk\r\n",
        b"\0\xff" * 70_000 + b"\n",
        b"WARC/1.0\r\nWARC-Type: response\r\n\r\nno length\r\n\r\n",
        record("response", b"abc", length="-5"),
        record("response", b"abc", length="x"),
        record("response", b"abc", length="9" * 30),
        record("response", b"abc\r\nand more", length=3),
        b"WARC/1.0\r\nA: " + b"x" * 70_000 + b"\r\n",
        b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: 3\r\n",
    ],
)
def test_after_a_broken_record_reading_goes_on(read, junk):
    texts, counts, places, _ = read(page() + junk + page("two"))
    assert [text for _, text in texts if text != "abc"] == ["one 漢字", "two 漢字"]
    assert places[-1][::2] == ("read.warc_record", BROKEN) and counts["read.warc_record"] == 1


def test_a_record_that_does_not_end(read):
    texts, counts, places, _ = read(page() + page("two")[:-20])
    assert texts == [(0, "one 漢字")]
    assert places == [("read.warc_record", "record 1", "the file ends within the record, which has 90 bytes.")]
    packed = gzip.compress(page()) + gzip.compress(page("two"))[:-20]
    texts, counts, places, _ = read(packed, "a.warc.gz")
    assert texts == [(0, "one 漢字")] and list(counts) == ["read.damaged", "read.documents"]


@pytest.mark.parametrize("most", [1 << 24, 300])
@pytest.mark.parametrize("more", [30, 200, 10**6])
def test_a_length_that_reaches_into_other_records_costs_its_record(read, more, most):
    lying = record("resource", b"x" * 400, "Content-Type: text/plain", length=400 + more)
    texts, counts, places, _ = read(page() + lying + page("two") + page("three"), page_bytes=most)
    assert texts == [(0, "one 漢字"), (1, "two 漢字"), (2, "three 漢字")]
    said = f"its length, {400 + more:,} bytes, reaches over the beginning of another record, where reading goes on."
    assert places == [("read.warc_record", "record 1", said)] and counts == {"read.documents": 3, "read.warc_record": 1}


def test_a_record_within_another_is_its_text(read):
    inner = record("resource", b"inner", "Content-Type: text/plain")
    outer = record("resource", b"outer\r\n\r\n" + inner, "Content-Type: text/plain")
    assert read(outer + b"\r\n" * 9 + page())[0] == [(0, f"outer\n\n{inner.decode()}".replace("\r\n", "\n")), (1, "one 漢字")]
    assert [text for _, text in read(outer[:-9])[0]] == []  # the inner one is cut short too


def test_broken_text_is_told_by_record_and_line(read):
    data = page() + answer(b"a\nb\xe9", kind="text/plain") + answer(b"<p>a\n\n\xe9\0")
    _, _, places, _ = read(data)
    assert [place[:2] for place in places] == [
        ("read.invalid_text", "record 1, line 2"),
        ("read.invalid_text", "record 2, line 3"),
        ("read.nul", "record 2, line 3"),
    ]
    assert len(read(data, broken_text="refuse")[0]) == 1


def found_in(data, cuts, most=1 << 24):
    """(records, counts) of bytes that come in chunks."""
    tally = Tally()
    reading = FileReading(SourceConfig("web"), FilePart("a.warc", "warc", 0, 1, 1, 0, 1), ReadConfig(page_bytes=most), tally)
    chunks, at = [], 0
    for size in cuts:
        chunks += [data[at : at + size]] if data[at : at + size] else []
        at += size
    reading.chunks = lambda: iter([*chunks, data[at:]] if data[at:] else chunks)
    reading.ended = "whole"
    return [(found.number, found.body) for found in records_of(reading)], tally.counts


CUTS = st.lists(st.integers(1, 40), max_size=40)


@settings(max_examples=30)
@given(bodies=st.lists(st.binary(max_size=30), max_size=6), cuts=CUTS, blank=st.integers(0, 3))
def test_records_are_the_same_in_whatever_chunks_they_come(bodies, cuts, blank):
    bodies = [body.replace(b"WARC/1.", b"") for body in bodies]
    data = b"".join(record("resource", body) + b"\r\n" * blank for body in bodies)
    assert found_in(data, cuts) == (list(enumerate(bodies)), {})


@pytest.mark.parametrize("most", [10, 1 << 24])
@pytest.mark.parametrize("lie", range(13))
def test_a_length_that_ends_within_the_next_record_s_beginning_costs_itself(most, lie):
    data = record("resource", b"body 5\n\n", length=8 + lie) + record("resource", b"last")
    for cuts in ([], [1] * len(data)):
        found, counts = found_in(data, cuts, most)
        assert [body for _, body in found][-1] == b"last"
        assert counts == ({} if lie < 5 else {"read.warc_record": 1})


@settings(max_examples=60)
@given(
    lies=st.lists(st.integers(-20, 300), max_size=6), cuts=CUTS, most=st.sampled_from([10, 70, 1 << 24]), cut=st.integers(0, 30)
)
def test_lengths_that_lie_cost_the_same_in_whatever_chunks_they_come(lies, cuts, most, cut):
    records = [record("resource", b"body %d\n\n" % lie, length=max(0, 8 + lie)) for lie in lies]
    data = b"".join([*records, record("resource", b"last")])
    data = data[: len(data) - cut]
    found, counts = found_in(data, cuts, most)
    assert (found, counts) == found_in(data, [], most)
    assert cut > 4 or b"last" in [body for _, body in found]
