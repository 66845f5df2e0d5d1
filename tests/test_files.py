"""What users are told of files: what was being done to which, and what a file is that is not what it should be."""

import errno
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatrain import files
from megatrain.checkpoint.directory import write_file
from megatrain.checkpoint.together import CheckpointError, DamagedCheckpointError
from megatrain.config.source import ConfigError, read_file
from megatrain.corpus.work.chores import WorkError
from megatrain.corpus.work.leases import LostWorkersError, OtherWorkError
from megatrain.data.identity import store_identity
from megatrain.data.indexed import TokenStoreError, TokenStoreWriter
from megatrain.data.prepare.read import ReadError, read_documents
from megatrain.data.prepare.unpack import UnpackError
from megatrain.data.tokenizer import TokenizerError, load_tokenizer
from megatrain.data.tokenizers.fitting import train_tokenizer
from megatrain.files import brief, doing, head_of, opened_plain, shown, whole
from megatrain.huggingface.model_files import read_config
from megatrain.ngram.arpa_in import ArpaError, read_arpa
from megatrain.ngram.binary import is_binary
from megatrain.ngram.column import Column
from megatrain.ngram.fit import Settings, fit
from megatrain.ngram.lazy import BinaryError
from megatrain.ngram.reading import load
from megatrain.ngram.table import TableError
from megatrain.ngram.text import TextError
from megatrain.records.rows import read_metrics
from megatrain.runtime.distributed import RemoteError
from megatrain.runtime.launch import LaunchError
from megatrain.runtime.secret import SecretError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 988097824\n"
TEXT = '{"text": "what is written here"}\n' * 3
KINDS = {
    "utf-16": ("\ufeff" + TEXT).encode("utf-16le"),
    "utf-16 of big ends": ("\ufeff" + TEXT).encode("utf-16be"),
    "utf-16le": TEXT.encode("utf-16le"),
    "utf-16be": TEXT.encode("utf-16be"),
    "utf-32": ("\ufeff" + TEXT).encode("utf-32le"),
    "utf-32 of big ends": ("\ufeff" + TEXT).encode("utf-32be"),
    "utf-32le": TEXT.encode("utf-32le"),
    "utf-32be": TEXT.encode("utf-32be"),
    "pointer": POINTER,
}
READERS = {
    "jsonl": ("a.jsonl", lambda path: list(read_documents([path])), ReadError),
    "json": ("a.json", lambda path: list(read_documents([path])), ReadError),
    "text": ("a.txt", lambda path: list(read_documents([path])), ReadError),
    "tokenizer": ("tokenizer.json", load_tokenizer, TokenizerError),
    "yaml": ("run.yaml", read_file, ConfigError),
    "hf": ("config.json", lambda path: read_config(path.parent), CheckpointError),
    "ngram": ("t.txt", lambda path: fit([path], path.parent / "m.arpa", Settings(2)), TextError),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_a_file_is_that_is_no_text_is_told_with_its_name(tmp_path, reader):
    name, read, error = READERS[reader]
    for kind, data in KINDS.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(error) as told:
            read(tmp_path / name)
        encoding = kind.partition(" ")[0]
        said = "this is a Git LFS pointer" if kind == "pointer" else f"this is {encoding.upper()}, not UTF-8"
        assert said in str(told.value) and name in str(told.value), kind
        assert kind == "pointer" or f"iconv -f {encoding} -t utf-8" in str(told.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pointer"])
def test_the_advice_makes_the_text_of_it(tmp_path, kind):
    (tmp_path / "old").write_bytes(KINDS[kind])
    command = files.not_text(KINDS[kind]).partition("Convert it: ")[2].replace("OLD", "old").replace("NEW", "new")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=30)
    assert (tmp_path / "new").read_text("utf-8-sig") == TEXT


@pytest.mark.parametrize("data", [b"", b"a", b"ab\0cd\0\0 efg", "текст 日本".encode(), b"\xff\xfe broken \x80\n", b"\0" * 9])
def test_other_bytes_are_not_guessed_at(data):
    assert files.not_text(data) is None


def test_what_is_compressed_and_not_named_so_is_told(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\x03")
    with pytest.raises(ReadError, match=r"a\.txt:1: this is compressed by gzip.*gzip -dc OLD > NEW"):
        list(read_documents([tmp_path / "a.txt"]))


def test_an_error_without_a_file_gets_its_name_and_keeps_its_kind():
    message = r"^\[Errno 28\] No space left on device \(while writing\): 'x\.bin'$"
    with pytest.raises(OSError, match=message) as told, doing("writing", "x.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert told.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=message):  # as a process of the pool hands it on
        raise pickle.loads(pickle.dumps(told.value))
    with pytest.raises(OSError, match=r"^3 requested and 0 written \(while writing y\)$"), doing("writing", Path("y")):
        raise OSError("3 requested and 0 written")
    with (
        pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] No such file or directory: '/nowhere/at'$"),
        doing("writing", "y"),
    ):
        open("/nowhere/at")  # noqa: PTH123, SIM115


FULL = Path("/dev/full")
"""Every write fails as on a full disk."""


def write_store():
    writer = TokenStoreWriter("/dev/shm/unused-store", np.uint16)
    writer._file.close()
    writer._file = FULL.open("wb")
    try:
        writer.add_document([1] * 10)
        writer.publish()
    finally:
        writer.abort()


def write_whole():
    with whole(FULL, text=True) as file:
        file.write("x")


WRITERS = {
    "whole": (write_whole, "/dev/full"),
    "store": (write_store, "unused-store.bin"),
    "column": (lambda: Column(FULL, np.uint32).append(np.zeros(9)), "/dev/full"),
    "checkpoint": (lambda: write_file(FULL, b"x"), "/dev/full"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_told_with_the_file(writer):
    write, name = WRITERS[writer]
    with pytest.raises(OSError, match="No space left on device") as told:
        write()
    assert f"(while writing): '{name}'" in str(told.value).replace("/dev/shm/", "")


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError), whole(path, text=True) as file:
        file.write("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "before"
    with whole(path, text=True) as file:
        file.write("all\n")
        file.flush()
        assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_bytes() == b"all\n"


CLI = """
import sys
from megatrain.cli import data, main as cli
data._data_inspect = lambda arguments: print("x") or 0
sys.exit(cli.main(["data", "inspect", "x"]))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_that_takes_no_more_is_named(unbuffered):
    with FULL.open("wb") as full:
        env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(
            [sys.executable, "-c", CLI], stdout=full, stderr=subprocess.PIPE, env=env, timeout=60, check=False
        )
    assert done.stderr == b"megatrain: error: standard output cannot be written: No space left on device\n"
    assert done.returncode == 1


def test_what_was_being_done_is_told_where_a_file_cannot_be_opened_or_a_directory_made(tmp_path):
    nowhere, file = tmp_path / "nowhere", tmp_path / "a.txt"
    file.write_text("a b\n")
    for read in (lambda: load(nowhere), lambda: fit([nowhere], tmp_path / "m.arpa", Settings(2))):
        with pytest.raises(FileNotFoundError, match=r"No such file or directory \(while reading\): '.*nowhere'$"):
            read()
    for write in (lambda: TokenStoreWriter(file / "b", np.uint16), lambda: train_tokenizer([file], 300, file / "b" / "c")):
        with pytest.raises(OSError, match=r"\(while making the directory\): '.*a\.txt.*'$"):
            write()


def test_what_a_file_says_is_shown_briefly():
    assert brief("é is a letter, \t and \x1b[31m are not") == r"é is a letter, \t and \x1b[31m are not"
    assert brief(ValueError("a\nb\ud800")) == r"a\nb\ud800"
    assert brief("x" * 601) == "x" * 600 + " ... (601 characters)"


def test_what_is_shown_cannot_move_the_cursor_and_has_an_end():
    assert shown("one\ttab\nline, é and 漢") == "one\ttab\nline, é and 漢"
    assert shown("\x1b[2Jgone\r\x07\x9b\u202e\u2028\udc80") == r"\x1b[2Jgone\r\x07\x9b\u202e\u2028\udc80"
    assert shown("x" * 25, 20) == "x" * 20 + " ... and 5 letters more"


def test_what_is_no_plain_file_is_refused_before_it_is_waited_for(tmp_path):
    fifo, ends = tmp_path / "y.yaml", os.pipe()
    os.mkfifo(fifo)
    pipe = "it is a pipe, as <(...) and a fifo are: write what it gives to a file, and name that"
    for path, said in (
        (fifo, pipe),
        (f"/dev/fd/{ends[0]}", pipe),
        ("/dev/zero", "it is a device, no plain file: write what it gives to a file, and name that"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(OSError, match=re.escape(said)) as refused:
            opened_plain(path)
        assert refused.value.filename == str(path)
    for end in ends:
        os.close(end)
    for read in (is_binary, read_arpa, read_metrics, store_identity, head_of):
        os.mkfifo(tmp_path / f"{read.__name__}.idx")
        with pytest.raises(OSError, match="it is a pipe"):
            read(tmp_path / (read.__name__ if read is store_identity else f"{read.__name__}.idx"))
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{fifo} cannot be read: {pipe}.')}$"):
        read_file(fifo)
    (tmp_path / "plain").write_text("abc")
    with opened_plain(tmp_path / "plain") as file:
        assert file.read() == b"abc"


@pytest.mark.parametrize(
    "kind",
    [
        DamagedCheckpointError,
        TokenStoreError,
        TokenizerError,
        ReadError,
        UnpackError,
        ArpaError,
        TextError,
        BinaryError,
        TableError,
        ConfigError,
        LaunchError,
        SecretError,
        RemoteError,
        WorkError,
        LostWorkersError,
        OtherWorkError,
    ],
)
def test_what_a_file_says_stays_on_its_line(kind):
    error = kind("weights.safetensors has no a\nb\x1b[2J\u2028é中")
    assert str(error) == r"weights.safetensors has no a\nb\x1b[2J\u2028é中"
    assert str(kind(*error.args)) == str(error)
    long = str(kind("m.json: " + "[], " * 100_000 + "Copy it again."))
    assert len(long) == 2630 and long.startswith("m.json: [], ") and long.endswith("[], Copy it again.")
    assert str(kind(long)) == long
