"""Nothing of a compiled model is used that is not as it was written, and nothing that it claims is believed."""

import json
import os
import random

import numpy as np
import pytest

from megatrain.ngram import binary, load
from megatrain.ngram.arpa_in import read_arpa
from megatrain.ngram.binary import MAGIC, BinaryError, open_binary, write_binary
from megatrain.ngram.build import model_of
from megatrain.ngram.lazy import BLOCK_BYTES, LazyArray, ModelFile, block_count, checksums
from megatrain.ngram.table import EMPTY, Table, TableError

ARPA = b"""\\data\\
ngram 1=5
ngram 2=3
ngram 3=1

\\1-grams:
-2.0 <unk>
-99 <s> -0.5
-1.0 </s>
-0.4 a -0.2
-0.6 bb -0.1

\\2-grams:
-0.3 <s> a -0.7
-0.2 a bb -0.3
-0.1 bb </s>

\\3-grams:
-0.05 <s> a bb

\\end\\
"""
ASKED = ["a bb", "bb a", "x a"]


@pytest.fixture
def compiled(tmp_path):
    (tmp_path / "m.arpa").write_bytes(ARPA)
    write_binary(model_of(read_arpa(tmp_path / "m.arpa")), tmp_path / "m.bin")
    write_binary(model_of(read_arpa(tmp_path / "m.arpa")), tmp_path / "q.bin", quantize=4)
    return tmp_path


def parts(path):
    """The header of a file, and its sections as they are there."""
    data = path.read_bytes()
    length = int.from_bytes(data[8:12], "little")
    said = json.loads(data[12 : 12 + length])
    start = 12 + length
    return said, {
        name: np.frombuffer(data, dtype, count, start + offset).copy()
        for name, (offset, dtype, count) in said["sections"].items()
    }


def written(path, said, sections, monkeypatch=None):
    """A file of these sections whose checksums are all right, as a stranger could make it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binary, "_sections", lambda _model, _bits: {n: s for n, s in sections.items() if n != "checksums"})
        write_binary(type("Model", (), {"order": said["order"]}), path)
    return path


def claimed(path, said, rest):
    """A file with another header, whose own checksum is right."""
    said = {key: value for key, value in said.items() if key != "crc32"}
    path.write_bytes(MAGIC + binary._header(said) + rest)
    return path


@pytest.mark.parametrize(("name", "every"), [("m.bin", 7), ("q.bin", 13)])
def test_no_byte_of_a_file_may_change(compiled, name, every):
    data = (compiled / name).read_bytes()
    draw = random.Random(5)
    for place in range(0, len(data), every):
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        (compiled / "bad").write_bytes(changed)
        with pytest.raises(BinaryError, match="bad"):
            open_binary(compiled / "bad")
    for changed in (data[:-1], data[:-64], data + b"\0", data + bytes(64), data[:64]):
        (compiled / "bad").write_bytes(changed)
        with pytest.raises(BinaryError, match=r"is cut short: it has|has more than a model: it has|or is cut short"):
            open_binary(compiled / "bad")


def test_a_large_model_is_verified_where_it_is_read(compiled, monkeypatch):
    """Opened at once; each byte that a score depends on is refused when it is read."""
    monkeypatch.setattr(binary, "AT_ONCE", 0)
    said, sections = parts(compiled / "m.bin")
    right = list(load(compiled / "m.bin").score(ASKED))
    assert right == list(load(compiled / "m.arpa").score(ASKED))
    start = (compiled / "m.bin").stat().st_size - sum(-(-s.nbytes // 64) * 64 for s in sections.values())
    for name in [name for name, values in sections.items() if values.size and name not in ("words", "checksums")]:
        data = bytearray((compiled / "m.bin").read_bytes())
        data[start + said["sections"][name][0]] ^= 1
        (compiled / "bad").write_bytes(data)
        model = open_binary(compiled / "bad")
        if sections[name].size:
            with pytest.raises(
                BinaryError, match=rf"bad is damaged: the checksum of its {name}, \d+ bytes from 0 on, is not the one"
            ):
                list(model.score(ASKED))
        with pytest.raises(BinaryError, match="is damaged"):
            open_binary(compiled / "bad", verify=True)


def test_a_section_reads_only_the_blocks_that_are_asked_for(tmp_path):
    values = np.arange(5 * BLOCK_BYTES // 8, dtype="<i8")
    data = values.view(np.uint8).copy()
    sums = checksums(values)
    data[3 * BLOCK_BYTES] ^= 1
    (tmp_path / "m").write_bytes(bytes(128) + data.tobytes())
    section = LazyArray(ModelFile(tmp_path / "m"), "x", 128, "<i8", values.size, sums, lambda part: part < 0)
    each = BLOCK_BYTES // 8
    asked = np.array([0, each - 1, 2 * each, 5 * each - 1])
    assert section[asked].tolist() == asked.tolist() and section._unread.tolist() == [False, True, False, True, False]
    assert section[np.zeros(0, np.int64)].size == 0
    with pytest.raises(BinaryError, match=r"the checksum of its x, 65536 bytes from 196,608 on"):
        section[np.array([0, 3 * each + 5])]
    assert block_count(values.nbytes) == sums.size == 5


@pytest.mark.parametrize("name", ["m.bin", "q.bin"])
def test_a_file_that_is_cut_or_overwritten_under_a_model(compiled, monkeypatch, name):
    """What was read stays; what was not is an error that names the file, not the end of the process."""
    monkeypatch.setattr(binary, "AT_ONCE", 0)
    path = compiled / name
    read, unread = open_binary(path), open_binary(path)
    right = list(read.score(ASKED))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"x" * size)
    with pytest.raises(BinaryError, match=rf"{name} is damaged: the checksum of its"):
        list(unread.score(ASKED))
    os.truncate(path, 700)
    with pytest.raises(
        BinaryError, match=rf"{name} was cut short while it was in use: it has 700 bytes, and had {size:,}\. Compile"
    ):
        list(unread.score(ASKED))
    assert list(read.score(ASKED)) == right


HEADERS = {
    "a negative offset": lambda rows: rows["1.log10"].__setitem__(0, -64),
    "an offset of its neighbour": lambda rows: rows["1.log10"].__setitem__(0, rows["1.backoff"][0]),
    "a count of 2**62": lambda rows: rows["words"].__setitem__(2, 1 << 62),
    "a negative count": lambda rows: rows["words"].__setitem__(2, -1),
    "a count of text": lambda rows: rows["words"].__setitem__(2, "5"),
    "a count that is true": lambda rows: rows["words"].__setitem__(2, True),
    "objects for numbers": lambda rows: rows["words"].__setitem__(1, "|O"),
    "a table without room": lambda rows: rows["2.keys"].__setitem__(2, 0),
    "a table of no power of two": lambda rows: rows["2.keys"].__setitem__(2, 15),
    "fewer values than slots": lambda rows: rows["2.log10"].__setitem__(2, 15),
    "a section less": lambda rows: rows.pop("2.backoff"),
    "a section more": lambda rows: rows.update({"4.keys": [0, "<u8", 16]}),
    "an order that is another": lambda rows: rows.update(words=rows.pop("words")),
    "a row that is none": lambda rows: rows.update(words=5),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_no_model_has_is_refused(compiled, case):
    said, _ = parts(compiled / "m.bin")
    rest = (compiled / "m.bin").read_bytes()[12 + int.from_bytes((compiled / "m.bin").read_bytes()[8:12], "little") :]
    open_binary(claimed(compiled / "same", said, rest))
    HEADERS[case](said["sections"])
    with pytest.raises(BinaryError, match="bad is damaged: its header says what no model has"):
        open_binary(claimed(compiled / "bad", said, rest))
    for order in (0, -1, 2, 4, 10**9, "3", None, True):
        with pytest.raises(BinaryError, match="bad is damaged: its header says what no model has"):
            open_binary(claimed(compiled / "bad", {**parts(compiled / "m.bin")[0], "order": order}, rest))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("word_ends", -1),
        ("word_ends", 1000),
        ("word_numbers", 5),
        ("1.log10", np.nan),
        ("2.log10", 0.5),
        ("3.log10", -np.inf),
        ("1.backoff", np.inf),
        ("1.log10_values", np.nan),
        ("2.log10", 200),
    ],
)
def test_values_that_no_model_has_are_refused_though_their_checksum_is_right(compiled, name, value):
    kind = "q.bin" if "values" in name or value == 200 else "m.bin"
    said, sections = parts(compiled / kind)
    open_binary(written(compiled / "same", said, sections))
    sections[name][-1] = value
    with pytest.raises(BinaryError, match=rf"bad is damaged: its {name} has .* at place {sections[name].size - 1}"):
        open_binary(written(compiled / "bad", said, sections))


def test_a_full_table_ends_the_search(compiled):
    said, sections = parts(compiled / "m.bin")
    sections["2.keys"] = np.where(sections["2.keys"] == EMPTY, np.uint64(7), sections["2.keys"])
    with pytest.raises(TableError, match=r"bad is damaged: a table of it has 1024 slots side by side and none is free"):
        list(open_binary(written(compiled / "bad", said, sections)).score(ASKED))
    keys = np.arange(1, 17, dtype=np.uint64)
    assert Table(Table.of(keys)[0].keys).find(keys[:1]).size == 1
    with pytest.raises(TableError, match="the model is damaged"):
        Table(np.arange(16, dtype=np.uint64)).find(np.array([99], np.uint64))
