"""Compressed files come in pieces, whole or with an error, and cannot ask for more memory or room than is theirs to ask for."""

import bz2
import gzip
import io
import lzma
import struct
import tracemalloc

import pytest
import zstandard

from megatrain.data.prepare import unpack
from megatrain.data.prepare.read import ReadError, read_pieces
from megatrain.data.prepare.unpack import PackedDamageError, UnpackError, unpacked
from megatrain.ngram.arpa_in import ArpaError, read_arpa

PACK = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}
TEXT = b"".join(b"%d squared is %d\n" % (n, n * n) for n in range(3000))


def unpack_file(path, data, kind):
    path.write_bytes(data)
    with path.open("rb") as file:
        return list(unpacked(file, kind))


@pytest.mark.parametrize("kind", PACK)
def test_all_parts_of_a_file_in_small_pieces(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(unpack, "CHUNK_BYTES", 1000)
    packed = PACK[kind](TEXT) + PACK[kind](b"") + PACK[kind](TEXT[:7])
    pieces = unpack_file(tmp_path / "x", packed, kind)
    assert b"".join(pieces) == TEXT + TEXT[:7] and max(map(len, pieces)) <= 1000
    assert unpack_file(tmp_path / "x", b"", kind) == []


@pytest.mark.parametrize("kind", PACK)
def test_what_is_not_whole_is_told(tmp_path, kind):
    whole = PACK[kind](TEXT)
    for data in (whole[:-1], whole[:30], whole + whole[:-1], whole[:200] + bytes(9) + whole[209:], whole + b"more"):
        with pytest.raises(PackedDamageError):
            unpack_file(tmp_path / "x", data, kind)


def test_what_comes_before_a_cut_is_given_and_before_damage_nothing_of_the_same_piece(tmp_path):
    packed = gzip.compress(TEXT)
    for data, given in ((packed[:-9], TEXT), (packed[:-8] + bytes(8), b"")):
        got = []
        (tmp_path / "x").write_bytes(data)
        with (tmp_path / "x").open("rb") as file, pytest.raises(PackedDamageError):
            got.extend(unpacked(file, "gz"))
        assert TEXT.startswith(b"".join(got)) and len(b"".join(got)) >= len(given) - 300
        assert bool(got) == bool(given)


def bomb(kind, size):
    """A few kilobytes that unpack to `size` MiB of zeros."""
    if kind == "zst":
        packer = zstandard.ZstdCompressor(level=19).compressobj()
        return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size)) + packer.flush()
    if kind == "gz":
        out = io.BytesIO()
        with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=9) as file:
            for _ in range(size):
                file.write(bytes(1 << 20))
        return out.getvalue()
    packer = {"xz": lzma.LZMACompressor, "bz2": bz2.BZ2Compressor}[kind]()
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size)) + packer.flush()


@pytest.mark.parametrize("kind", PACK)
def test_a_bomb_goes_off_in_small_pieces_and_not_for_long(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(unpack, "FREE_BYTES", 4 << 20)
    (tmp_path / "x").write_bytes(bomb(kind, 64))
    tracemalloc.start()
    said = rf"unpacks to [\d,]+ bytes by byte [\d,]+, more than 250 times as many.*: {unpack._COMMANDS[kind]} OLD > NEW"
    with (tmp_path / "x").open("rb") as file, pytest.raises(UnpackError, match=said):
        for piece in unpacked(file, kind):
            assert len(piece) <= 1 << 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 << 20


def test_the_same_for_documents_and_models(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "FREE_BYTES", 4 << 20)
    for name in ("a.txt.gz", "a.txt.zst", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(bomb(name.rpartition(".")[2], 24))
        with pytest.raises(ReadError, match=rf"{name} unpacks to [\d,]+ bytes by byte"):
            list(read_pieces([tmp_path / name]))
    lines = b"\\data\\\nngram 1=9\n\n\\1-grams:\n" + b"\n" * (24 << 20)
    (tmp_path / "m.arpa").write_bytes(lzma.compress(lines))
    with pytest.raises(ArpaError, match=r"m\.arpa unpacks to [\d,]+ bytes by byte"):
        read_arpa(tmp_path / "m.arpa")


def test_a_window_of_two_gigabytes_is_refused(tmp_path):
    """With the command that takes it; a file of a gigabyte may have one."""
    frame = struct.pack("<IBB", 0xFD2FB528, 0, (31 - 10) << 3)  # no sizes, a window of 2^31
    raw = struct.pack("<I", 5 << 3 | 1)[:3] + b"hello"  # the last block, as it is
    said = r"wants more than 134,217,728 bytes of memory to be unpacked\. .*: zstd -dc --long=31 OLD > NEW"
    with pytest.raises(UnpackError, match=said):
        unpack_file(tmp_path / "x", frame + raw, "zst")
    small = struct.pack("<IBB", 0xFD2FB528, 0, (27 - 10) << 3)
    assert unpack_file(tmp_path / "x", small + raw, "zst") == [b"hello"]
    packed = lzma.compress(TEXT, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 29}])
    with pytest.raises(UnpackError, match=r"wants more than 134,217,728 bytes of memory.*: xz -dc OLD > NEW"):
        unpack_file(tmp_path / "x", packed, "xz")
