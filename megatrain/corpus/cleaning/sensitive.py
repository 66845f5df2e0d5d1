"""Words that a user does not want: lists of them are files, a word or phrase a line.

Case does not count. Words of scripts that write blanks between them are found as a whole (`ass` not in `class`), Chinese ones anywhere. The
longest word from the left is taken; a text is read once, each letter at most as often as the longest word is long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from megatrain.corpus.cleaning.boilerplate import read_lines
from megatrain.corpus.cleaning.choices import WordsConfig
from megatrain.corpus.document import Document
from megatrain.corpus.letters import DIGIT, LETTER, SPACE, UPPER, classes, code_points
from megatrain.corpus.words import jit

LONGEST = 64
"""Letters of a word, at most."""
SPACED = 0xE00
"""The scripts of the code points below it write blanks between words."""


@cache
def _small() -> npt.NDArray[np.uint32]:
    """The small letter of each code point, uint32 [0x110000]; those that have none, or two, stay."""
    small = np.arange(0x110000, dtype=np.uint32)
    for code in np.flatnonzero(classes() & UPPER):
        letter = chr(code).lower()
        small[code] = ord(letter) if len(letter) == 1 else code
    return small


@jit
def find_listed(
    codes: npt.NDArray[np.uint32],
    spaced: npt.NDArray[np.bool_],
    keys: npt.NDArray[np.uint64],
    nodes: npt.NDArray[np.int64],
    ends: npt.NDArray[np.bool_],
    found: npt.NDArray[np.int64],
) -> int:
    """Fill in [n, 2] where words of a trie begin and end; their number. keys, nodes: a hash table of (node, letter) and the node behind."""
    count, i, n, mask = 0, 0, len(codes), np.uint64(len(keys) - 1)
    while i < n:
        longest, node, j = 0, 0, i
        if not (i > 0 and spaced[i] and spaced[i - 1]):
            while j < n:
                key = (np.uint64(node) << np.uint64(21) | np.uint64(codes[j])) + np.uint64(1)
                place = (key * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)) & mask
                while keys[place] != np.uint64(0) and keys[place] != key:
                    place = (place + np.uint64(1)) & mask
                if keys[place] == np.uint64(0):
                    break
                node = nodes[place]
                j += 1
                if ends[node] and not (j < n and spaced[j] and spaced[j - 1]):
                    longest = j
        if longest:
            found[count, 0], found[count, 1] = i, longest
            count += 1
            i = longest
        else:
            i += 1
    return count


class Trie:
    """Words as a tree of letters in a hash table."""

    def __init__(self, words: Iterable[str]) -> None:
        edges: dict[tuple[int, int], int] = {}
        last: set[int] = set()
        for word in words:
            node = 0
            for code in _small()[code_points(word)].tolist():
                node = edges.setdefault((node, code), len(edges) + 1)
            last.add(node)
        size = 1 << max(4, (2 * len(edges)).bit_length())
        self.keys, self.nodes = np.zeros(size, np.uint64), np.zeros(size, np.int64)
        for (node, code), behind in edges.items():
            key = ((node << 21) | code) + 1
            place = ((key * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 32) & (size - 1)
            while self.keys[place]:
                place = (place + 1) & (size - 1)
            self.keys[place], self.nodes[place] = key, behind
        self.ends = np.zeros(len(edges) + 1, np.bool_)
        self.ends[sorted(last)] = True

    def find(self, text: str) -> tuple[npt.NDArray[np.int64], float]:
        """(Where words begin and end [n, 2], their share of the text's letters; blanks do not count)."""
        codes = code_points(text)
        letters = classes()[codes]
        spaced = ((letters & (LETTER | DIGIT)) != 0) & (codes < SPACED)
        found = np.empty((len(codes), 2), np.int64)
        count = find_listed(_small()[codes], spaced, self.keys, self.nodes, self.ends, found)
        black = np.concatenate([[0], np.cumsum((letters & SPACE) == 0)])
        within = black[found[:count, 1]] - black[found[:count, 0]]
        return found[:count], float(within.sum()) / max(1, int(black[-1]))


class Sensitive:
    """Scores, masks or removes such words. Raises ValueError for a list that cannot be used."""

    def __init__(self, settings: WordsConfig) -> None:
        words: set[str] = set()
        for path in settings.lists:
            lines = read_lines(path)
            long = next((line for line in lines if len(line) > LONGEST), None)
            if long is not None:
                raise ValueError(
                    f"{path}: a word has {len(long)} letters, more than {LONGEST}: {long[:20]!r}... Write one word or phrase a line"
                )
            if not lines:
                raise ValueError(f"{path} has no words. Write a word or phrase a line")
            words.update(lines)
        self.settings, self.trie = settings, Trie(sorted(words))

    def apply(self, document: Document, counts: Counter[str]) -> bool:
        """Do it, and keep the words' share of the letters as `clean.words`; whether the document is to be refused."""
        settings = self.settings
        found, share = self.trie.find(document.text)
        counts["words"] += len(found)
        document.scores["clean.words"] = share
        if settings.action == "mask":
            document.text = self._masked(document.text, found.tolist())
        if settings.action == "remove" and settings.per == "line":
            lines = document.text.split("\n")
            kept = [line for line in lines if not line or self.trie.find(line)[1] <= settings.threshold]
            counts["words_lines"] += len(lines) - len(kept)
            document.text = "\n".join(kept)
        return settings.action == "remove" and settings.per == "document" and share > settings.threshold

    def _masked(self, text: str, found: Sequence[Sequence[int]]) -> str:
        """A text with a mark for each letter of such words."""
        parts, done = [], 0
        for begin, end in found:
            parts += [text[done:begin], self.settings.mask * (end - begin)]
            done = end
        return "".join([*parts, text[done:]])
