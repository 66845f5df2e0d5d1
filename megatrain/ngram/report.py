"""The output of `megatrain ngram score`: a line of JSON for each line of text, and one for all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatrain.files import opened
from megatrain.ngram.model import NgramModel, perplexity
from megatrain.ngram.text import line_blocks, require_text, split


def report(model: NgramModel, path: Path, sentences: bool = True, summary_only: bool = False) -> Iterator[str]:
    """Lines of JSON for a text file: log10, tokens, oov, perplexity; then the totals, also without unknown words.

    Raises TextError or OSError.
    """
    sums, lines = np.zeros(4), 0
    with opened(path) as file:
        require_text(file, path)
        for block in line_blocks(file):
            totals = model.totals(split(model.space(block)), bos=sentences, eos=sentences)
            sums += [column.sum() for column in totals]
            lines += totals[0].size
            if not summary_only:
                rows = zip(*(column.tolist() for column in totals[:3]), strict=True)
                yield "".join(_line(*row) for row in rows)
    log10, tokens, oov, log10_oov = (float(value) for value in sums)
    yield (
        json.dumps(
            {
                "summary": True,
                "lines": lines,
                "tokens": int(tokens),
                "oov": int(oov),
                "log10": log10,
                "perplexity": perplexity(log10, tokens),
                "perplexity_without_oov": perplexity(log10 - log10_oov, tokens - oov),
            }
        )
        + "\n"
    )


def _line(log10: float, tokens: int, oov: int) -> str:
    return f'{{"log10": {log10:.7g}, "tokens": {tokens}, "oov": {oov}, "perplexity": {perplexity(log10, tokens):.7g}}}\n'
