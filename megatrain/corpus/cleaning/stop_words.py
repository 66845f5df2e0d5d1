"""Removes stop words, for data of classifiers that count words. A language model loses its grammar by it, so it is off by default."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from functools import cache
from typing import Any

from megatrain.corpus.cleaning.boilerplate import read_lines
from megatrain.corpus.cleaning.characters import HAN
from megatrain.extras import need

CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]+")
SPACED = re.compile(r"([^\W_\u3400-\u4dbf\u4e00-\u9fff]+(?:['’][^\W_\u3400-\u4dbf\u4e00-\u9fff]+)*) ?")
"""Words between blanks and marks, with a blank behind."""


@cache
def _jieba() -> Any:
    """The segmentation of Chinese, silent."""
    with warnings.catch_warnings():  # it has escapes of strings that Python warns of
        warnings.simplefilter("ignore")
        jieba: Any = need("jieba", "clean.stop_words in Chinese text", "chinese")
    jieba.setLogLevel("ERROR")
    return jieba


class StopWords:
    """Stop words of a file, one a line. Raises ValueError or OSError where it cannot be used."""

    def __init__(self, path: str) -> None:
        self.words = frozenset(line.casefold() for line in read_lines(path))

    def without(self, text: str, counts: Counter[str]) -> str:
        """A text without them: whole words of other scripts, and of Chinese what `jieba` takes for words."""

        def spaced(word: re.Match[str]) -> str:
            stop = word[1].casefold() in self.words
            counts["stop_words"] += stop
            return "" if stop else word[0]

        def chinese(run: re.Match[str]) -> str:
            words = _jieba().lcut(run[0])
            kept = [word for word in words if word not in self.words]
            counts["stop_words"] += len(words) - len(kept)
            return "".join(kept)

        text = SPACED.sub(spaced, text)
        if HAN.search(text) is not None:
            text = CHINESE.sub(chinese, text)
        return "\n".join([line.rstrip(" ") for line in text.split("\n")])
