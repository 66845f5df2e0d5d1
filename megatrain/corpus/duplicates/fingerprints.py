"""Writes what de-duplication has to know of the documents of one unit, as they pass by, in a file of columns.

    with fingerprinting(path, settings) as prints:
        for document in unit:
            prints.add(document.text, document.kind)            # the row of a document is the number of those added before it

Columns of a block [documents n, parts m]; hashes ascend, so that a part of them is a range:

    exact.high, exact.low, exact.rows        128-bit hash of the document, and its row in the block [n]
    near.signatures [n, 120], near.whole     its signature, and a hash of it [n]
    near.keys, near.rows [bands, w]          hash of each band, and the row it belongs to; of documents with words
    lines.high, lines.low, lines.numbers     128-bit hash of each line, and its number among all lines of the block [m]
    lines.counts                             lines of each document [n], those without a hash counted
    size                                     (n, lines in all)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatrain.corpus.duplicates.key_files import Column, KeyBlock, KeyFile, KeyFileError, KeyWriter, hashes_of, written
from megatrain.corpus.duplicates.minhash import HASHES, band_keys, keys_of, signatures
from megatrain.corpus.duplicates.normal import Hash128, hash_texts, parts_of
from megatrain.corpus.duplicates.parameters import DedupConfig
from megatrain.files import brief

KIND = "fingerprints"
_BATCH_LETTERS, _BLOCK_DOCUMENTS, _BLOCK_PARTS = 1 << 19, 1 << 15, 1 << 19
"""Characters that are looked at together (more only of one document); documents and lines of a block, about."""


def recipe(settings: DedupConfig) -> dict[str, Any]:
    """The settings that decide what a file of fingerprints says."""
    said: dict[str, Any] = {"dedup.exact": settings.exact, "dedup.near": settings.near, "dedup.lines": settings.lines}
    if settings.near:
        said |= {
            "dedup.shingle_words": settings.shingle_words,
            "dedup.bands": settings.bands,
            "dedup.band_rows": settings.band_rows,
        }
    if settings.lines != "none":
        said["dedup.line_letters"] = settings.line_letters
    return said


def by_hash(hashes: Hash128, numbers: Column, dtype: str) -> tuple[Column, Column, Column]:
    """(high, low, numbers), ascending by hash and number."""
    order = np.argsort(hashes[:, 0], kind="stable")
    return hashes[order, 0], hashes[order, 1], numbers[order].astype(dtype)


class Fingerprints:
    """Collects the fingerprints of documents, and writes a block of them whenever there are many."""

    def __init__(self, writer: KeyWriter, settings: DedupConfig) -> None:
        self._writer, self._settings = writer, settings
        self._texts: list[str] = []
        self._prose: list[str] = []
        """The texts, each empty where it is code."""
        self._letters = self._documents = self._parts = 0
        self._found: dict[str, list[Column]] = {}
        writer.about = {"recipe": recipe(settings), "documents": 0, "lines": 0}

    def add(self, text: str, kind: str = "text") -> None:
        """Take in the next document. kind: "code" is compared to the letter, and its lines are not, as programs have many alike."""
        self._texts.append(text)
        self._prose.append(text if kind != "code" else "")
        self._letters += len(text)
        self._documents += 1
        if self._letters >= _BATCH_LETTERS:
            self._look()
        if self._documents >= _BLOCK_DOCUMENTS or self._parts >= _BLOCK_PARTS:
            self.flush()

    def _look(self) -> None:
        """Fingerprint the texts at hand."""
        texts, prose, self._texts, self._prose, self._letters = self._texts, self._prose, [], [], 0
        settings = self._settings
        found: dict[str, Column] = {}
        before = self._documents - len(texts)
        if settings.exact == "text":
            found["exact"], found["exact.rows"] = hash_texts(texts), np.arange(before, self._documents)
        elif settings.exact == "normal":
            form, code = parts_of(prose, None, 1), [row for row, text in enumerate(prose) if text != texts[row]]
            found["exact"] = np.concatenate([form.hashes, hash_texts([texts[row] for row in code])])
            found["exact.rows"] = before + np.concatenate([form.numbers, np.array(code, np.int64)])
        if settings.near:
            found["signatures"], found["words"] = signatures(texts, settings.shingle_words)
        if settings.lines != "none":
            lines = parts_of(prose, settings.lines, settings.line_letters)
            found["lines"], found["numbers"], found["counts"] = lines.hashes, self._parts + lines.numbers, lines.counts
            self._parts += int(lines.counts.sum())
        for name, column in found.items():
            self._found.setdefault(name, []).append(column)

    def flush(self) -> None:
        """Write a block of what there is."""
        if self._texts:
            self._look()
        if not self._documents:
            return
        found, block, settings = {name: np.concatenate(columns) for name, columns in self._found.items()}, {}, self._settings
        if settings.exact != "none":
            block["exact.high"], block["exact.low"], block["exact.rows"] = by_hash(found["exact"], found["exact.rows"], "<u4")
        if settings.near:
            signed, rows = found["signatures"], np.flatnonzero(found["words"])
            keys = band_keys(signed[rows], settings.bands, settings.band_rows)
            order = np.argsort(keys, kind="stable")
            block["near.signatures"], block["near.whole"] = signed, keys_of(signed)
            block["near.keys"], block["near.rows"] = np.take_along_axis(keys, order, 1), rows[order].astype("<u4")
        if settings.lines != "none":
            block["lines.high"], block["lines.low"], block["lines.numbers"] = by_hash(found["lines"], found["numbers"], "<u4")
            block["lines.counts"] = found["counts"].astype("<u4")
        block["size"] = np.array([self._documents, self._parts], "<u8")
        self._writer.block(block)
        self._writer.about["documents"] += self._documents
        self._writer.about["lines"] += self._parts
        self._found, self._documents, self._parts = {}, 0, 0


@contextmanager
def fingerprinting(path: str | Path, settings: DedupConfig) -> Iterator[Fingerprints]:
    """A file of fingerprints to fill; it appears when it is whole. Raises OSError."""
    with written(path, KIND) as writer:
        prints = Fingerprints(writer, settings)
        yield prints
        prints.flush()


class Stretch(NamedTuple):
    """A block of fingerprints, and where its documents and lines lie in the order of the corpus."""

    block: KeyBlock
    document: int
    """Number of its first document, over all units."""
    documents: int
    line: int
    """Number of its first line, likewise."""
    lines: int

    def part(self, names: Sequence[str], part: int, parts: int, band: int | None = None) -> list[Column]:
        """The rows of a part by hash of some columns, of which the first holds the hashes, and the last numbers of documents or
        lines.

        Raises KeyFileError where the hashes do not ascend or a number is too large.
        """
        path, columns = self.block.file.path, [self.block.column(name) for name in names]
        if band is not None and all(len(column.shape) == 2 and len(column) > band for column in columns):
            columns = [column.part(band) for column in columns]
        if len({column.shape for column in columns}) > 1 or len(columns[0].shape) > 1:
            raise KeyFileError.damaged(path, f"{' and '.join(names)} are not equally long")
        where = columns[0].range_of(*hashes_of(part, parts))
        found = [column.read(where.start, where.stop) for column in columns]
        found[-1] = found[-1].astype(np.int64)
        most = self.lines if names[-1].startswith("lines") else self.documents
        if len(found[-1]) and found[-1].max() >= most:
            raise KeyFileError.damaged(path, f"{names[-1]} has number {found[-1].max():,} of {most:,}")
        if (found[0][1:] < found[0][:-1]).any():
            raise KeyFileError.damaged(path, f"{names[0]} does not ascend")
        return found


def stretches(units: Sequence[str | Path], settings: DedupConfig) -> Iterator[Stretch]:
    """The blocks of all units, in order. Raises OSError; KeyFileError for a file that is damaged or was made with other
    settings.
    """
    document = line = 0
    for path in units:
        file = KeyFile(path, KIND)
        require_recipe(file, settings)
        for block in file.blocks:
            documents, lines = _size(block)
            if settings.near:
                shapes = [block.column(name).shape for name in ("near.signatures", "near.whole")]
                if shapes != [(documents, HASHES), (documents,)]:
                    raise KeyFileError.damaged(
                        file.path, f"its signatures and their hashes are {shapes}, of {documents:,} documents"
                    )
            yield Stretch(block, document, documents, line, lines)
            document, line = document + documents, line + lines


def _size(block: KeyBlock) -> tuple[int, int]:
    """(documents, lines) of a block."""
    column = block.column("size")
    if column.shape != (2,):
        raise KeyFileError.damaged(block.file.path, f"its size has {column.shape} numbers")
    documents, lines = column.read().tolist()
    return documents, lines


def require_recipe(file: KeyFile, settings: DedupConfig) -> None:
    """Raise KeyFileError for fingerprints that were made with other settings."""
    made, wanted = file.about.get("recipe", {}), recipe(settings)
    for key in wanted:
        if made.get(key) != wanted[key]:
            raise KeyFileError(
                f"{file.path} was made with {key}={brief(made.get(key))}, and the config has {wanted[key]}. Set it back, or "
                "run the stage that fingerprints documents again, into a new folder."
            )
