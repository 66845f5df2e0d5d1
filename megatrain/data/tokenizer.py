"""Text to token ids and back: bytes, or a `tokenizer.json` of the `tokenizers` library.

Text is taken literally. A document that contains the characters `<|endoftext|>` gets the ids of those characters, never the
document separator, so text cannot forge a boundary, and decode(encode(text)) is the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer

from megatrain.data.boundaries import (
    END_OF_TEXT,
    LARGEST_TOKENIZER,
    Beginning,
    Ending,
    FromFile,
    NamedToken,
    TokenizerError,
    TokenRequest,
    find_beginning,
    find_ending,
)
from megatrain.data.indexed import best_dtype
from megatrain.data.stream import MOST_BEGUN, REPLACEMENT, begun
from megatrain.data.tokenizers import rank_file
from megatrain.data.tokenizers.piece_model import PieceTokenizer, is_model
from megatrain.data.tokenizers.token_ids import EncodedTexts
from megatrain.files import HEAD_BYTES, brief, not_text
from megatrain.untrusted import parse_json, read_plain

BYTE_VALUES = 256
_MOST_BRACKETS = 1 << 21
"""Most brackets of a tokenizer.json, in which each merge and each piece is a list of two."""
_MOST_GAPS = 1 << 20
"""Most ids below the largest that no token has."""
LONG_TEXT = 10_000
"""Characters of a text that is encoded without the interpreter's lock: some 10 ms."""
SMALLEST_VOCAB = BYTE_VALUES + 1
"""Smallest vocabulary: every byte, so that any text can be encoded, and the document separator."""


PROBE = " Hello World's  42,000\n\tx+=1; \u00c9t\u00e9 \u4f60\u597d \U0001f642"
"""A text that tokenizers with the same vocabulary but other rules encode differently."""


class Tokenizer(Protocol):
    """The functions of a tokenizer that megatrain uses."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def label(self) -> str:
        """The tokenizer's name in messages."""

    @property
    def identity(self) -> str:
        """Text that is equal for tokenizers that encode every text alike."""

    @property
    def ending(self) -> Ending:
        """The tokens that end a document. Raises TokenizerError if several are possible."""

    @property
    def beginning(self) -> Beginning:
        """The tokens that begin a document. Raises TokenizerError if the files beside the tokenizer name a token that it lacks."""

    @property
    def eod(self) -> int | None:
        """Id of the token that ends a document; None if the tokenizer has none. Raises TokenizerError as `ending` does."""

    @property
    def divisible(self) -> bool:
        """Whether text may be cut before a blank or a newline that follows a visible character without changing any id."""

    @property
    def named_tokens(self) -> Sequence[NamedToken]:
        """Special tokens, and others that are found in text as they are."""

    def special_id(self, name: str) -> int | None:
        """Id of the special token of this name; None if there is none."""

    def name_of(self, token: int) -> str:
        """The name of a token."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text behind a special token: some tokenizers put a blank before the first word of a text alone."""

    def encode_batch(self, texts: Sequence[str]) -> EncodedTexts:
        """Ids of texts, in the dtype of a token store."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become replacement characters."""

    def unfinished(self, ids: Sequence[int]) -> int:
        """How many replacement characters at the end of decode(ids) stand for a character that has begun and may yet become whole."""


def prompt_ids(codec: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The ids of a text as those of a prompt: after what opens a text, put once. A text without ids is the token that ends the one before
    it, or begins one; [] if neither is known."""
    found = codec.beginning.before(ids)
    if not found:
        start = codec.beginning.bos if codec.eod is None else codec.eod
        found = [] if start is None else [start]
    return found


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8, 256 ends a document."""

    vocab_size = SMALLEST_VOCAB
    divisible = True
    label = identity = "bytes"
    named_tokens = (NamedToken(END_OF_TEXT, BYTE_VALUES),)

    def __init__(self, eod: TokenRequest = None, bos: TokenRequest = None) -> None:
        self.ending, self.beginning = find_ending(self, None, eod), find_beginning(self, None, bos)
        self.eod = self.ending.eod

    def special_id(self, name: str) -> int | None:
        """The id of the end of a document, the only token with a name."""
        return BYTE_VALUES if name == END_OF_TEXT else None

    id_of = special_id

    def name_of(self, token: int) -> str:
        """The name of the end of a document, or of a byte: <0x0A>."""
        return END_OF_TEXT if token == BYTE_VALUES else f"<0x{token:02X}>"

    def template(self) -> tuple[int, ...]:
        """No tokens: nothing is added before a text."""
        return ()

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    encode_inside = encode

    def encode_batch(self, texts: Sequence[str]) -> EncodedTexts:
        """The bytes of texts, uint16."""
        parts = [text.encode() for text in texts]
        ids = np.frombuffer(b"".join(parts), np.uint8).astype("<u2")
        return EncodedTexts(ids, np.array([len(part) for part in parts], np.int64))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes; document ends become `<|endoftext|>`, ids beyond (of a padded vocabulary) nothing."""
        parts = [END_OF_TEXT.encode() if i == BYTE_VALUES else bytes((i,)) for i in ids if i <= BYTE_VALUES]
        return b"".join(parts).decode(errors="replace")

    def unfinished(self, ids: Sequence[int]) -> int:
        """1 if the last bytes begin a character, else 0."""
        return int(begun(bytes((i,)) if i < BYTE_VALUES else b"" for i in reversed(ids) if i <= BYTE_VALUES) > 0)


class JsonTokenizer(FromFile):
    """A tokenizer of the `tokenizers` library. Truncation, padding and the tokens that the file adds to texts are switched off; tokens
    around documents are `beginning` and `ending`."""

    def __init__(
        self,
        library: LibraryTokenizer,
        label: str = "the tokenizer",
        folder: Path | None = None,
        eod: TokenRequest = None,
        bos: TokenRequest = None,
    ) -> None:
        """folder: directory of other tokenizer files; eod, bos: the tokens asked for. Raises TokenizerError."""
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # True: special tokens found in text are encoded as text
        if getattr(library.model, "dropout", None) is not None:
            library.model.dropout = None  # random merges would make every store different
        self._library = library
        # Ids may have gaps: the size is the largest id plus one.
        ids = library.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=0) + 1
        if self.vocab_size - len(ids) > _MOST_GAPS:
            raise TokenizerError(
                f"{label} has {len(ids):,} tokens, and the id {self.vocab_size - 1:,}: no model has so many rows."
            )
        self.label = label
        description = self.description()
        self.divisible = _divisible(description)
        self._dtype = best_dtype(self.vocab_size)
        self._byte_tokens = _byte_tokens(description)
        self._letters = bytes_of_letters() if "ByteLevel" in _decoders(description) else {}
        self._special = {str(token.content): int(n) for n, token in library.get_added_tokens_decoder().items() if token.special}
        super().__init__(folder, eod, bos)

    def description(self) -> dict[str, Any]:
        """The tokenizer.json, made anew: of a large vocabulary it takes a hundred megabytes."""
        return dict(json.loads(self._library.to_str()))

    @cached_property
    def identity(self) -> str:
        """A hash of everything that determines ids, independent of how the file was written."""
        return _identity(self.description(), self.encode(PROBE))

    def special_id(self, name: str) -> int | None:
        """Id of a special token of the file; None if it has none of this name."""
        return self._special.get(name)

    def id_of(self, name: str) -> int | None:
        """Id of a token of the file; None if it has none of this name."""
        found: int | None = self._library.token_to_id(name)
        return found

    def name_of(self, token: int) -> str:
        """The token of this id, as in the file."""
        return str(self._library.id_to_token(token))

    def to_json(self) -> str:
        """The whole tokenizer.json."""
        return str(self._library.to_str(pretty=True))

    def template(self) -> tuple[int, ...]:
        """The tokens that the file adds before a text; () if it adds any after it."""
        before, behind = self.added("x")
        return () if behind else before

    def added(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that the file adds before a text and after it."""
        plain, whole = (self._library.encode(text, add_special_tokens=added).ids for added in (False, True))
        first = next((n for n in range(len(whole) - len(plain) + 1) if plain and whole[n : n + len(plain)] == plain), 0)
        return (tuple(whole[:first]), tuple(whole[first + len(plain) :])) if plain else ((), ())

    @cached_property
    def named_tokens(self) -> Sequence[NamedToken]:
        """The file's added tokens."""
        tokens = self._library.get_added_tokens_decoder().items()
        return [NamedToken(str(it.content), int(n), it.special, it.lstrip, it.rstrip) for n, it in tokens if it.content]

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return _ids(self._library, text)

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text behind a special token."""
        return _ids(self._inside, text)

    @cached_property
    def _inside(self) -> LibraryTokenizer:
        """The library's tokenizer; one that puts a blank before the first word of a whole text, as Mistral's, without that."""
        description = self.description()
        words = description.get("pre_tokenizer") or {}
        first = [part for part in (words, *words.get("pretokenizers", ())) if part.get("prepend_scheme") == "first"]
        for part in first:
            part["prepend_scheme"] = "never"
        if not first:
            return self._library
        library = LibraryTokenizer.from_str(json.dumps(description))
        library.encode_special_tokens = True
        return library

    def encode_batch(self, texts: Sequence[str]) -> EncodedTexts:
        """Ids of texts. The library releases the interpreter's lock meanwhile."""
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays = [np.array(encoding.ids, dtype=self._dtype) for encoding in encodings]
        return EncodedTexts(np.concatenate(arrays), np.array([array.size for array in arrays], np.int64))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens included; ids that the file lacks become nothing."""
        tokens = [token for token in map(self._library.id_to_token, ids) if token is not None]
        decoder = self._library.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(_whole_characters(tokens, self._byte_tokens)))

    def unfinished(self, ids: Sequence[int]) -> int:
        """1 if the last bytes begin a character, else 0; only tokens of bytes, or of GPT-2's letters for them, do."""
        tokens = map(self._library.id_to_token, reversed(ids))
        return int(begun(self._bytes_of(token) for token in tokens if token is not None) > 0)

    def _bytes_of(self, token: str) -> bytes:
        """The bytes that a token stands for, b"" if it is of whole characters."""
        value = self._byte_tokens.get(token)
        letters = [self._letters.get(letter) for letter in token[-MOST_BEGUN:]]
        spelled = b"" if None in letters else bytes(byte for byte in letters if byte is not None)
        return spelled if value is None else bytes((value,))


def _ids(library: LibraryTokenizer, text: str) -> list[int]:
    """Ids of a text. Of a long one other threads hear nothing while it is encoded alone: a batch is without the interpreter's lock."""
    if len(text) < LONG_TEXT:
        return list(library.encode(text, add_special_tokens=False).ids)
    (found,) = library.encode_batch_fast([text], add_special_tokens=False)
    return list(found.ids)


def _byte_tokens(description: dict[str, Any]) -> dict[str, int]:
    """Tokens that the decoder takes for single bytes -> their values."""
    fallback = "ByteFallback" in _decoders(description)
    return {f"<0x{value:02X}>": value for value in range(BYTE_VALUES)} if fallback else {}


def _decoders(description: dict[str, Any]) -> set[str]:
    """The kinds of decoders that a tokenizer.json names."""
    decoder = description.get("decoder") or {}
    return {str(part.get("type")) for part in (decoder, *decoder.get("decoders", ()))}


def bytes_of_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others are numbered from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(BYTE_VALUES) if value not in plain]
    return {chr(value): value for value in plain} | {chr(BYTE_VALUES + n): value for n, value in enumerate(others)}


def _whole_characters(tokens: list[str], byte_tokens: Mapping[str, int]) -> list[str]:
    """The tokens with each byte that belongs to no whole character replaced by U+FFFD.

    The library's decoder replaces a whole run of bytes, so that one incomplete character would spoil all characters before it.
    """
    whole: list[str] = []
    for is_byte, run in groupby(tokens, byte_tokens.__contains__):
        if not is_byte:
            whole += run
            continue
        for character in bytes(byte_tokens[token] for token in run).decode(errors="replace"):
            whole += [character] if character == REPLACEMENT else [f"<0x{value:02X}>" for value in character.encode()]
    return whole


def _identity(description: dict[str, Any], probe: list[int]) -> str:
    """A hash of a tokenizer's vocabulary in the order of ids, merges and special tokens, and of its ids for a probe text."""
    model = description["model"]
    vocab = model.get("vocab", {})
    entries = sorted(vocab.items(), key=lambda entry: entry[1]) if isinstance(vocab, dict) else vocab
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())]
    added = [(token["id"], token["content"]) for token in description.get("added_tokens", ())]
    return hashlib.sha256(json.dumps([entries, merges, added, probe]).encode()).hexdigest()


def _divisible(description: dict[str, Any]) -> bool:
    """Whether the tokenizer is of GPT-2's kind, whose words never extend from a visible character into the white space after it.

    Other pre-tokenizers (SentencePiece's, GPT-4's, whose punctuation includes following newlines) and normalisers give no such guarantee.
    """
    words = description.get("pre_tokenizer") or {}
    gpt2 = words.get("type") == "ByteLevel" and not words.get("add_prefix_space") and words.get("use_regex", True)
    literal = all(token.get("special") for token in description.get("added_tokens", []))
    return bool(gpt2 and literal and description.get("normalizer") is None)


def load_tokenizer(name: str | Path, eod: TokenRequest = None, bos: TokenRequest = None) -> Tokenizer:
    """Load `bytes`, or the file at a path: a tokenizer.json, a rank file of tiktoken, or a model of SentencePiece, told by its contents.

    eod, bos: tokens that end and begin a document; None: to be found. Raises TokenizerError.
    """
    if str(name) == "bytes":
        return ByteTokenizer(eod, bos)
    path = Path(name)
    try:
        data = read_plain(path, LARGEST_TOKENIZER)
    except ValueError as error:
        raise TokenizerError(f"{path} is not a tokenizer.json: {error}.") from None
    except OSError as error:
        raise TokenizerError(
            f"the tokenizer {path} cannot be read ({error.strerror}). Give `bytes` or the path of a tokenizer.json; "
            f"`megatrain data tokenizer --input FILE... --vocab-size 8192 --output {path}` trains one."
        ) from None
    if rank_file.is_rank_file(data):
        return JsonTokenizer(rank_file.library_of(data, path), str(path), path.parent, eod, bos)
    if is_model(data):
        return PieceTokenizer(data, path, eod, bos)
    return JsonTokenizer(_library_of(data, path), str(path), path.parent, eod, bos)


def _library_of(data: bytes, path: Path) -> LibraryTokenizer:
    """The tokenizer of a tokenizer.json. Raises TokenizerError."""
    if problem := not_text(data[:HEAD_BYTES]):
        raise TokenizerError(f"{path} is not a tokenizer.json: {problem}")
    try:
        text = data.decode("utf-8-sig")
        parse_json(text, _MOST_BRACKETS, unique=False)
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not a tokenizer.json: it is not UTF-8 text ({error}).") from None
    except ValueError as error:
        where = f"line {error.lineno} is not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else str(error)
        raise TokenizerError(f"{path} is not a tokenizer.json: {where}.") from None
    try:
        library = LibraryTokenizer.from_str(text)
        library.encode(PROBE)  # some can only be loaded
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and where it panics, no Exception at all
        raise TokenizerError(f"{path} is JSON, but not a tokenizer of the `tokenizers` library: {brief(error)}") from None
    return library
