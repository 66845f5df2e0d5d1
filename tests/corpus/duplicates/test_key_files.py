"""Files of columns: what is written is read; whatever is not such a file is an error that names it."""

import numpy as np
import pytest

from megatrain.corpus.duplicates.key_files import KeyFile, KeyFileError, hashes_of, written


def write(path, kind="fingerprints"):
    with written(path, kind) as writer:
        writer.about["documents"] = 3
        writer.block({"a": np.arange(3, dtype=np.uint32), "b": np.ones((2, 5), np.uint64)})
        writer.block({"a": np.zeros(0, np.uint32)})


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "keys")
    file = KeyFile(tmp_path / "keys", "fingerprints")
    assert file.about == {"documents": 3}
    first, second = file.blocks
    assert first.column("b").shape == (2, 5)
    assert first.column("b").read(1).tolist() == [[1] * 5]
    assert first.column("b").part(1).read(2).tolist() == [1] * 3
    assert first.column("a").read(1, 2).tolist() == [1]
    assert second.column("a").read().tolist() == []
    assert file.read("a").tolist() == [0, 1, 2]
    assert file.read("a").dtype == np.uint32
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def test_the_bytes_are_the_same_for_ever(tmp_path):
    write(tmp_path / "keys")
    found = (tmp_path / "keys").read_bytes()
    assert found[:17] == b"megatrain keys 1\n"
    assert found[64:76] == bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])
    footer = (
        b'{"kind": "fingerprints", "about": {"documents": 3}, "blocks": [{"a": ["<u4", [3], 64], "b": ["<u8", [2, 5], 128]}, '
        b'{"a": ["<u4", [0], 256]}]}'
    )
    assert found[256:-16] == footer


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda whole: b"", "it has 0 bytes"),
        (lambda whole: whole[:200], "its footer has another hash than it says|ask for a footer of"),
        (lambda whole: whole[:-1], "another hash|ask for a footer"),
        (lambda whole: b"x" + whole[1:], "does not begin with 'megatrain keys 1'"),
        (lambda whole: whole[:-30] + b"#" + whole[-29:], "its footer has another hash than it says"),
        (lambda whole: whole[:-16] + b"\xff" * 16, "ask for a footer of 18,446,744,073,709,551,615 bytes"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, said):
    path = tmp_path / "keys"
    write(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(KeyFileError, match=f"keys is damaged: .*({said}).*Remove it and run the same command again"):
        KeyFile(path, "fingerprints")


@pytest.mark.parametrize("shape", [[1 << 40], [-1], ["3"]])
def test_a_column_that_lies_elsewhere_is_refused(tmp_path, shape):
    path = tmp_path / "keys"
    with written(path, "pairs") as writer:
        writer._blocks.append({"a": ["<u4", shape, 64]})
    with pytest.raises(KeyFileError, match="keys is damaged"):
        KeyFile(path, "pairs").read("a")


def test_a_column_or_kind_that_is_not_there(tmp_path):
    write(tmp_path / "keys")
    with pytest.raises(KeyFileError, match="it has no column c"):
        KeyFile(tmp_path / "keys", "fingerprints").blocks[0].column("c")
    with pytest.raises(KeyFileError, match="keys holds fingerprints, where pairs are wanted"):
        KeyFile(tmp_path / "keys", "pairs")
    with pytest.raises(FileNotFoundError):
        KeyFile(tmp_path / "none", "pairs")


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 16, 1000])
def test_parts_cover_all_hashes_once(tmp_path, parts):
    edges = [0, 1, (1 << 64) // 3, (1 << 64) // 3 + 1, 1 << 63, (1 << 63) - 1, (1 << 64) - 1]
    hashes = sorted({*edges, *(part * (1 << 64) // parts for part in range(parts))})
    with written(tmp_path / "keys", "pairs") as writer:
        writer.block({"a": np.array(hashes, np.uint64)})
    column = KeyFile(tmp_path / "keys", "pairs").blocks[0].column("a")
    ranges = [column.range_of(*hashes_of(part, parts)) for part in range(parts)]
    assert [one.stop for one in ranges[:-1]] == [one.start for one in ranges[1:]]
    assert (ranges[0].start, ranges[-1].stop) == (0, len(hashes))


def test_ranges_and_rows_are_those_of_the_whole_column(tmp_path):
    draw = np.random.default_rng(3)
    values, table = np.sort(draw.integers(0, 2000, 5000)), draw.integers(0, 1 << 32, (5000, 3)).astype(np.uint32)
    with written(tmp_path / "keys", "pairs") as writer:
        writer.block({"a": values, "b": table})
    (block,) = KeyFile(tmp_path / "keys", "pairs").blocks
    for low, high in ((-1, 0), (0, 0), (17, 17), (100, 1500), (1999, 2000), (3000, 4000)):
        found = block.column("a").range_of(low, high)
        assert found == slice(np.searchsorted(values, low, "left"), np.searchsorted(values, high, "right"))
    for number in (0, 1, 40, 5000):
        rows = np.sort(draw.permutation(5000)[:number])
        assert (block.column("b").take(rows) == table[rows]).all()


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    write(tmp_path / "keys")
    column = KeyFile(tmp_path / "keys", "fingerprints").blocks[0].column("b")
    (tmp_path / "keys").write_bytes((tmp_path / "keys").read_bytes()[:150])
    with pytest.raises(KeyFileError, match="keys is damaged: of 80 bytes of a column, 22 are there"):
        column.read()
