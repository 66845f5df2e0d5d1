"""Files as users meet them: errors that say which file and what was being done to it, files that appear whole or not at all, and what
a file is that is not what it should be.

The system names a file in the error of opening it, and not in those of writing, flushing and closing it: a full disk says
`[Errno 28] No space left on device` and nothing else. Whatever megatrain writes is therefore written inside of `doing` or `whole`.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

HEAD_BYTES = 4096
"""Of a file that tell what it is."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_CONVERT = "this is {}, not UTF-8. Convert it: iconv -f {} -t utf-8 OLD > NEW"


@contextmanager
def doing(what: str, path: str | Path) -> Iterator[None]:
    """Let an OSError of the body say what was being done and to which file; its kind stays. One that names another file is left alone.

    what: `writing`, `reading`.
    """
    try:
        yield
    except OSError as error:
        if "(while " not in str(error) and error.filename in (None, path, str(path)):
            if error.strerror is None:  # of a library, or made by hand
                error.args = (f"{error} (while {what} {path})",)
            else:
                error.strerror, error.filename = f"{error.strerror} (while {what})", str(path)
                error.args = (error.errno, error.strerror)  # what another process is told
        raise


@contextmanager
def whole(path: str | Path, text: bool = False) -> Iterator[Any]:
    """A file to write into, which gets its name when all of it is on the disk: it is never seen half-written.

    text: UTF-8 with \\n for line ends; else bytes. A device or pipe is written to as it is. Raises OSError as `doing` does, and then
    leaves nothing behind.
    """
    path = Path(path)
    plain = path.is_file() or not path.exists()
    target = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part") if plain else path
    how: dict[str, Any] = {"mode": "w", "encoding": "utf-8", "newline": "\n"} if text else {"mode": "wb"}
    try:
        with doing("writing", path):
            try:
                with target.open(**how) as file:
                    yield file
                    file.flush()
                    if plain:
                        os.fsync(file.fileno())
                if plain:
                    target.replace(path)
            except OSError as error:
                if error.filename == str(target):
                    error.filename = str(path)  # of the name that the user gave
                raise
    finally:
        if plain:
            target.unlink(missing_ok=True)


def lost_output(error: Exception) -> str | None:
    """What to say where standard output takes no more, which the system's error does not name; None of other errors.

    Every file that megatrain writes is named by `doing`: what has no name is not one.
    """
    if not isinstance(error, OSError) or error.filename is not None or error.errno not in _FULL:
        return None
    if sys.stdout is sys.__stdout__:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)  # else what is left would be tried once more at the end, with a traceback
        os.close(nowhere)
    return f"standard output cannot be written: {error.strerror}"


def not_text(head: bytes) -> str | None:
    """What a file of these first bytes is, where it is no UTF-8 text, and what to do about it; None where nothing shows.

    Without a byte-order mark UTF-16 and UTF-32 show by their NULs, of which text in Latin letters has one or three for each letter.
    """
    encoding = _wide(head) if 0 in head else None  # two odd bytes may begin any text of 8 bits a letter
    if encoding is not None:
        return _CONVERT.format(encoding.upper(), encoding)
    return pointer(head)


def pointer(head: bytes) -> str | None:
    """What to say where a file is what Git LFS leaves in the place of a large one; None where it is not."""
    if not head.startswith(LFS_POINTER):
        return None
    return "this is a Git LFS pointer, not the file itself. In the repository that it came from run: git lfs install && git lfs pull"


def opened(path: Path) -> BufferedReader:
    """A file to read bytes from. Raises OSError as `doing` does."""
    with doing("reading", path):
        return path.open("rb")


def make_folder(path: Path) -> None:
    """A directory, made with those that it lies in where it is not there. Raises OSError as `doing` does."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        error.filename = str(path)  # not that of the one above it
        with doing("making the directory", path):
            raise


def head_of(path: Path) -> bytes:
    """The first bytes of a file."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def not_utf8(head: bytes, where: str, error: UnicodeDecodeError, place: str) -> str:
    """What to say of bytes that are not UTF-8. place: where they are. Which 8-bit encoding it is, nobody can tell from one byte."""
    if encoding := _wide(head):
        return f"{where}: {_CONVERT.format(encoding.upper(), encoding)}"
    if said := pointer(head):
        return f"{where}: {said}"
    for name, command, marks in _COMPRESSED:
        if head.startswith(marks):
            return f"{where}: this is compressed by {name}, which its name does not say. Unpack it: {command}"
    return (
        f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x}, {place}: {error.reason}). Find out how the text is encoded and "
        "convert it: iconv -f ENCODING -t utf-8 OLD > NEW, where ENCODING is for example windows-1252, gb18030 or shift_jis."
    )


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)
"""Of writes."""
_COMPRESSED = (
    ("gzip", "gzip -dc OLD > NEW", b"\x1f\x8b"),
    ("zstd", "zstd -dc OLD > NEW", b"\x28\xb5\x2f\xfd"),
    ("xz", "xz -dc OLD > NEW", b"\xfd7zXZ\x00"),
    ("bzip2", "bzip2 -dc OLD > NEW", b"BZh"),
    ("zip", "unzip -p OLD > NEW", b"PK\x03\x04"),
)
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
"""Byte-order marks; the longer ones first."""
_ORDERS = (
    ("utf-32le", 4, (0,)),
    ("utf-32be", 4, (3,)),
    ("utf-16le", 2, (0,)),
    ("utf-16be", 2, (1,)),
)
"""Encoding, bytes of a letter, and those of them that are not NUL."""


def _wide(head: bytes) -> str | None:
    """The encoding of 2 or 4 bytes a letter that a file has."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if len(head) < 4 or not head.count(0):
        return None
    for encoding, width, filled in _ORDERS:
        letters = [head[place : len(head) // width * width : width] for place in range(width)]
        nulls = [1 - part.count(0) / len(part) for part in letters]  # share that is not NUL, by place
        if all(share > 0.9 if place in filled else share < 0.2 for place, share in enumerate(nulls)):
            return encoding
    return None
