"""Units of work are cut from the files alone, and together give every document once, wherever they are cut."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.corpus.document import Tally
from megatrain.corpus.reading import file_reading, units
from megatrain.corpus.reading.choices import ReadConfig, SourceConfig
from megatrain.corpus.reading.documents import read_unit
from megatrain.corpus.reading.units import WorkUnit, cut_units
from megatrain.data.prepare.read import ReadError
from megatrain.files import opened_plain


def read_config(*sources, **values):
    return ReadConfig(tuple(sources), **values)


def source(*paths, name="web", **values):
    return SourceConfig(name, tuple(map(str, paths)), **values)


def read_all(config):
    tally = Tally()
    return [document for unit in cut_units(config) for document in read_unit(unit, config, tally)], tally


def shape(units):
    return [[(Path(part.file).name, part.start, part.stop) for part in unit.parts] for unit in units]


def test_large_files_are_cut_evenly_and_small_ones_put_together(tmp_path):
    for name, size in (
        ("a.jsonl", 250),
        ("b.txt", 60),
        ("c.txt", 40),
        ("d.txt", 1),
        ("e.txt", 400),
        ("f.txt.gz", 20),
        ("g.txt", 20),
    ):
        (tmp_path / name).write_bytes(b"x" * size)
    units = cut_units(read_config(source(tmp_path / "*"), unit_bytes=100))
    assert shape(units) == [
        [("a.jsonl", 0, 83)],
        [("a.jsonl", 83, 166)],
        [("a.jsonl", 166, 250)],
        [("b.txt", 0, 60), ("c.txt", 0, 40)],
        [("d.txt", 0, 1)],
        [("e.txt", 0, 400)],
        [("f.txt.gz", 0, 20), ("g.txt", 0, 20)],
    ]
    assert [unit.size for unit in units] == [83, 83, 84, 100, 1, 400, 40]


def test_a_unit_is_plain_values_and_its_identity_those_of_its_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("text")
    config = read_config(source(file))
    (unit,) = cut_units(config)
    assert WorkUnit.of_json(json.loads(json.dumps(unit.as_json()))) == unit
    assert cut_units(config)[0].identity == unit.identity
    assert len(unit.identity) == 32
    for size, time in ((5, file.stat().st_mtime_ns), (4, 1)):
        file.write_text("x" * size)
        os.utime(file, ns=(time, time))
        assert cut_units(config)[0].identity != unit.identity


def test_the_order_of_files_and_sources_changes_nothing(tmp_path):
    for name in ("b/1.txt", "a/2.txt", "a-/3.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    one, two = source(tmp_path / "b/*", tmp_path / "a*/*", name="one"), source(tmp_path / "c.txt", name="two")
    units = cut_units(read_config(one, two))
    assert [[part.file.removeprefix(f"{tmp_path}/") for part in unit.parts] for unit in units] == [
        ["a-/3.txt", "a/2.txt", "b/1.txt"],
        ["c.txt"],
    ]
    other = source(tmp_path / "a/2.txt", tmp_path / "a*/*", tmp_path / "**/1.txt", name="one")
    assert cut_units(read_config(two, other)) == units


def test_a_link_names_the_same_file(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to("a.txt")
    assert shape(cut_units(read_config(source(tmp_path / "*.txt")))) == [[("a.txt", 0, 4)]]
    both = read_config(source(tmp_path / "a.txt", name="one"), source(tmp_path / "b.txt", name="two"))
    with pytest.raises(ReadError) as error:
        cut_units(both)
    assert str(error.value) == (
        f"read.sources: {tmp_path}/b.txt belongs to two, and as {tmp_path}/a.txt to one. Its documents would count twice: leave it out "
        "of the paths of one of them."
    )


def test_a_name_with_letters_of_patterns_is_itself(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    assert shape(cut_units(read_config(source(tmp_path / "a[1].txt")))) == [[("a[1].txt", 0, 4)]]


def test_a_file_that_cannot_be_opened_is_whole_and_its_reader_counts_it(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a row"}\n' * 9)
    (tmp_path / "b.jsonl").write_text('{"text": "another row"}\n')

    def refusing(path):
        if str(path).endswith("a.jsonl"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened_plain(path)

    for module in (units, file_reading):
        monkeypatch.setattr(module, "opened_plain", refusing)
    config = read_config(source(tmp_path / "*.jsonl"), unit_bytes=50)
    assert shape(cut_units(config)) == [[("a.jsonl", 0, 162)], [("b.jsonl", 0, 24)]]
    documents, tally = read_all(config)
    assert [document.text for document in documents] == ["another row"]
    assert tally.counts["read.unreadable"] == 1


def test_of_source_code_all_files_are_texts(tmp_path):
    for name in ("Makefile", "a.rs", "b.json", "c.html", "d.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    (unit,) = cut_units(read_config(source(tmp_path / "*", kind="code")))
    assert [part.form for part in unit.parts] == ["text", "text", "text", "text", "lines"]


def refused(config):
    with pytest.raises(ReadError) as error:
        cut_units(config)
    return str(error.value)


def test_sources_that_cannot_be_read_are_told_of(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.pdf").write_text("text")
    (tmp_path / "c.PDF").write_text("text")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo.txt")
    here = Path.cwd()
    assert refused(read_config()) == "read.sources is empty. Name at least one: [{name: web, paths: [raw/web/*.jsonl]}]."
    assert refused(read_config(source("x", name=""))) == "read.sources[0] has no name. Give it one, such as `name: web`."
    assert (
        refused(read_config(source())) == "read.sources[0].paths is empty. Name its files, such as `paths: [raw/web/*.jsonl]`."
    )
    assert refused(read_config(source("a"), source("b"))) == (
        "read.sources[1].name='web' is the name of another source too. Give each its own."
    )
    assert refused(read_config(source("a", encoding="utf-9"))) == (
        "read.sources[0].encoding='utf-9' is no encoding of Python. Use for example utf-8, gb18030, shift_jis or windows-1252."
    )
    for name in ("rot13", "hex", "zlib", "idna", "punycode", "undefined", "utf\0"):
        assert refused(read_config(source("a", encoding=name))).startswith(f"read.sources[0].encoding={name!r} is no encoding")
    assert refused(read_config(source(tmp_path / "*.zip"))) == (
        f"web: {tmp_path}/*.zip matches no file (relative paths start at {here})."
    )
    assert refused(read_config(source("nowhere.txt"))) == f"web: nowhere.txt does not exist (relative paths start at {here})."
    assert refused(read_config(source(tmp_path))) == (
        f"web: {tmp_path} is a directory; name its files, for example {tmp_path}/**/*.jsonl."
    )
    assert refused(read_config(source(tmp_path / "gone.txt"))) == f"web: {tmp_path}/gone.txt is a link to nothing."
    assert refused(read_config(source(tmp_path / "fifo.txt"))) == (
        f"web: {tmp_path}/fifo.txt is no plain file: write what it gives to a file, and name that."
    )
    assert refused(read_config(source(tmp_path / "*.[pP]*"))) == (
        f"web: {tmp_path}/b.pdf (and 1 more like it): what kind of file is this? Names end in .txt, .md, .rst, .py, .jsonl, .json, "
        ".ndjson, .html, .htm, .warc, .parquet, then .gz or .zst where compressed. Say `form: text` (or lines, html, warc, parquet) where "
        "names do not, or `kind: code` for source code, or name fewer files in `paths`."
    )
    assert shape(cut_units(read_config(source(tmp_path / "[ab].*", form="text")))) == [[("a.txt", 0, 4), ("b.pdf", 0, 4)]]


def test_a_name_that_is_no_text_is_told_of(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("text")
    assert refused(read_config(source(tmp_path / "*.txt"))) == (
        f"web: the name of {tmp_path}/\\udcff.txt is not UTF-8, and goes with its documents. Rename the file."
    )


LINE = st.one_of(
    st.text(max_size=40).map(lambda text: json.dumps({"text": text}, ensure_ascii=False)),
    st.sampled_from(["", "", "{", '{"text": 5}', "   ", '"text"', '{"text": "a\\u2028b\\r"}\r']),
)


@settings(max_examples=60)
@given(
    lines=st.lists(LINE, max_size=12),
    end=st.sampled_from(["", "\n"]),
    unit_bytes=st.integers(1, 400),
    longest=st.integers(10, 80),
)
def test_units_together_give_what_the_whole_file_gives(tmp_path_factory, lines, end, unit_bytes, longest):
    folder = tmp_path_factory.mktemp("cut")
    file = folder / "a.jsonl"
    file.write_bytes(("\n".join(lines) + end).encode())
    whole, told = read_all(read_config(source(file), longest=longest))
    cut, told_too = read_all(read_config(source(file), longest=longest, unit_bytes=unit_bytes))
    assert cut == whole
    assert told_too.counts == told.counts and {k: v[:20] for k, v in told_too.places.items()} == told.places
    expected = []
    at = 0
    for line in lines:
        data = line.encode()
        if len(data) <= longest and line.startswith('{"text": "') and (text := json.loads(line)["text"].replace("\0", "")):
            expected.append((at, text))
        at += len(data) + 1
    assert [(document.at, document.text) for document in whole] == expected


def test_a_file_that_cannot_be_cut_anywhere_is_whole(tmp_path):
    row = json.dumps({"text": "漊" * 20}, ensure_ascii=False) + "\n"  # U+6F0A has a byte 10 in UTF-16
    for encoding, parts in (("utf-16", 1), ("utf-16-le", 1), ("utf-32", 1), ("gb18030", 3), ("utf-8", 4), ("iso2022_jp_2", 1)):
        name = f"{encoding}.jsonl"
        (tmp_path / name).write_bytes((row * 4).encode(encoding))
        config = read_config(source(tmp_path / name, encoding=encoding), unit_bytes=80)
        units = cut_units(config)
        assert (encoding, len(units)) == (encoding, parts)
        documents, tally = read_all(config)
        assert [document.text for document in documents] == ["漊" * 20] * 4
        assert tally.counts == {"read.documents": 4}
    assert len(cut_units(read_config(source(tmp_path / "utf-16.jsonl"), unit_bytes=80))) == 1  # told by its mark
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(os.urandom(500)))
    assert len(cut_units(read_config(source(tmp_path / "b.jsonl.gz"), unit_bytes=80))) == 1
