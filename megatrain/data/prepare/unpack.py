"""Unpacks .gz, .zst, .xz and .bz2 a piece at a time, and not without end: a few kilobytes can be made to unpack to terabytes.

Memory is bounded by the file's own size and MOST_WINDOW, however it was made; what it may become is bounded by MOST_RATIO. A file that
is honest and goes beyond either is unpacked by hand, with the command that the error gives: a plain file has neither limit.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from megatrain.files import OneLine

CHUNK_BYTES = 1 << 20
MOST_WINDOW = 1 << 27
"""Bytes that a Zstandard or xz file may ask to be kept for references backwards, as the zstd command allows, or twice the file's size."""
MOST_RATIO = 250
"""Most bytes that may be made of one byte of a compressed file: text shrinks by 3 to 10, logs and tables by up to 100."""
FREE_BYTES = 1 << 26
"""Bytes that a compressed file may become, however small it is."""
_FEED = 1 << 10
"""Bytes given to Zstandard at a time, which nothing else keeps from making too much at once: of 4 of them it makes up to 128 KiB."""
_COMMANDS = {"gz": "gzip -dc", "zst": "zstd -dc --long=31", "xz": "xz -dc", "bz2": "bzip2 -dc"}


class UnpackLimits(NamedTuple):
    """Bounds of what a compressed file becomes and takes, beyond which it is refused."""

    ratio: int = MOST_RATIO
    """Bytes that may be made of each byte of the file, beside FREE_BYTES in all."""
    made: int = 1 << 62
    """Bytes that its contents may have."""
    window: int | None = None
    """Bytes kept for references backwards; None: MOST_WINDOW or, if that is more, twice the file's size."""


DEFAULT_LIMITS = UnpackLimits()


class UnpackError(OneLine, ValueError):
    """A compressed file that is not unpacked; the message continues the file's name."""


class PackedDamageError(OneLine, ValueError):
    """A compressed file that is not whole; the message is that of the library."""


class _Counted:
    """A file that counts what is read of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.taken = file, 0

    def read(self, size: int = -1) -> bytes:
        """Read from the file."""
        data = self._file.read(size)
        self.taken += len(data)
        return data


def unpacked(file: BinaryIO, kind: str, limits: UnpackLimits = DEFAULT_LIMITS) -> Iterator[bytes]:
    """The contents of a file of this kind (`gz`, `zst`, `xz`, `bz2`) in pieces of at most CHUNK_BYTES. Raises UnpackError,
    PackedDamageError and OSError.

    All members or frames are read, one after another; what is incomplete or damaged is an error, also at the end.
    """
    counted = _Counted(file)
    window = limits.window or max(MOST_WINDOW, min(2 * os.fstat(file.fileno()).st_size, 1 << 31))
    made = 0
    try:
        for piece in _KINDS[kind](counted, window):
            made += len(piece)
            if made > min(limits.made, FREE_BYTES + limits.ratio * counted.taken):
                most = f"{limits.ratio} times as many: text does not" if made <= limits.made else f"{limits.made:,}"
                raise UnpackError(
                    f"unpacks to {made:,} bytes by byte {counted.taken:,}, more than {most}. If it is meant, unpack it: "
                    f"{_COMMANDS[kind]} OLD > NEW"
                )
            yield piece
    except (zlib.error, EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
        if "memory" in str(error).lower():
            raise UnpackError(
                f"wants more than {window:,} bytes of memory to be unpacked. If it is meant, unpack it: {_COMMANDS[kind]} OLD > NEW"
            ) from None
        raise PackedDamageError(str(error)) from None


def _gunzip(file: _Counted, _window: int) -> Iterator[bytes]:
    """Unpack gzip. All that precedes the end of a file cut short is given before the error; of a piece with damage in it, nothing."""
    with gzip.GzipFile(fileobj=cast(Any, file)) as stream:
        parts: list[bytes] = []
        held = 0
        try:
            while part := stream.read1(CHUNK_BYTES - held):
                parts.append(part)
                held += len(part)
                if held == CHUNK_BYTES:
                    yield b"".join(parts)
                    parts.clear()
                    held = 0
        except EOFError:
            if parts:
                yield b"".join(parts)
            raise
        if parts:
            yield b"".join(parts)


def _unxz(file: _Counted, window: int) -> Iterator[bytes]:
    return _streams(file, lambda: lzma.LZMADecompressor(memlimit=window))


def _bunzip2(file: _Counted, _window: int) -> Iterator[bytes]:
    return _streams(file, bz2.BZ2Decompressor)


def _streams(file: _Counted, new: Callable[[], Any]) -> Iterator[bytes]:
    """The contents of all streams of a file; `new` makes the decoder of one. Raises EOFError and the decoder's errors."""
    decoder: Any = None
    data = b""
    while True:
        if not data and (decoder is None or decoder.needs_input):
            data = file.read(CHUNK_BYTES // 8)
            if not data:
                break
        if decoder is None:
            data = data.lstrip(b"\0")  # padding between streams
            if not data:
                continue
            decoder = new()
        try:
            piece = decoder.decompress(data, CHUNK_BYTES)
        except OSError as error:  # of bz2
            raise EOFError(str(error)) from None
        if piece:
            yield piece
        data = b""
        if decoder.eof:
            data, decoder = decoder.unused_data, None
    if decoder is not None:
        raise EOFError("its last part does not end")


def _unzstd(file: _Counted, window: int) -> Iterator[bytes]:
    """Unlike the library's own reader, this does not take an incomplete last frame for the end of the file.

    Raises EOFError if the file is incomplete or damaged, UnpackError without the library.
    """
    try:
        import zstandard  # noqa: PLC0415  few files need it
    except ImportError:
        raise UnpackError("is compressed with Zstandard, which zstandard reads: pip install zstandard.") from None
    context = zstandard.ZstdDecompressor(max_window_size=window)
    frame, started = context.decompressobj(), False
    while data := file.read(_FEED):
        while data:
            started = True
            try:
                made = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            for at in range(0, len(made), CHUNK_BYTES):
                yield made[at : at + CHUNK_BYTES]
            data = b""
            if frame.eof:
                data = frame.unused_data
                frame, started = context.decompressobj(), False
    if started:
        raise EOFError("the last frame does not end")


_KINDS: dict[str, Callable[[_Counted, int], Iterator[bytes]]] = {
    "gz": _gunzip,
    "zst": _unzstd,
    "xz": _unxz,
    "bz2": _bunzip2,
}
