"""Cuts the files of all sources into units of work, from the files alone: the same units in whatever order files are listed, for any number
of workers.

    a plain .jsonl        ranges of bytes; to a range belong the lines that begin in it
    a .parquet            row groups
    all other files       whole; many small ones make a unit together

A unit knows size and time of its files, so that whoever reads it sees that a file has changed since.
"""

from __future__ import annotations

import codecs
import glob
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from megatrain.corpus.reading.choices import Form, ReadConfig, SourceConfig
from megatrain.corpus.reading.matching import matching
from megatrain.corpus.reading.parquet_answers import ParquetReader, row_groups
from megatrain.data.prepare.read import COMPRESSIONS, TEXT_SUFFIXES, ReadError
from megatrain.files import HEAD_BYTES, opened_plain, wide_encoding

FORMS: dict[str, Form] = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    ".jsonl": "lines",
    ".json": "lines",
    ".ndjson": "lines",
    ".html": "html",
    ".htm": "html",
    ".warc": "warc",
    ".parquet": "parquet",
}
"""The forms of files, by the ends of their names."""
DATA = (".jsonl", ".ndjson", ".warc", ".parquet")
"""Ends of names that are no source code, but hold some."""
PACKED_AS = 4
"""A compressed file counts as so many times its size where small files are put together."""
MOST_FILES = 4096
"""Files of a unit."""


class FilePart(NamedTuple):
    """A file or a part of one, in a unit."""

    file: str
    form: Form
    start: int
    """First byte, or first row group of a parquet file."""
    stop: int
    size: int
    """Bytes of the file."""
    time: int
    """When the file was last written to, in nanoseconds."""
    share: int
    """Bytes of the file that belong to this part."""


@dataclass(frozen=True)
class WorkUnit:
    """The part of the input that one worker reads at a time."""

    source: str
    parts: tuple[FilePart, ...]

    @property
    def identity(self) -> str:
        """Hash of what is to be read, and of the size and time of its files; a file that was written to has another.

        Contents are not hashed: that would read everything twice, once before the first worker can begin.
        """
        return xxhash.xxh3_128(json.dumps(self.as_json()).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of files that it reads, packed as they are."""
        return sum(part.share for part in self.parts)

    def as_json(self) -> list[Any]:
        """The unit as plain values."""
        return [self.source, [list(part) for part in self.parts]]

    @classmethod
    def of_json(cls, values: list[Any]) -> WorkUnit:
        """The unit that `as_json` gave."""
        source, parts = values
        return cls(source, tuple(FilePart(*part) for part in parts))


def cut_units(settings: ReadConfig, outside: str = "") -> list[WorkUnit]:
    """The units of all sources, sorted by the source's name and by path; what lies in the folder `outside`, where results go, is no input.

    Raises ReadError for what no reader could read.
    """
    require_sources(settings)
    units: list[WorkUnit] = []
    taken: dict[str, tuple[str, str]] = {}
    with ParquetReader() as tables:
        for source in sorted(settings.sources, key=lambda source: source.name):
            files = files_of(source, outside)
            for real, file in files.items():
                if real in taken:
                    other, name = taken[real]
                    raise ReadError(
                        f"read.sources: {file} belongs to {source.name}, and as {name} to {other}. Its documents would count twice: leave "
                        "it out of the paths of one of them."
                    )
                taken[real] = (source.name, file)
            units += _cut(source, sorted(files.values(), key=os.fsencode), settings.unit_bytes, tables)
    return units


def require_sources(settings: ReadConfig) -> None:
    """Raise ReadError for sources without a name or paths of their own, and for an encoding that is none."""
    if not settings.sources:
        raise ReadError("read.sources is empty. Name at least one: [{name: web, paths: [raw/web/*.jsonl]}].")
    seen = set()
    for number, source in enumerate(settings.sources):
        here = f"read.sources[{number}]"
        if not source.name:
            raise ReadError(f"{here} has no name. Give it one, such as `name: web`.")
        if source.name in seen:
            raise ReadError(f"{here}.name={source.name!r} is the name of another source too. Give each its own.")
        seen.add(source.name)
        if not source.paths:
            raise ReadError(f"{here}.paths is empty. Name its files, such as `paths: [raw/{source.name}/*.jsonl]`.")
        if source.encoding != "auto":
            _require_encoding(f"{here}.encoding={source.encoding!r}", source.encoding)


def _require_encoding(key: str, name: str) -> None:
    try:
        works = codecs.lookup(name)._is_text_encoding and bool(
            bytes(range(256)).decode(name, "replace").encode(name, "replace")
        )
    except (LookupError, ValueError):  # ValueError: a NUL in the name; or idna and its like, which refuse what they cannot read
        works = False
    if not works:
        raise ReadError(f"{key} is no encoding of Python. Use for example utf-8, gb18030, shift_jis or windows-1252.")


def files_of(source: SourceConfig, outside: str = "") -> dict[str, str]:
    """The files of a source: real path -> its smallest path among those that match, but for those in `outside`. Raises ReadError."""
    own = os.path.join(os.path.realpath(outside), "") if outside else None  # noqa: PTH118  (compared as text)
    found: dict[str, str] = {}
    unknown = []
    for pattern in source.paths:
        try:
            files = [file for file in matching(pattern) if not Path(file).is_dir()]
        except OSError as error:
            raise ReadError(
                f"{source.name}: {pattern}: {error.filename!r} cannot be looked into ({error.strerror or error}), and what lies in it "
                "would be missing. Allow it, or name paths beside it."
            ) from None
        if not files:
            raise ReadError(f"{source.name}: {pattern} {_nothing(pattern)}")
        inputs = {file: os.path.realpath(file) for file in files}
        if own is not None:
            inputs = {file: real for file, real in inputs.items() if not real.startswith(own)}
        if not inputs:
            raise ReadError(
                f"{source.name}: {pattern} has its files in output.dir={outside}, where results go. Set output.dir to a folder "
                "without input."
            )
        for file, real in inputs.items():
            _require_file(source, file)
            found[real] = min(found.get(real, file), file, key=os.fsencode)
            if form_of(source, file) is None:
                unknown.append(file)
    if unknown:
        first = min(unknown, key=os.fsencode)
        more = f" (and {len(unknown) - 1:,} more like it)" if len(unknown) > 1 else ""
        raise ReadError(
            f"{source.name}: {first}{more}: what kind of file is this? Names end in {', '.join(FORMS)}, then .gz or .zst where "
            "compressed. Say `form: text` (or lines, html, warc, parquet) where names do not, or `kind: code` for source code, or name "
            "fewer files in `paths`."
        )
    return found


def form_of(source: SourceConfig, file: str) -> Form | None:
    """The form of a file of a source; None: its name does not say."""
    if source.form != "auto":
        return source.form
    suffix = Path(file.removesuffix(compression_of(file))).suffix.lower()
    if source.kind == "code":
        return FORMS[suffix] if suffix in DATA else "text"
    return FORMS.get(suffix)


def compression_of(file: str) -> str:
    """The end of a compressed file's name, as it is written: ".gz", ".zst"; "" for others."""
    suffix = Path(file).suffix
    return suffix if suffix.lower() in COMPRESSIONS else ""


def _nothing(pattern: str) -> str:
    """Why a pattern has no files, and what to do."""
    if Path(pattern).is_dir():
        return f"is a directory; name its files, for example {pattern.rstrip('/')}/**/*.jsonl."
    if glob.has_magic(pattern):
        return f"matches no file (relative paths start at {Path.cwd()})."
    return f"does not exist (relative paths start at {Path.cwd()})."


def _require_file(source: SourceConfig, file: str) -> None:
    try:
        file.encode()
    except UnicodeEncodeError:
        shown = file.encode(errors="backslashreplace").decode()
        raise ReadError(
            f"{source.name}: the name of {shown} is not UTF-8, and goes with its documents. Rename the file."
        ) from None
    path = Path(file)
    if not path.is_file():
        fault = "is no plain file: write what it gives to a file, and name that" if path.exists() else "is a link to nothing"
        raise ReadError(f"{source.name}: {file} {fault}.")


# --- cutting ------------------------------------------------------------------------------------------------------------------


def _cut(source: SourceConfig, files: list[str], unit_bytes: int, tables: ParquetReader) -> Iterator[WorkUnit]:
    """The units of a source: a large file has its own, neighbours that are small share one."""
    group: list[FilePart] = []
    held = 0
    for file in files:
        parts = _parts(source, file, unit_bytes, tables)
        size = parts[0].size * (PACKED_AS if compression_of(file) else 1)
        if group and (held + size > unit_bytes or len(group) == MOST_FILES):
            yield WorkUnit(source.name, tuple(group))
            group, held = [], 0
        if len(parts) > 1:
            yield from (WorkUnit(source.name, (part,)) for part in parts)
        else:
            group += parts
            held += size
    if group:
        yield WorkUnit(source.name, tuple(group))


def _parts(source: SourceConfig, file: str, unit_bytes: int, tables: ParquetReader) -> list[FilePart]:
    """The parts of one file: at least one. Raises ReadError."""
    form = form_of(source, file)
    assert form is not None  # noqa: S101  files_of has refused it
    try:
        found = os.stat(file)  # noqa: PTH116
        if not stat.S_ISREG(found.st_mode):
            raise ReadError(f"{source.name}: {file} is no plain file any more.")
        size = found.st_size
        if form == "parquet":
            ends = _row_group_ends(row_groups(tables, file), unit_bytes)
        elif form == "lines" and size > unit_bytes and _is_divisible(source, file):
            number = -(-size // unit_bytes)
            ends = [size * (i + 1) // number for i in range(number)]
        else:
            ends = [size]
    except OSError as error:
        raise ReadError(f"{source.name}: {file} cannot be read: {error.strerror or error}.") from None
    bounds = [size * end // (ends[-1] or 1) for end in (0, *ends)]
    return [
        FilePart(file, form, start, stop, size, found.st_mtime_ns, upto - after)
        for start, stop, after, upto in zip([0, *ends], ends, bounds, bounds[1:], strict=False)
    ]


def _row_group_ends(sizes: list[int], unit_bytes: int) -> list[int]:
    """Ends of parts of a parquet file: row groups of `unit_bytes` together. One without any has one part, whose reader tells why."""
    ends, held = [], 0
    for i, size in enumerate(sizes):
        if held and held + size > unit_bytes:
            ends.append(i)
            held = 0
        held += size
    return [*ends, len(sizes)]


def _is_divisible(source: SourceConfig, file: str) -> bool:
    """Whether a byte 10 of a file is the end of a line, wherever one begins to read."""
    if compression_of(file):
        return False
    if source.encoding == "auto":
        try:
            with opened_plain(file) as opened:
                return wide_encoding(opened.read(HEAD_BYTES)) is None
        except OSError:  # its reader tells why, and counts it
            return False
    name = codecs.lookup(source.encoding).name
    return "\n".encode(name) == b"\n" and not name.startswith(("iso2022", "hz", "utf-7"))
