"""`megatrain data filter`: keep documents by their perplexity under an n-gram model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatrain.data.prepare.read import Lines, read_documents
from megatrain.files import make_folder, whole
from megatrain.ngram.buckets import PERCENTILES, Cutoffs, cutoffs_of, perplexities, sound
from megatrain.ngram.model import NgramModel


@dataclass(frozen=True)
class FilterReport:
    """Result of a filter; `str()` of it is a line of text."""

    output: str
    documents: dict[str, int]
    """Bucket -> number of documents in it."""
    kept: int
    cutoffs: Cutoffs

    def __str__(self) -> str:
        each = ", ".join(f"{name} {count:,}" for name, count in self.documents.items())
        return (
            f"{self.output}: {self.kept:,} of {sum(self.documents.values()):,} documents ({each}); the middle begins at perplexity "
            f"{self.cutoffs.middle:.1f}, the tail at {self.cutoffs.tail:.1f}"
        )


def filter_files(
    inputs: Sequence[str | Path],
    model: NgramModel,
    output: str | Path,
    keep: frozenset[str],
    percentiles: tuple[float, float] = PERCENTILES,
    cutoffs: Cutoffs | None = None,
    key: str | Lines = "text",
) -> FilterReport:
    """Write the documents of the buckets `keep` as lines of JSON with perplexity and bucket, the whole file or nothing.

    cutoffs: given perplexities; None: the percentiles of these documents, which are then read twice.
    Raises ReadError, ValueError or OSError.
    """
    output = Path(output)
    if any(output.exists() and Path(path).exists() and output.samefile(path) for path in inputs):
        raise ValueError(f"{output} is read and written: the documents that are not kept would be gone. Give another --output.")

    def texts() -> Iterator[str]:
        for document in read_documents(inputs, key):
            yield document.text

    given = enumerate(perplexities(model, texts()), 1)
    values = np.fromiter((sound(value, f"document {number}") for number, value in given), np.float64)
    cuts = cutoffs_of(values, percentiles) if cutoffs is None else cutoffs
    name = key.key if isinstance(key, Lines) else key
    counts = dict.fromkeys(("head", "middle", "tail"), 0)
    kept = 0
    make_folder(output.parent)
    with whole(output, text=True) as file:
        for text, value in zip(texts(), values.tolist(), strict=True):
            bucket = cuts.bucket(value)
            counts[bucket] += 1
            if bucket in keep:
                kept += 1
                row = {name: text, "perplexity": round(value, 1), "bucket": bucket}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return FilterReport(str(output), counts, kept, cuts)
