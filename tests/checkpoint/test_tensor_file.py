"""Files are those of the safetensors library, and nothing that one claims is believed."""

import json
import os
import re

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatrain.checkpoint import writing
from megatrain.checkpoint.tensor_file import DTYPES, Move, TensorFile, hash_block, header_of, move
from megatrain.checkpoint.together import DamagedCheckpointError
from megatrain.checkpoint.writing import PlannedFile, Staging, Writer
from megatrain.parallel.portion import TensorElements

FLOATS = (torch.bfloat16, torch.float64, torch.float16, torch.float32)


def tensors():
    torch.manual_seed(0)
    named = {f"t{i}": torch.randn(3 + i).to(dtype) for i, dtype in enumerate(FLOATS)}
    return {**named, "nothing": torch.empty(0), "bytes": torch.arange(5, dtype=torch.uint8), "é": torch.ones(1)}


@pytest.mark.parametrize("block_bytes", [8, 64, 2**20])
def test_the_library_reads_what_is_written_here(tmp_path, block_bytes):
    named = tensors()
    writer = Writer(Staging(0, torch.device("cpu"), block_bytes))
    file = PlannedFile(tmp_path / "x.safetensors", {n: (TensorElements(t), t.numel()) for n, t in named.items()})
    with writer.copying(first=True):
        writer.write(file)
    writer.close()
    got = load_file(file.path)
    assert got.keys() == named.keys() and all(torch.equal(got[n], t) for n, t in named.items())
    data = file.path.read_bytes()
    assert len(data) == file.size
    assert file.blocks == [hash_block(data[i : i + block_bytes]) for i in range(0, len(data), block_bytes)]


@pytest.mark.parametrize("block_bytes", [24, 2**20])
@pytest.mark.parametrize("back", [1, 10, 20, 5000])
def test_a_bit_that_flips_after_the_copy_gets_no_checksum(tmp_path, monkeypatch, block_bytes, back):
    """Near the end, where a tensor is not aligned, and far from it, in the header."""
    named = tensors()
    file = PlannedFile(tmp_path / "x.safetensors", {n: (TensorElements(t), t.numel()) for n, t in named.items()})
    at, done = max(0, file.size - back), [0]

    def flipped(data):
        if done[0] <= at < done[0] + len(data):
            data[at - done[0]] ^= 64
        done[0] += len(data)
        return hash_block(data)

    monkeypatch.setattr(writing, "hash_block", flipped)
    writer = Writer(Staging(0, torch.device("cpu"), block_bytes))
    failures = []
    with writer.copying(first=True):
        writer.write(file)
    writer.then(failures.append).result()
    writer.close()
    found = rf"^memory of .* has changed by itself while {file.path} was being written: bytes (\d+) to (\d+) are not those that"
    first, last = map(int, re.match(found, str(failures[0])).groups())
    assert first <= at <= last


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_what_the_library_writes_is_read_here(tmp_path, dtype):
    want = {"a.b": torch.randn(3, 4).to(dtype), "scalar": torch.tensor(1).to(dtype), "empty": torch.empty(2, 0, dtype=dtype)}
    save_file(want, tmp_path / "x.safetensors", {"format": "pt", "more": "text"})
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert file.entries.keys() == want.keys()
        for name, tensor in want.items():
            got = file.tensor(name)
            assert got.dtype == dtype and got.shape == tensor.shape
            assert torch.equal(got.contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8))


def test_a_tensor_that_is_not_aligned_is_read(tmp_path):
    rows = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    write(tmp_path / "x.safetensors", rows, b"\7" + torch.tensor([1.5, -2.0]).numpy().tobytes())
    assert TensorFile(tmp_path / "x.safetensors").tensor("b").tolist() == [1.5, -2.0]


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    path, want = tmp_path / "x.safetensors", torch.arange(3000.0)
    save_file({"w": want}, path)
    data = path.read_bytes()
    at, blocks = len(data) - 12000, [hash_block(data[i : i + 4096]) for i in range(0, len(data), 4096)]
    file, unread = (TensorFile(path, len(data), blocks, 4096) for _ in range(2))
    got = torch.zeros(3000)
    move([(file, [Move(at, 4000, got.data_ptr()), Move(at + 8000, 4000, got.data_ptr() + 8000)])])
    assert torch.equal(got, torch.cat([want[:1000], torch.zeros(1000), want[2000:]]))
    view = file.tensor("w")
    assert torch.equal(view, want)
    os.truncate(path, 5000)
    said = rf"x\.safetensors was cut short while it was being read: it has 5000 bytes, and had {len(data)}"
    for read in (
        lambda: file.tensor("w"),
        lambda: unread.verify([(9000, 9001)]),
        lambda: move([(file, [Move(at, 12000, got.data_ptr())])]),
    ):
        with pytest.raises(DamagedCheckpointError, match=said):
            read()


def write(path, rows, data=bytes(64), length=None):
    text = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def row(**changes):
    return {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


BAD = {
    "a header longer than the file": (row(), {"length": 10**6}),
    "a header of 2**63 bytes": (row(), {"length": 2**63}),
    "no JSON": (b"{", {}),
    "a list": ([], {}),
    "a name twice": (b'{"w": {}, "w": {}}', {}),
    "no dtype": ({"w": {"shape": [4], "data_offsets": [0, 16]}}, {}),
    "an unknown dtype": (row(dtype="F31"), {}),
    "an absurd shape": (row(shape=[2**62, 2**62]), {}),
    "an absurd shape of nothing": (row(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), {"data": b""}),
    "a negative shape": (row(shape=[-4]), {}),
    "a shape of text": (row(shape=["4"]), {}),
    "bytes that do not fit the shape": (row(data_offsets=[0, 12]), {}),
    "bytes behind the end": (row(data_offsets=[64, 80]), {}),
    "bytes before the start": (row(data_offsets=[-16, 0]), {}),
    "three offsets": (row(data_offsets=[0, 8, 16]), {}),
    "deep nesting": (b"[" * 10**5, {}),
    "a long name": ({"w" * 1001: row()["w"]}, {"data": bytes(16)}),
    "too many dimensions": (row(shape=[2**62] * 65), {}),
    "a row that is no row": ({"w": 5}, {}),
    "another encoding": (json.dumps(row()).encode("utf-16"), {"data": bytes(16)}),
    "metadata that is no text": ({**row(), "__metadata__": {"n": 5}}, {"data": bytes(16)}),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused(tmp_path, case):
    rows, more = BAD[case]
    write(tmp_path / "x.safetensors", rows, **more)
    with pytest.raises(DamagedCheckpointError, match=r"x\.safetensors: its header"):
        TensorFile(tmp_path / "x.safetensors")


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    ("offsets", "data", "said"),
    [
        ({"a": [0, 8], "b": [4, 12]}, 12, "'b', which begins at byte 4 of the data, overlaps the tensor before it"),
        ({"a": [0, 8], "b": [0, 8]}, 8, "'b', which begins at byte 0 of the data, overlaps the tensor before it"),
        ({"b": [12, 20], "a": [0, 8]}, 20, "'b', which begins at byte 12 of the data, leaves 4 bytes before it to nobody"),
        ({"a": [8, 16]}, 16, "'a', which begins at byte 8 of the data, leaves 8 bytes before it to nobody"),
        ({"a": [0, 8]}, 9, "the last 1 bytes of the file are of no tensor"),
        ({}, 4, "the last 4 bytes of the file are of no tensor"),
    ],
)
def test_tensors_cover_the_data_once(tmp_path, offsets, data, said):
    """As the library: overlaps, holes and bytes that are of no tensor are refused."""
    path = tmp_path / "x.safetensors"
    write(path, {name: {**F32, "data_offsets": pair} for name, pair in offsets.items()}, bytes(data))
    with pytest.raises(DamagedCheckpointError, match=f"x\\.safetensors: its header cannot be used: {said}"):
        TensorFile(path)
    with pytest.raises(SafetensorError):
        load_file(path)


def test_empty_tensors_lie_anywhere_between_others(tmp_path):
    none = {"dtype": "F32", "shape": [0, 3]}
    rows = {"b": {**F32, "data_offsets": [0, 8]}, "a": {**none, "data_offsets": [8, 8]}, "c": {**none, "data_offsets": [0, 0]}}
    write(tmp_path / "x.safetensors", rows, bytes(8))
    assert TensorFile(tmp_path / "x.safetensors").entries.keys() == {"a", "b", "c"}


@pytest.mark.parametrize(
    "header",
    [
        b"{" + b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 180_000 + b"}",
        b'{"a":[' + b"[]," * 600_000 + b"0]}",
        b'{"a":' + b"[" * 600_000,
        b" " * (2**24 + 8),
    ],
    ids=["tensors", "lists", "nesting", "blanks"],
)
def test_a_bomb_of_a_header_is_refused_before_it_is_parsed(tmp_path, header, monkeypatch):
    write(tmp_path / "x.safetensors", header)
    monkeypatch.delattr("megatrain.checkpoint.tensor_file.json.loads")
    with pytest.raises(
        DamagedCheckpointError,
        match=r"x\.safetensors: its header (claims|cannot .*has [\d,]+ brackets, and 524,288 at the most)",
    ):
        TensorFile(tmp_path / "x.safetensors")


def test_no_file_is_planned_that_could_not_be_read(monkeypatch):
    monkeypatch.setattr("megatrain.checkpoint.tensor_file.LONGEST_HEADER", 100)
    with pytest.raises(ValueError, match="3 tensors of one file take a header of 200 bytes; 100 can be read"):
        header_of([(name, torch.float32, (4,)) for name in "abc"])


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_too_short_for_a_header_is_refused(tmp_path, size):
    (tmp_path / "x.safetensors").write_bytes(bytes(size))
    with pytest.raises(DamagedCheckpointError, match=r"x\.safetensors"):
        TensorFile(tmp_path / "x.safetensors")


def test_the_header_is_under_a_checksum_too(tmp_path):
    header, _, size = header_of([("w", torch.float32, (4,))])
    data = header + bytes(16)
    (tmp_path / "x.safetensors").write_bytes(data.replace(b"F32", b"I32"))
    file = TensorFile(tmp_path / "x.safetensors", size, [hash_block(data)])
    with pytest.raises(DamagedCheckpointError, match="is damaged between bytes 0 and"):
        file.verify([(0, file.header_bytes)])
