"""Files that are overwritten in place while they are open: another text is an error, another time alone is told of once."""

import os
import time

import jobs
import pytest

from megatrain.data import unchanged
from megatrain.data.indexed import TokenStore, TokenStoreError
from megatrain.data.unchanged import Unchanged, blocks, hash_of

OLD = 1_000_000_000
"""A time of last writing that lies far back, in seconds."""


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(unchanged, "LOOK_SECONDS", 0.0)
    prefix = jobs.write_store(tmp_path / "data")
    for ending in (".bin", ".idx"):
        os.utime(f"{prefix}{ending}", (OLD, OLD))
    return TokenStore(prefix)


def write(path, at, data, seconds):
    """Overwrite some bytes in place."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    os.utime(path, (seconds, seconds))


@pytest.mark.parametrize("which", ["bin_path", "idx_path"])
def test_a_store_that_is_overwritten_with_valid_ids_is_an_error(store, which):
    first, path = store.read(0, 10, 101).tolist(), getattr(store, which)
    write(path, 7000 if which == "bin_path" else 1500, b"\1\1", OLD + 1)
    with pytest.raises(TokenStoreError, match=rf"^{path} was overwritten while it was in use. Go on from a checkpoint with"):
        store.read(0, 10, 101)
    jobs.write_store(path.parent / "new").with_name(f"new{path.suffix}").replace(path)
    assert TokenStore(path.with_suffix("")).read(0, 10, 101).tolist() == first


def test_a_file_that_is_replaced_and_a_time_alone_are_no_errors(store, capfd):
    store.read(0, 10)
    other = jobs.write_store(store.bin_path.parent / "other", vocab_size=90)
    for path in (store.bin_path, store.idx_path):
        os.utime(path, (OLD + 5, OLD + 5))
    for _ in range(3):
        store.read(0, 10)
    said = "warning: {} was written to while it is in use; what was looked at is as it was\n"
    assert capfd.readouterr().err == said.format(store.bin_path) + said.format(store.idx_path)
    other.with_name("other.bin").replace(store.bin_path)
    store.read(0, 10)
    assert capfd.readouterr().err == ""


def test_what_is_written_within_the_same_time_is_seen_at_the_next_look(store):
    store.read(0, 10)
    now = time.time()
    write(store.bin_path, 0, store.read(0, 1).tobytes(), now)
    store.read(0, 10)
    write(store.bin_path, 6000, b"\1\0\1\0", now)
    with pytest.raises(TokenStoreError, match="overwritten"):
        store.read(0, 10)


def test_it_is_looked_at_once_in_a_while(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes(bytes(100))
    descriptor = os.open(path, os.O_RDONLY)
    watched = Unchanged({path: descriptor})
    write(path, 50, b"\1", OLD)
    assert watched.overwritten() is None
    later = time.monotonic() + unchanged.LOOK_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert watched.overwritten() == path
    os.close(descriptor)


def test_blocks_of_a_large_file(tmp_path):
    assert blocks(0) == [(0, 0)] and blocks(2**21) == [(0, 2**21)]
    assert blocks(2**30)[:2] == [(0, 16384), (8454531, 16384)] and blocks(2**30)[-1] == (2**30 - 16384, 16384)
    assert len(blocks(2**30)) == 128
    with (tmp_path / "large").open("w+b") as file:
        file.truncate(2**22)
        before = hash_of(file.fileno())
        file.seek(2**21)
        file.write(b"\1" * 2**15)
        file.flush()
        assert hash_of(file.fileno()) != before
