"""File errors that name the file and the operation, files that appear whole or not at all, and advice for files of a wrong kind.

The system names a file in an error of opening it, but not of writing, flushing or closing it: for a full disk the error is
`[Errno 28] No space left on device` and nothing else. All files that megatrain writes are therefore written inside `doing` or `whole`.
"""

from __future__ import annotations

import codecs
import errno
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

HEAD_BYTES = 4096
"""The first bytes of a file, enough to tell its kind."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_SHOWN, _MOST_LINE = 600, 3000
"""Characters of a part of a line, and of a line."""
MOST_LETTERS = 20_000
"""Length of a text of several lines that is not ours."""
_CONVERT = "this is {}, not UTF-8. Convert it: iconv -f {} -t utf-8 OLD > NEW"


@contextmanager
def doing(what: str, path: str | Path) -> Iterator[None]:
    """Add the operation and the file to an OSError of the body; its type stays. An error that names another file is left unchanged.

    what: `writing`, `reading`.
    """
    try:
        yield
    except OSError as error:
        if "(while " not in str(error) and error.filename in (None, path, str(path)):
            if error.strerror is None:  # an error that a library has raised, without a number
                error.args = (f"{error} (while {what} {path})",)
            else:
                error.strerror, error.filename = f"{error.strerror} (while {what})", str(path)
                error.args = (error.errno, error.strerror)  # pickling keeps `args` alone
        raise


@contextmanager
def whole(path: str | Path, text: bool = False) -> Iterator[Any]:
    """A file to write into. It gets its name when all of it is on the disk, so it is never seen half-written.

    text: UTF-8 with \\n for line ends; else bytes. A device or pipe is written to directly. Raises OSError as `doing` does, and then
    leaves no file behind.
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
                    error.filename = str(path)  # the name that the user gave
                raise
    finally:
        if plain:
            target.unlink(missing_ok=True)


def lost_output(error: Exception) -> str | None:
    """The message if standard output cannot be written, whose OSError names no file; None for other errors.

    `doing` names every file that megatrain writes, so an error without a name is one of standard output.
    """
    if not isinstance(error, OSError) or error.filename is not None or error.errno not in _FULL:
        return None
    if sys.stdout is sys.__stdout__:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)  # else Python would try to flush again at exit, with a traceback
        os.close(nowhere)
    return f"standard output cannot be written: {error.strerror}"


def not_text(head: bytes) -> str | None:
    """For a file with these first bytes: what it is, if not UTF-8 text, and what to do about it; None if it looks like text.

    UTF-16 and UTF-32 without a byte-order mark show by their NULs: of Latin letters, one or three for each letter.
    """
    encoding = wide_encoding(head) if 0 in head else None  # without a NUL, a byte-order mark may be the start of an 8-bit text
    if encoding is not None:
        return _CONVERT.format(encoding.upper(), encoding)
    return pointer(head)


def pointer(head: bytes) -> str | None:
    """The message if a file is the pointer that Git LFS leaves in the place of a large file; None if it is not."""
    if not head.startswith(LFS_POINTER):
        return None
    return "this is a Git LFS pointer, not the file itself. In the repository that it came from run: git lfs install && git lfs pull"


class OneLine(Exception):
    """An error whose message is one printable line of bounded length, whatever the file that it tells of has put into it."""

    def __init__(self, *said: object) -> None:
        super().__init__(*(one_line(part) if isinstance(part, str) else part for part in said))


def one_line(text: str) -> str:
    """A text as one line; of a long one the beginning, which names the file, and the end, which says what to do."""
    text = printable(text)
    if len(text) <= _MOST_LINE:
        return text
    return f"{text[: _MOST_LINE - 1000]} ... ({len(text):,} characters) ... {text[-_MOST_SHOWN:]}"


def printable(text: str, but: str = "") -> str:
    """A text with line breaks, terminal codes and the like written out; `but` these characters."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter in but else ascii(letter)[1:-1] for letter in text)


def shown(text: str, most: int = MOST_LETTERS) -> str:
    """A text that is not ours, perhaps of several lines, as it may be printed: control characters but line ends and tabs written out, and
    `most` letters of it.
    """
    return printable(text[:most], "\n\t") + (f" ... and {len(text) - most} letters more" if len(text) > most else "")


def brief(said: object) -> str:
    """A library's message, or one with values of a file in it, as a part of one line: no line breaks, no terminal codes, not all of it."""
    text = f"the key {said} is missing" if isinstance(said, KeyError) else str(said)
    kept = printable(text[:_MOST_SHOWN])
    return kept if len(text) <= _MOST_SHOWN else f"{kept} ... ({len(text):,} characters)"


def opened(path: Path) -> BufferedReader:
    """Open a file to read bytes. Raises OSError as `doing` does."""
    with doing("reading", path):
        return path.open("rb")


def open_own(path: str | Path, flags: int = os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode: int = 0o644) -> int:
    """A descriptor of a plain file that the run writes, made if it is not there. Raises OSError; for a link, a fifo and the like before
    anything is written or waited for.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    except OSError:
        require_own(path)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _foreign(path, "no plain file")
    return descriptor


def opened_plain(path: str | Path) -> BufferedReader:
    """Open a plain file to read bytes. Raises OSError; for a fifo, device or socket before it is waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    what = "a pipe, as <(...) and a fifo are" if stat.S_ISFIFO(mode) else "a device, no plain file"
    raise OSError(errno.ESPIPE, f"it is {what}: write what it gives to a file, and name that", str(path))


def require_own(path: str | Path, kind: Callable[[int], bool] = stat.S_ISREG) -> None:
    """Raise OSError where something else than a file of a kind has the name of what the run writes, a link above all: what it leads to is
    not the run's.
    """
    try:
        found = os.lstat(path).st_mode
    except OSError:
        return
    if not kind(found):
        raise _foreign(path, f"a link, to {Path(path).readlink()}" if stat.S_ISLNK(found) else f"no plain {_PLAIN[kind]}")


def _foreign(path: str | Path, what: str) -> OSError:
    return OSError(f"{path} is {what}, and a run writes there alone what is its own. Move it away")


_PLAIN = {stat.S_ISREG: "file", stat.S_ISDIR: "folder"}


def make_folder(path: Path) -> None:
    """Make a directory, with its parents, unless it exists. Raises OSError as `doing` does."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        error.filename = str(path)  # not its parent's name
        with doing("making the directory", path):
            raise


def head_of(path: Path) -> bytes:
    """The first bytes of a file."""
    with opened_plain(path) as file:
        return file.read(HEAD_BYTES)


def not_utf8(head: bytes, where: str, error: UnicodeDecodeError, place: str) -> str:
    """The message for bytes that are not UTF-8. place: where they are. One byte cannot tell which 8-bit encoding it is."""
    if encoding := wide_encoding(head):
        return f"{where}: {_CONVERT.format(encoding.upper(), encoding)}"
    if said := pointer(head):
        return f"{where}: {said}"
    if found := compression(head):
        return f"{where}: this is compressed by {found[0]}, which its name does not say. Unpack it: {found[1]}"
    return (
        f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x}, {place}: {error.reason}). Find out how the text is encoded and "
        "convert it: iconv -f ENCODING -t utf-8 OLD > NEW, where ENCODING is for example windows-1252, gb18030 or shift_jis."
    )


def compression(head: bytes) -> tuple[str, str] | None:
    """The format of a compressed file and the command that unpacks it, by its first bytes; None for other files."""
    return next(((name, command) for name, command, marks in _COMPRESSED if head.startswith(marks)), None)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)
"""Errors of writing that may come from standard output."""
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
"""Byte-order marks, longer ones first."""
_ORDERS = (
    ("utf-32le", 4, (0,)),
    ("utf-32be", 4, (3,)),
    ("utf-16le", 2, (0,)),
    ("utf-16be", 2, (1,)),
)
"""Encoding, bytes of a letter, and places of those that are not NUL in Latin text."""


def byte_order_mark(head: bytes) -> str | None:
    """The encoding that a file's byte-order mark tells; None without one."""
    return next(
        (encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8" if head.startswith(codecs.BOM_UTF8) else None
    )


def wide_encoding(head: bytes) -> str | None:
    """The encoding with 2 or 4 bytes a letter that the first bytes of a file show; None if they show none."""
    if (marked := byte_order_mark(head)) not in (None, "utf-8"):
        return marked
    if len(head) < 4 or not head.count(0):
        return None
    for encoding, width, filled in _ORDERS:
        letters = [head[place : len(head) // width * width : width] for place in range(width)]
        nulls = [1 - part.count(0) / len(part) for part in letters]  # share that is not NUL, by place
        if all(share > 0.9 if place in filled else share < 0.2 for place, share in enumerate(nulls)):
            return encoding
    return None
