"""A corpus that every Python installation has: the source of its standard library, one document a module.

`build` writes train.jsonl and valid.jsonl, lines of {"text", "path"}. A document is held out if a hash of its path says so: the split
is the same on every machine, and does not change when other documents are added or removed. With `text` given, the user's own files are
used instead of the library.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatrain.data.prepare.read import COMPRESSIONS, LINE_SUFFIXES, TEXT_SUFFIXES, ReadError, read_documents
from megatrain.files import whole

LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data")
"""Folders left out: packages of others; tests, half of the library and full of tables and deliberate nonsense; character tables;
pydoc's one generated module, so large that the task changes with the side of the split that it is on."""
FEWEST_MODULES = 100
FEWEST_DOCUMENTS = 20
"""With fewer documents than this, texts are divided so that some can be held out."""
PIECE_CHARACTERS = 4000


@dataclass(frozen=True)
class CorpusCounts:
    """The files and sizes that `build` wrote; sizes in UTF-8 bytes of text."""

    train: Path
    valid: Path
    train_documents: int
    valid_documents: int
    train_bytes: int
    valid_bytes: int


def build(output_dir: str | Path, held_out: float = 0.05, text: Sequence[str | Path] | None = None) -> CorpusCounts:
    """Writes `output_dir`/train.jsonl and valid.jsonl; `held_out` is the share of documents in the second.

    Raises ReadError when the interpreter ships without its sources, or `text` holds too little, and ValueError for a share that
    is not between 0 and 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must lie between 0 and 1, e.g. 0.05.")
    documents = list(_standard_library() if text is None else _users_texts(text))
    valid = {path for path, _ in documents if _draw(path) < held_out}
    if not valid:
        valid = {min((path for path, _ in documents), key=_draw)}
    elif len(valid) == len(documents):
        valid.remove(max(valid, key=_draw))
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    train_rows = [(path, body) for path, body in documents if path not in valid]
    valid_rows = [(path, body) for path, body in documents if path in valid]
    train_path, valid_path = directory / "train.jsonl", directory / "valid.jsonl"
    train_bytes, valid_bytes = _write(train_path, train_rows), _write(valid_path, valid_rows)
    return CorpusCounts(train_path, valid_path, len(train_rows), len(valid_rows), train_bytes, valid_bytes)


def _draw(path: str) -> float:
    """A number in [0, 1) that is a function of the path."""
    return int.from_bytes(hashlib.sha256(path.encode(errors="surrogateescape")).digest()[:7], "big") / 2**56


def _write(path: Path, rows: Sequence[tuple[str, str]]) -> int:
    """Writes the documents, the whole file or nothing; returns their size in bytes."""
    size = 0
    with whole(path, text=True) as file:
        for name, body in rows:
            file.write(json.dumps({"text": body, "path": name}) + "\n")
            size += len(body.encode())
    return size


def _standard_library() -> Iterator[tuple[str, str]]:
    """(path, text) of every module with text, by path. Raises ReadError when there are hardly any."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = 0
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(f"/{part}/" in f"/{name}" for part in LEFT_OUT):
            continue
        body = _decodable(path)
        if body:
            found += 1
            yield name, body
    if found < FEWEST_MODULES:
        raise ReadError(
            f"{root} holds the source of only {found} modules: this interpreter ships without its standard library's sources. "
            f"Install them (Debian and Ubuntu: apt install python3-full), use another Python, or give --text PATH..."
        )


def _decodable(path: Path) -> str:
    """The text of a file; empty if it is not UTF-8 or cannot be read, as a corpus can do without it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _users_texts(paths: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    """(path, text) of the users' documents, which are divided at paragraphs if there are few. Raises ReadError."""
    documents: list[tuple[str, str]] = []
    for root in map(Path, paths):
        documents += _of_directory(root) if root.is_dir() else _of_file(root, root.name)
    documents = [(name, body) for name, body in documents if body.strip()]
    if len(documents) < FEWEST_DOCUMENTS:
        documents = [(f"{name}#{i}", part) for name, body in documents for i, part in enumerate(_paragraphs(body))]
    if len(documents) < 2:
        names = ", ".join(map(str, paths))
        raise ReadError(
            f"--text {names}: {len(documents)} documents of text are too few to hold one out. Give at least two files, or one "
            f"of more than {PIECE_CHARACTERS} characters; files end in {', '.join(TEXT_SUFFIXES + LINE_SUFFIXES)}."
        )
    yield from _unique(documents)


def _of_directory(root: Path) -> Iterator[tuple[str, str]]:
    """The documents of all files below a directory whose names end like text files."""
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
        if plain.suffix.lower() in TEXT_SUFFIXES + LINE_SUFFIXES:
            yield from _of_file(path, path.relative_to(root).as_posix())


def _of_file(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """The documents of one file. Raises ReadError."""
    for document in read_documents([path]):
        yield (f"{name}:{document.line}" if document.line else name), document.text


def _paragraphs(text: str) -> Iterator[str]:
    """A text in pieces of whole paragraphs (or lines, if there are few), each of PIECE_CHARACTERS or more except the last."""
    separator = "\n\n" if text.count("\n\n") * PIECE_CHARACTERS > len(text) else "\n"
    piece: list[str] = []
    size = 0
    for part in text.split(separator):
        piece.append(part)
        size += len(part) + len(separator)
        if size >= PIECE_CHARACTERS:
            yield separator.join(piece)
            piece, size = [], 0
    if any(part.strip() for part in piece):
        yield separator.join(piece)


def _unique(documents: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The same documents; equal paths (of two directories, say) get a number to differ."""
    seen: dict[str, int] = {}
    for name, body in documents:
        seen[name] = seen.get(name, 0) + 1
        yield (name if seen[name] == 1 else f"{name}~{seen[name]}"), body
