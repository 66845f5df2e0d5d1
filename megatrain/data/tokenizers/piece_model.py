"""SentencePiece's models (`tokenizer.model`: LLaMA 2, T5, Gemma), BPE and Unigram, encoded by its own library (extra `sentencepiece`).

Normalisation, the blank before the first word, and bytes for unknown characters are those of the model, so decode(encode(text)) is the
text that the model sees, not always the one that was given. Control tokens in text stay text; user-defined ones are found in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.data.boundaries import FromFile, NamedToken, TokenizerError, TokenRequest
from megatrain.data.indexed import best_dtype
from megatrain.data.stream import begun
from megatrain.data.tokenizers.token_ids import EncodedTexts
from megatrain.files import brief


def is_model(data: bytes) -> bool:
    """Whether a file begins with a piece, as a model does; a line end begins a text as well."""
    return data.startswith(b"\x0a") and not data.lstrip().startswith(b"{")


class PieceTokenizer(FromFile):
    """A model of SentencePiece as a tokenizer."""

    divisible = False

    def __init__(self, data: bytes, path: Path, eod: TokenRequest = None, bos: TokenRequest = None) -> None:
        """data: the file. eod, bos: the tokens asked for. Raises TokenizerError."""
        self._model, self._ids = _loaded(data, path)
        self.vocab_size = int(self._model.get_piece_size())
        self.label = str(path)
        self.identity = f"sentencepiece {hashlib.sha256(data).hexdigest()}"
        self._dtype = best_dtype(self.vocab_size)
        super().__init__(path.parent, eod, bos)

    def special_id(self, name: str) -> int | None:
        """Id of a control token of the model; None if it has none of this name."""
        found = self.id_of(name)
        return found if found is not None and self._model.is_control(found) else None

    @cached_property
    def named_tokens(self) -> Sequence[NamedToken]:
        """Control tokens."""
        return [NamedToken(name, token) for name, token in self._ids.items() if self._model.is_control(token)]

    def id_of(self, name: str) -> int | None:
        """Id of a token of the model; None if it has none of this name."""
        return self._ids.get(name)

    def name_of(self, token: int) -> str:
        """The token of this id, as in the model."""
        return str(self._model.id_to_piece(token)) if 0 <= token < self.vocab_size else "None"

    def template(self) -> tuple[int, ...]:
        """No tokens: a model adds none by itself."""
        return ()

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return list(self._model.encode(text))

    encode_inside = encode

    def encode_batch(self, texts: Sequence[str]) -> EncodedTexts:
        """Ids of texts."""
        arrays = [np.array(ids, self._dtype) for ids in self._model.encode(list(texts), num_threads=1)]
        return EncodedTexts(np.concatenate(arrays), np.array([array.size for array in arrays], np.int64))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, names of control tokens included; ids that the model lacks become nothing."""
        known = [token for token in map(int, ids) if 0 <= token < self.vocab_size]
        runs = groupby(known, self._model.is_control)
        return "".join("".join(map(self.name_of, run)) if control else self._model.decode(list(run)) for control, run in runs)

    def unfinished(self, ids: Sequence[int]) -> int:
        """The number of last bytes that begin a character: the library makes a replacement character of each."""
        known = (token for token in map(int, reversed(ids)) if 0 <= token < self.vocab_size)
        return begun(bytes((int(self.name_of(token)[1:-1], 16),)) if self._model.is_byte(token) else b"" for token in known)


def _loaded(data: bytes, path: Path) -> tuple[Any, dict[str, int]]:
    """(the model, its pieces and their ids). Raises TokenizerError."""
    try:
        from sentencepiece import SentencePieceProcessor  # noqa: PLC0415  an extra
    except ImportError:
        raise TokenizerError(
            f"{path} is a model of SentencePiece, which needs it: pip install 'megatrain[sentencepiece]'"
        ) from None
    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
        model.encode("a \u4f60\U0010fffd")  # some can only be loaded
        model.decode(list(range(model.get_piece_size())))
        if not 0 <= model.unk_id() < model.get_piece_size():
            raise ValueError("it has no token for unknown characters")
        names = {model.id_to_piece(token): token for token in range(model.get_piece_size())}  # some pieces are not UTF-8
    except Exception as error:  # the library raises RuntimeError, and others
        raise TokenizerError(f"{path} is not a model of SentencePiece: {brief(error)}.") from None
    return model, names
