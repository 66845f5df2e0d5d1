"""Encoding by `gigatoken`, some fifty times as fast as `tokenizers`, wherever it gives the same ids: a guard holds it against the library.

before      it encodes every text of `hard_texts` as the library does: letters, digits, marks, blanks and line ends of many scripts
meanwhile   a part of each file, and of each batch (a 2048th of the text), is encoded by both

A split pattern that it does not know, or any difference, and the library serves; what was written until then is written again. Special
tokens in a text stay text: they are taken out of what gigatoken is given.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import psutil

from megatrain.data.boundaries import Beginning, Ending, NamedToken
from megatrain.data.indexed import best_dtype
from megatrain.data.tokenizer import PROBE, JsonTokenizer, Tokenizer
from megatrain.data.tokenizers.token_ids import EncodedTexts
from megatrain.files import OneLine, brief
from megatrain.stderr import note

AUTO, GIGATOKEN, TOKENIZERS = ENGINES = ("auto", "gigatoken", "tokenizers")
WINDOW, SAMPLED = 64, 1 << 17
"""Characters of a part of the sample, and characters of text for each: a 2048th."""
FILE_WINDOW = 32
"""Characters of the part of each file; a batch may begin hundreds."""
LONG = 300
"""Characters of a text on average from which on a call for each is cheaper than one for all, whose ids come in an array of `awkward`."""
CHECK_CHARACTERS = 1 << 21
"""Characters of text after which memory is looked at."""
CACHE_BYTES = 128 << 20
"""gigatoken keeps every word that it has met; when the process has grown by so much, it begins again."""
HARD_TEXTS = 400
_SHOWN = 24

T = TypeVar("T")


class EngineDiffersError(OneLine, ValueError):
    """gigatoken gives other ids than `tokenizers`; what it has encoded so far is not to be used."""

    def __init__(self, said: str, text: int | None = None) -> None:
        super().__init__(said)
        self.text = text
        """Number of the text in its batch; None where it is none of a batch."""


class FastTokenizer:
    """A tokenizer whose batches gigatoken encodes and `tokenizers` samples; in all else the tokenizer itself."""

    def __init__(self, own: JsonTokenizer) -> None:
        """Raises EngineDiffersError if gigatoken is not installed, does not know such a tokenizer, or is found to differ."""
        self._own, self.engine = own, GIGATOKEN
        self.vocab_size, self.label, self.identity, self.divisible = own.vocab_size, own.label, own.identity, own.divisible
        self._dtype = best_dtype(own.vocab_size)
        description = own.description()
        self._description = json.dumps(without_special(description))
        self._process = psutil.Process()
        self._lock, self._unchecked = threading.Lock(), 0
        self._backend = self._loaded()
        self._loaded_at = self._process.memory_info().rss
        self._compare(hard_texts([token["content"] for token in description.get("added_tokens", ())]))

    def _loaded(self) -> Any:
        try:
            from gigatoken.gigatoken_rs import load_hf_json  # noqa: PLC0415  an extra
        except ImportError:
            raise EngineDiffersError("gigatoken is not installed (pip install 'megatrain[data]')") from None
        try:
            return load_hf_json(self._description)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the library is no Exception
            raise EngineDiffersError(f"gigatoken cannot load {self.label}: {_first_line(error)}") from None

    @property
    def ending(self) -> Ending:
        """The tokens that end a document."""
        return self._own.ending

    @property
    def beginning(self) -> Beginning:
        """The tokens that begin a document."""
        return self._own.beginning

    @property
    def eod(self) -> int | None:
        """Id of the token that ends a document."""
        return self._own.eod

    def special_id(self, name: str) -> int | None:
        """Id of a special token."""
        return self._own.special_id(name)

    def name_of(self, token: int) -> str:
        """The token of this id."""
        return self._own.name_of(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, by the library."""
        return self._own.encode(text)

    @property
    def named_tokens(self) -> Sequence[NamedToken]:
        """Special tokens, and others that are found in text."""
        return self._own.named_tokens

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text behind a special token, by the library."""
        return self._own.encode_inside(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return self._own.decode(ids)

    def unfinished(self, ids: Sequence[int]) -> int:
        """How many replacement characters at the end of the text may yet become a character."""
        return self._own.unfinished(ids)

    def encode_batch(self, texts: Sequence[str], files: Sequence[int] = ()) -> EncodedTexts:
        """Ids of texts. files: the numbers of those that begin a file. Raises EngineDiffersError where a sample of them differs."""
        encoded = self.encode_plainly(texts)
        self._compare(sample_of(texts, files))
        return encoded

    def encode_plainly(self, texts: Sequence[str]) -> EncodedTexts:
        """Ids of texts by gigatoken, compared with nothing. Raises EngineDiffersError where it fails."""
        try:
            with self._lock:  # gigatoken refuses a second thread, and one is faster than a thread can read
                self._begin_again_if_large(size := sum(map(len, texts)))
                if len(texts) == 1 or size >= LONG * len(texts):
                    encode = self._backend.encode
                    parts = [encode(text) for text in texts]
                    ids = np.concatenate(parts, dtype=self._dtype, casting="unsafe")
                    return EncodedTexts(ids, np.array([part.size for part in parts], np.int64))
                found = self._backend.encode_batch(list(texts), parallel=False).layout
        except (KeyboardInterrupt, SystemExit, EngineDiffersError):
            raise
        except BaseException as error:
            raise EngineDiffersError(f"gigatoken cannot encode a text: {_first_line(error)}") from None
        offsets = np.asarray(found.offsets.data, np.int64)
        ids = np.asarray(found.content.data)[offsets[0] : offsets[-1]]
        return EncodedTexts(ids.astype(self._dtype), np.diff(offsets))

    def _compare(self, texts: Mapping[str, int | None]) -> None:
        """Raise EngineDiffersError unless both encode the texts alike. They are joined, which costs but two calls."""
        together = "\n".join(texts)
        if self._agree(together):
            return
        for text, number in {**texts, together: None}.items():
            if not self._agree(text):
                fast = self.encode_plainly([text]).ids.tolist()
                raise EngineDiffersError(f"gigatoken gives {difference(self._own, text, fast)}", number)

    def _agree(self, text: str) -> bool:
        return bool(np.array_equal(self.encode_plainly([text]).ids, self._own.encode_batch([text]).ids))

    def _begin_again_if_large(self, size: int) -> None:
        """Leave the words that gigatoken keeps behind, if they may be too many before `size` characters more."""
        self._unchecked += size
        if self._unchecked > CHECK_CHARACTERS:
            self._unchecked = 0
            if self._process.memory_info().rss - self._loaded_at > CACHE_BYTES:
                self._backend = None  # before the next one is loaded
                self._backend = self._loaded()
                self._loaded_at = self._process.memory_info().rss


def encode_with(tokenizer: Tokenizer, engine: str, write: Callable[[Tokenizer], T]) -> tuple[T, str]:
    """(what `write` gives, called with a tokenizer that encodes by the engine; which one served, and why).

    With `auto` it is called again where gigatoken is found to differ on the way, so it must begin anew. Raises ValueError for an engine
    that there is not, and with `gigatoken` EngineDiffersError where that does not serve.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine}: use one of {', '.join(ENGINES)}.")
    if engine == TOKENIZERS or not isinstance(tokenizer, JsonTokenizer):
        if engine == GIGATOKEN:
            raise EngineDiffersError(f"--engine gigatoken: {tokenizer.label} is no tokenizer.json, leave the option out")
        return write(tokenizer), ""
    began = False
    try:
        fast = FastTokenizer(tokenizer)
        began = True
        return write(fast), "by gigatoken"
    except EngineDiffersError as error:
        if engine == GIGATOKEN:
            raise EngineDiffersError(f"{error}. Use --engine tokenizers.") from None
        said = f"by tokenizers, since {error}"
    if began:
        note(f"tokenize: again from the beginning, {said}")
    return write(tokenizer), said


def _first_line(error: BaseException) -> str:
    return brief(str(error).partition("\n")[0])


def without_special(description: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json whose special tokens are text like any other, and which adds none."""
    literal = [token for token in description.get("added_tokens", ()) if not token.get("special")]
    return description | {"added_tokens": literal, "post_processor": None}


def sample_of(texts: Sequence[str], files: Sequence[int] = ()) -> dict[str, int | None]:
    """Parts of a batch's texts, with the numbers of the texts: of each that begins a file, and of as many as make a 2048th of all."""
    found: dict[str, int | None] = {_part(texts[number], FILE_WINDOW, 1): number for number in files}
    due = 0
    for number, text in enumerate(texts):
        due -= len(text)
        while due < 0:
            found[_part(text, WINDOW, len(text) + due)] = number
            due += SAMPLED
    return found


def _part(text: str, length: int, at: int) -> str:
    """A part of a text, by a fixed rule that looks everywhere, since all files of a project may begin alike."""
    begin = (len(text) + at) * _STRIDE % max(len(text) - length, 1)
    return text[begin : begin + length]


def hard_texts(names: Sequence[str] = ()) -> dict[str, int | None]:
    """Short texts on which tokenizers have differed, always the same ones, and each of `names` in a text."""
    draw = random.Random(1)
    texts = ["".join(draw.choice(draw.choice(_LETTERS)) for _ in range(draw.randint(1, 24))) for _ in range(HARD_TEXTS)]
    return dict.fromkeys([PROBE, *texts, *(f"a {name}b{name} {name}" for name in names)])


def difference(own: Tokenizer, text: str, fast: Sequence[int]) -> str:
    """Where ids differ from those of the library, as text."""
    ids = own.encode(text)
    same = next((n for n, pair in enumerate(zip(ids, fast, strict=False)) if pair[0] != pair[1]), min(len(ids), len(fast)))
    before = own.decode(ids[:same])
    rest = text[len(before) :] if text.startswith(before) else text
    return f"{list(fast[same : same + 4])} for {rest[:_SHOWN]!r}, and tokenizers {ids[same : same + 4]}"


_STRIDE = 2654435761
_LETTERS = (
    "aeiostnr",
    "ABCXYZ",
    "   ",
    "\n\n\r\t",
    "0123456789",
    '.,;:!?-_/\\()[]{}<>|&^%$#@*+=~`"',
    "'\u2019sStTdDmM",
    ("'ll", "'VE", "'re", "'\u017f", "\u212a", "don't", "I'M", "https://", "  \n  ", "\r\n", "<|", "|>", "    "),
    "\u00e9\u00df\u0130\u0131\u017f\u01c5\u00aa\u02b0\u00e0\u00d1",
    "e\u0301\u0308\u0327\u20dd",
    "\u00a0\u3000\u2028\u2029\u0085\u200b\u1680\x1c\x0b\x0c\ufeff",
    "\u4f60\u597d\u4e16\u754c\u3002\uff0c\u300a\u3400\U00020000\u3007",
    "\u3042\u30ab\u30fc\uff76\u3099\uac00\u1100\u1161",
    "\u0431\u0416\u0451\u03b1\u03a9\u05d0\u05b0\u0645\u064f\u0640",
    "\u0915\u093f\u094d\u0e01\u0e33\u0e48\u0b95\u0bcd",
    "\u0661\u0967\u2167\u00bd\u00b2\u2460\uff11\u3007",
    "\U0001f642\U0001f468\u200d\U0001f469\ufe0f\U0001f1e9\U0001f1ea\U0001f3fd\u2764",
    "\x00\x01\x7f\x9f\u00ad\ue000\uffff\U0010ffff\ufffd",
)
