"""The worth of vocabularies on texts: tokens a word, bytes a token, and how much of a vocabulary is used (`megatrain data fertility`).

A word is what stands between blanks; of writing without blanks (Chinese, Japanese) each character is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatrain.data.bar import bar
from megatrain.data.prepare.read import Lines, TextPiece, read_pieces, total_bytes
from megatrain.data.tokenizer import Tokenizer, load_tokenizer
from megatrain.data.tokenizers.fast_engine import AUTO, encode_with
from megatrain.data.tokenizers.fitting import sampled_pieces, trained_on

ALL = "all"
"""Name of all sources together, where there are several."""
BATCH_CHARACTERS = 1 << 18
_CHARACTER = "\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_CHARACTER}]|[^\\s{_CHARACTER}]+")


@dataclass
class SourceCounts:
    """Counts of the texts of a source."""

    documents: int
    text_bytes: int
    words: int
    tokens: int
    used: npt.NDArray[np.bool_]
    """[vocab_size] whether each token occurs."""

    @property
    def tokens_a_word(self) -> float:
        """Fertility: tokens for each word; 0 without words."""
        return self.tokens / self.words if self.words else 0.0

    @property
    def bytes_a_token(self) -> float:
        """UTF-8 bytes for each token; 0 without tokens."""
        return self.text_bytes / self.tokens if self.tokens else 0.0

    def __add__(self, other: SourceCounts) -> SourceCounts:
        return SourceCounts(
            self.documents + other.documents,
            self.text_bytes + other.text_bytes,
            self.words + other.words,
            self.tokens + other.tokens,
            self.used | other.used,
        )


@dataclass(frozen=True)
class FertilityReport:
    """Counts by tokenizer and source; `str()` of it is a table."""

    tokenizers: dict[str, str]
    """A description of each, by the name that was given."""
    counts: dict[str, dict[str, SourceCounts]]
    """By tokenizer, then by source."""

    def __str__(self) -> str:
        names = list(self.tokenizers)
        marks = [f"[{n}]" for n in range(1, len(names) + 1)]
        legend = [f"{mark} {name}: {said}" for mark, (name, said) in zip(marks, self.tokenizers.items(), strict=True)]
        head = ["source", "documents", "bytes", "words"]
        head += [f"{column} {mark}" for column in ("tokens/word", "bytes/token", "used") for mark in marks]
        rows = [head]
        for source, found in self.counts[names[0]].items():
            row = [source, f"{found.documents:,}", f"{found.text_bytes:,}", f"{found.words:,}"]
            row += [f"{self.counts[name][source].tokens_a_word:.2f}" for name in names]
            row += [f"{self.counts[name][source].bytes_a_token:.2f}" for name in names]
            row += [f"{self.counts[name][source].used.mean():.0%}" for name in names]
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
        return "\n".join([*legend, "", *("  ".join(line) for line in lines)])


def measure_fertility(
    tokenizers: Sequence[str | Path],
    sources: Mapping[str, Sequence[str | Path]],
    key: str | Lines = "text",
    sample: int | None = None,
) -> FertilityReport:
    """Encodes the files of each source by each tokenizer, with nothing around documents. sample: bytes of each source at most.

    Raises ReadError, TokenizerError, ValueError without sources.
    """
    if not sources or not tokenizers:
        raise ValueError("there is nothing to measure: give --tokenizer FILE... and --input FILE...")
    said: dict[str, str] = {}
    counts: dict[str, dict[str, SourceCounts]] = {}
    size = sum(map(total_bytes, sources.values())) * len(tokenizers)
    with bar("fertility", size, in_bytes=True) as advance:
        for name in map(str, tokenizers):
            tokenizer = load_tokenizer(name)
            trained = trained_on(name, tokenizer.identity)
            said[name] = f"{tokenizer.vocab_size:,} tokens" + ("" if trained is None else f", {trained}")

            def count(encoder: Tokenizer) -> dict[str, SourceCounts]:
                found = {}
                for source, files in sources.items():
                    pieces = read_pieces(files, key, sample is None and encoder.divisible, advance)
                    found[source] = _counted(encoder, pieces if sample is None else sampled_pieces(pieces, sample))
                return found

            counts[name], _ = encode_with(tokenizer, AUTO, count)
            if len(sources) > 1:
                first, *rest = counts[name].values()
                counts[name][ALL] = sum(rest, first)
    return FertilityReport(said, counts)


def _counted(tokenizer: Tokenizer, pieces: Iterator[TextPiece]) -> SourceCounts:
    total = SourceCounts(0, 0, 0, 0, np.zeros(tokenizer.vocab_size, np.bool_))
    for batch in _batches(pieces):
        texts = [piece.text for piece in batch]
        ids = tokenizer.encode_batch(texts).ids
        total.documents += sum(piece.last for piece in batch)
        total.text_bytes += sum(len(text.encode()) for text in texts)
        total.words += sum(len(_WORD.findall(text)) for text in texts)
        total.tokens += ids.size
        total.used[ids] = True
    return total


def _batches(pieces: Iterator[TextPiece]) -> Iterator[list[TextPiece]]:
    batch: list[TextPiece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text) + 1
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
