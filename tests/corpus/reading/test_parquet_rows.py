"""Rows of parquet files, which megatrain.corpus.reading.parquet_process reads, with values by megatrain.corpus.reading.parquet_values."""

import datetime
import decimal
import json
import signal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatrain.corpus.document import Tally
from megatrain.corpus.reading.choices import ReadConfig, SourceConfig
from megatrain.corpus.reading.documents import read_unit
from megatrain.corpus.reading.file_reading import ChangedError
from megatrain.corpus.reading.parquet_answers import ParquetReader
from megatrain.corpus.reading.units import cut_units
from megatrain.isolation import DiedError


@pytest.fixture
def read(tmp_path):
    """Reads a table, or a file with these bytes."""

    def read_table(table, rows=100, unit_bytes=1 << 20, limits=None, **source):
        file = tmp_path / "a.parquet"
        if isinstance(table, bytes):
            file.write_bytes(table)
        else:
            pq.write_table(table, file, row_group_size=rows)
        config = ReadConfig((SourceConfig("web", (str(file),), **source),), unit_bytes=unit_bytes, **(limits or {}))
        tally = Tally()
        read_table.units = cut_units(config)
        documents = [document for unit in read_table.units for document in read_unit(unit, config, tally)]
        places = [(name, place.where, place.said) for name, places in tally.places.items() for place in places]
        counts = {name: count for name, count in tally.counts.items() if name != "read.documents"}
        return [(document.at, document.text, document.marks) for document in documents], counts, places

    return read_table


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_rows_of_any_kind_of_text(read, kind):
    table = pa.table({"text": pa.array(["one", "漢", "one"], pa.string()).cast(kind), "other": [1, 2, 3]})
    assert read(table) == ([(0, "one", {}), (1, "漢", {}), (2, "one", {})], {}, [])


def test_row_groups_are_units_and_rows_are_numbered_in_the_file(read, tmp_path):
    table = pa.table({"text": [f"row {n} " + "x" * n for n in range(250)]})
    whole = read(table, rows=50)
    assert whole == ([(n, f"row {n} " + "x" * n, {}) for n in range(250)], {}, [])
    assert len(read.units) == 1
    for unit_bytes, units in ((30_000, 2), (1, 5)):
        assert read(table, rows=50, unit_bytes=unit_bytes) == whole
        assert len(read.units) == units
        assert sum(unit.size for unit in read.units) == (tmp_path / "a.parquet").stat().st_size
    assert [(part.start, part.stop) for unit in read.units for part in unit.parts] == [(n, n + 1) for n in range(5)]


def test_fields_that_are_kept(read):
    day = datetime.date(2026, 1, 2)
    table = pa.table(
        {"body": ["t"], "url": ["http://a"], "n": [5], "day": [day], "x": [{"a": [b"\xff"], "b": 1.5}], "no": [None]}
    )
    ((_, _, marks),) = read(table, key="body", keep=("url", "n", "day", "x", "no", "missing"))[0]
    assert marks == {"url": "http://a", "n": 5, "day": "2026-01-02", "x": {"a": ["\ufffd"], "b": 1.5}, "no": None}
    json.dumps(marks)


KEPT = [
    (pa.array([1], pa.timestamp("ns")), "1970-01-01T00:00:00.000000001"),
    (pa.array([1], pa.timestamp("us", "Europe/Berlin")), "1970-01-01T00:00:00.000001Z"),
    (pa.array([86400], pa.timestamp("s")).dictionary_encode(), "1970-01-02T00:00:00.000"),
    (pa.array([10**15], pa.timestamp("ms")), "<value out of range: 1000000000000000>"),
    (pa.array([2**62], pa.timestamp("us")), "<value out of range: 4611686018427387904>"),
    (pa.array([2**30], pa.date32()), "<value out of range: 1073741824>"),
    (pa.array([3 * 86_400_000], pa.date64()), "1970-01-04"),
    (pa.array([123_456_789_123], pa.time64("ns")), "00:02:03.456789123"),
    (pa.array([1], pa.time32("s")), "00:00:01.000"),
    (pa.array([-1_000_000_001], pa.duration("ns")), "-PT1.000000001S"),
    (pa.array([10**15], pa.duration("s")), "PT1000000000000000S"),
    (pa.array([decimal.Decimal("1.50")]), "1.50"),
    (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
    (pa.array([1.5], pa.float32()).cast(pa.float16()), 1.5),
    (pa.array([True]), True),
    (pa.array([b"a\xff"], pa.binary(2)), "a\ufffd"),
    (pa.array([b"\xff"], pa.binary()).view(pa.string()), "\ufffd"),
    (pa.array([[None, 1]], pa.list_(pa.timestamp("ns"))), [None, "1970-01-01T00:00:00.000000001"]),
    (pa.array([["a", "b"]], pa.list_(pa.string(), 2)), ["a", "b"]),
    (
        pa.array([{"t": 1, "n": None}], pa.struct([("t", pa.time64("ns")), ("n", pa.int8())])),
        {"t": "00:00:00.000000001", "n": None},
    ),
    (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.duration("ms"))), [{"key": "a", "value": "PT0.001S"}]),
    (pa.array([b"0123456789abcdef"], pa.uuid()), "0123456789abcdef"),
]
"""Columns of one value, and what is kept of it; parquet has no seconds, but milliseconds."""


def test_what_json_cannot_hold_is_kept_as_text(read):
    def behind_nulls(column):
        return pa.concat_arrays([pa.nulls(1, column.type), column]) if isinstance(column, pa.Array) else column

    names = [f"x{number}" for number in range(len(KEPT))]
    columns = {name: behind_nulls(column) for name, (column, _) in zip(names, KEPT, strict=True)}
    rows, counts, _ = read(pa.table({"text": ["a", "b"], **columns}), keep=tuple(names))
    assert [marks for _, _, marks in rows] == [
        dict.fromkeys(names),
        dict(zip(names, (value for _, value in KEPT), strict=True)),
    ]
    assert counts == {}
    orjson.dumps([marks for _, _, marks in rows])


def test_bad_rows(read):
    text = pa.array([b"good", b"caf\xe9", None, b"", b"a\0b", b"x" * 50, b"good"], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), len(text), text.buffers())})
    rows, counts, places = read(table, limits={"longest": 49})
    assert rows == [(0, "good", {}), (1, "caf\ufffd", {}), (4, "ab", {}), (6, "good", {})]
    assert counts == {"read.invalid_text": 1, "read.no_string": 1, "read.empty": 1, "read.nul": 1, "read.too_long": 1}
    assert [place[:2] for place in places] == [
        ("read.invalid_text", "row 2, line 1"),
        ("read.no_string", "row 3"),
        ("read.nul", "row 5, line 1"),
        ("read.too_long", "row 6"),
    ]
    assert [row[0] for row in read(table, limits={"broken_text": "refuse"})[0]] == [0, 5, 6]
    assert (
        read(pa.table({"text": pa.array([1], pa.timestamp("ns"))}))[2][0][2]
        == "the value of 'text' is timestamp[ns], not a string."
    )
    assert read(pa.table({"text": [1]}))[2] == [("read.no_string", "row 1", "the value of 'text' is int, not a string.")]


def test_bad_files(read, tmp_path):
    missing = "there is no column 'text'; the file has 'a', 'b'. Say in `key:` of web which is the text."
    assert read(pa.table({"a": ["x"], "b": [1]})) == ([], {"read.no_key": 1}, [("read.no_key", "", missing)])
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    assert read(twice)[1:] == (
        {"read.duplicate_key": 1},
        [("read.duplicate_key", "", "the column 'text' is there twice. Which of them counts?")],
    )
    assert read(pa.table({"text": pa.array([], pa.string())})) == ([], {}, [])
    for data in (b"", b"no parquet", b"PAR1" + bytes(60) + b"PAR1"):
        rows, counts, _ = read(data)
        assert (rows, sum(counts.values())) == ([], 1) and counts.keys() <= {
            "read.damaged",
            "read.unreadable",
            "read.empty_file",
        }
    read(pa.table({"text": [f"{n} text" for n in range(5000)]}), rows=500)
    data = (tmp_path / "a.parquet").read_bytes()
    rows, counts, _ = read(data[: len(data) // 2] + bytes(1000) + data[len(data) // 2 + 1000 :])
    assert 500 <= len(rows) < 5000 and sum(counts.values()) >= 1
    assert read(data[:-100])[:2] == ([], {"read.damaged": 1})


def test_a_bomb_costs_its_file(read):
    table = pa.table({"text": pa.array(["x" * (1 << 20)] * 9).dictionary_encode().cast(pa.string())})
    rows, counts, places = read(table)
    assert len(rows) == 9
    rows, counts, places = read(table, limits={"unpacked_mib": 1, "unpacked_ratio": 1})
    assert rows == [] and counts == {"read.bomb": 1}
    assert places[0][2].endswith("If it is meant, make smaller ones, or raise read.unpacked_ratio or read.unpacked_mib.")


def test_a_file_that_ends_what_reads_it_costs_itself(read, monkeypatch):
    def dies(_):
        raise DiedError(-signal.SIGABRT)

    monkeypatch.setattr(ParquetReader, "_bytes", dies)
    said = "the file was cut short or is damaged (what reads it breaks down, SIGABRT); what comes before is kept."
    assert read(pa.table({"text": ["a"]})) == ([], {"read.damaged": 1}, [("read.damaged", "", said)])


def test_row_groups_that_could_not_be_counted_are_read(read, monkeypatch):
    monkeypatch.setattr("megatrain.corpus.reading.units.row_groups", lambda _tables, _file: [])
    assert read(pa.table({"text": ["a"] * 9}), rows=2)[0][-1] == (8, "a", {})


def test_a_file_that_changes_is_noticed(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"] * 100}), file)
    config = ReadConfig((SourceConfig("web", (str(file),)),))
    (unit,) = cut_units(config)
    rows = read_unit(unit, config, Tally())
    next(rows)
    with file.open("ab") as grown:
        grown.write(b"x")
    with pytest.raises(ChangedError):
        list(rows)
