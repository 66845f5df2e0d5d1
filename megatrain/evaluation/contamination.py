"""Which items of a task the training data has: 13-grams of words, looked for in token stores.

    "What is the capital of France? Paris"   ->   what is the capital of france paris     7 words: too few to tell
    "法国的首都是哪座城市"                     ->   法 国 的 首 都 是 哪 座 城 市            a Han or kana character is a word

An item is *dirty* if any 13 words of it in a row, question and right answer, stand so in the training data (GPT-3, arXiv:2005.14165,
appendix C; lm-evaluation-harness, docs/decontamination.md); one of 8 to 12 words if all of them do, in a row. Words are runs of letters
and digits, in lower case, of Unicode's form NFKC; marks and blanks do not count. Items of fewer words are too short to tell, and count as
clean.

The store's tokens become text again, a piece at a time, so that it matters neither how they were cut nor which tokenizer the model has.
Each word of the items has a random number; a gram's hash is a polynomial of them. The store is read once, in bounded memory.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatrain.data.boundaries import NONE, TokenizerError
from megatrain.data.indexed import TokenStore, TokenStoreError
from megatrain.data.store_record import StoreRecord, read_record
from megatrain.data.tokenizer import Tokenizer, load_tokenizer
from megatrain.evaluation.questions import MASK, Question
from megatrain.evaluation.task_keys import TaskKeys
from megatrain.evaluation.task_templates import text_of

LENGTH, SHORTEST = 13, 8
"""Words of a gram, and of the shortest item that is looked for."""
PIECE, OVERLAP = 1 << 18, 1 << 10
"""Tokens that are read at a time, and how many of them again with the next piece, so that no gram is cut."""
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_WORD = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]"
    "|[^\\W_\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]+"
)

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class ItemOverlap:
    """The part of an item that the training data has."""

    words: int
    grams: int
    """Grams of the item; 0: it is too short to tell."""
    found: int
    """How many of them the training data has."""

    @property
    def dirty(self) -> bool:
        """Whether it has any."""
        return self.found > 0


def words_of(text: str) -> list[str]:
    """The words of a text, in the form in which they are compared."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def text_to_look_for(keys: TaskKeys, question: Question) -> str:
    """The text of an item that the training data should not have: what is asked, and the right answer."""
    if keys.doc_to_decontamination_query is not None:
        return text_of(keys.doc_to_decontamination_query, question.item.fields)
    target = question.targets[0]
    if keys.output_type == "infilling":
        return MASK.sub(lambda _: target, question.text)
    return " ".join((question.text, target, question.after))


def overlaps(texts: Sequence[str], pieces: Iterable[str]) -> list[ItemOverlap]:
    """The parts of texts that a corpus has, which comes in pieces."""
    number: dict[str, int] = {}
    items = [[number.setdefault(word, len(number) + 1) for word in words_of(text)] for text in texts]
    table = np.random.default_rng(13).integers(1, 1 << 63, len(number) + 1, dtype=np.uint64)
    grams: dict[int, list[tuple[int, Hashes]]] = {}
    for place, words in enumerate(items):
        if len(words) >= SHORTEST:
            length = min(len(words), LENGTH)
            grams.setdefault(length, []).append((place, np.unique(_hashes(np.array(words), table, length))))
    wanted = {length: np.unique(np.concatenate([of for _, of in parts])) for length, parts in grams.items()}
    seen = _seen(pieces, number, table, wanted)
    found = [ItemOverlap(len(words), 0, 0) for words in items]
    for length, parts in grams.items():
        for place, of in parts:
            found[place] = ItemOverlap(len(items[place]), len(of), int(np.isin(of, seen[length]).sum()))
    return found


def _seen(pieces: Iterable[str], number: dict[str, int], table: Hashes, wanted: dict[int, Hashes]) -> dict[int, Hashes]:
    """Gram length -> which of the wanted hashes the corpus has."""
    hits: dict[int, list[Hashes]] = {length: [] for length in wanted}
    for text in pieces:
        words = words_of(text)
        ids = np.fromiter((number.get(word, 0) for word in words), np.int64, len(words))
        for length, hashes in wanted.items():
            here = _hashes(ids, table, length)
            places = np.minimum(np.searchsorted(hashes, here), len(hashes) - 1)
            hits[length].append(np.unique(here[hashes[places] == here]))
    return {length: np.unique(np.concatenate([np.empty(0, np.uint64), *parts])) for length, parts in hits.items()}


def _hashes(words: npt.NDArray[np.int64], table: Hashes, length: int) -> Hashes:
    """Hashes of the runs of `length` words all of which are known (not 0)."""
    count = len(words) - length + 1
    if count < 1:
        return np.empty(0, np.uint64)
    unknown = np.concatenate([[0], np.cumsum(words == 0)])
    starts = np.flatnonzero(unknown[length:] == unknown[:-length])
    hashes = np.zeros(len(starts), np.uint64)
    for place in range(length):
        hashes = hashes * _PRIME + table[words[starts + place]]
    return hashes


def texts_of_store(store: TokenStore, codec: Tokenizer, advance: Callable[[int], None]) -> Iterator[str]:
    """A store's text in pieces, each of which begins a little before the last one's end. advance: told of tokens that are read."""
    for first in range(0, store.tokens, PIECE - OVERLAP):
        end = min(first + PIECE, store.tokens)
        yield codec.decode(store.read(first, end, codec.vocab_size).tolist())
        advance(min(PIECE - OVERLAP, store.tokens - first))


def codec_of_store(store: TokenStore, codec: Tokenizer) -> Tokenizer:
    """The tokenizer that a store was made with: the model's, or the one that its record names. Raises TokenStoreError."""
    record = read_record(store)
    if record is None or record.identity == codec.identity:
        return codec
    other = _recorded(record)
    if other is None or other.identity != record.identity:
        raise TokenStoreError(
            f"{store.prefix} was made with {record.tokenizer}, which is not the model's tokenizer ({codec.label}) and is no longer there, "
            "so its text cannot be had. Put that file back, or take a store of the same text: --against PREFIX."
        )
    return other


def _recorded(record: StoreRecord) -> Tokenizer | None:
    """The tokenizer of a record, if it is where it was."""
    if record.tokenizer != "bytes" and not Path(record.tokenizer).is_file():
        return None
    try:
        return load_tokenizer(record.tokenizer, NONE, NONE)
    except TokenizerError:
        return None
