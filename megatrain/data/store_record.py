"""The record of how a token store was made: `PREFIX.meta.json` beside `.bin` and `.idx`.

    {"tokenizer": "llama/tokenizer.json", "identity": "9f86d0...", "vocab_size": 32000,
     "eod": 2, "eod_token": "</s>", "bos": 1, "bos_token": "<s>", "documents": 1651, "tokens": 8735040}

eod is null if no token ends documents, bos if none begins them. Stores of other programs have no such file, and are assumed to fit the
run's tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from megatrain.config.schema import DataConfig
from megatrain.data import indexed
from megatrain.data.boundaries import NONE, TokenizerError, shown
from megatrain.data.indexed import TokenStore, TokenStoreError, record_path
from megatrain.data.tokenizer import Tokenizer, load_tokenizer
from megatrain.data.tokenizers.fitting import trained_on
from megatrain.files import brief
from megatrain.untrusted import parse_json, read_plain

_LARGEST = 1 << 16
"""Bytes; a record has some three hundred."""


@dataclass(frozen=True)
class StoreRecord:
    """The tokenizer and boundary tokens that a store was made with."""

    tokenizer: str
    """The path that was given, or `bytes`."""
    identity: str
    """Identity of the tokenizer (`Tokenizer.identity`)."""
    vocab_size: int
    eod: int | None
    """The last token of every document; None if there is none."""
    eod_token: str | None
    bos: int | None
    """The first token of every document; None if there is none."""
    bos_token: str | None
    documents: int
    tokens: int

    def text(self) -> str:
        """The contents of the file."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def record_of(tokenizer: Tokenizer, eod: int | None, bos: int | None, documents: int, tokens: int) -> StoreRecord:
    """The record of a store whose documents end in `eod` and begin with `bos`."""
    names = [None if token is None else tokenizer.name_of(token) for token in (eod, bos)]
    made = (tokenizer.label, tokenizer.identity, tokenizer.vocab_size)
    return StoreRecord(*made, eod, names[0], bos, names[1], documents, tokens)


def read_record(store: TokenStore) -> StoreRecord | None:
    """The record of a store; None if it has none. Raises TokenStoreError if it is damaged or of another store."""
    path = record_path(store.prefix)
    try:
        found = parse_json(read_plain(path, _LARGEST))
        record = StoreRecord(**{item.name: found[item.name] for item in fields(StoreRecord)})
        if wrong := [item.name for item in fields(StoreRecord) if _kind(found[item.name]) not in str(item.type).split(" | ")]:
            raise ValueError(f"{wrong[0]} is of another type")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TokenStoreError(
            f"{path}, which says how the store was made, cannot be read ({type(error).__name__}: {brief(error)}). Copy the store again, or "
            "take this file away: the store is then used as it is."
        ) from None
    if (record.documents, record.tokens) != (store.documents, store.tokens):
        raise TokenStoreError(
            f"{path} is of a store of {record.documents:,} documents and {record.tokens:,} tokens, and {store.prefix} has "
            f"{store.documents:,} and {store.tokens:,}. Copy the store again, or take this file away if the store was made otherwise."
        )
    return record


def _kind(value: object) -> str:
    """Type of a JSON value, as annotations name it."""
    return "None" if value is None else type(value).__name__


def describe(prefix: str) -> str:
    """A description of a store's contents and record (`megatrain data inspect`). Raises TokenStoreError."""
    said = indexed.describe(prefix)
    record = read_record(TokenStore(prefix))
    if record is None:
        return said
    begin, end = (
        "nothing" if token is None else f"'{brief(name)}' ({token})"
        for token, name in ((record.bos, record.bos_token), (record.eod, record.eod_token))
    )
    made = (
        f"made with {brief(record.tokenizer)} ({record.vocab_size:,} tokens); each document begins with {begin}, ends in {end}"
    )
    trained = trained_on(record.tokenizer, record.identity)
    return f"{said}\n  {made}" + (f"\n  tokenizer: {brief(trained)}" if trained is not None else "")


def describe_tokenizer(name: str) -> str:
    """A description of a tokenizer (`megatrain data inspect TOKENIZER.json`). Raises TokenizerError."""
    tokenizer = load_tokenizer(name)
    try:
        end = "nothing" if tokenizer.eod is None else f"{shown(tokenizer, (tokenizer.eod,))}, by {tokenizer.ending.origin}"
    except TokenizerError as error:
        end = str(error)
    trained = trained_on(name, tokenizer.identity)
    rows = [
        f"tokenizer {name}",
        f"  vocabulary {tokenizer.vocab_size:,}",
        f"  identity   {tokenizer.identity}",
        f"  a document ends in {end}",
        f"  {brief(trained) if trained is not None else 'what it was trained on is not known'}",
    ]
    return "\n".join(rows)


def require_made_with(store: TokenStore, tokenizer: Tokenizer, data: DataConfig, eos: int | None = None) -> None:
    """Raise TokenStoreError if a store was made with another tokenizer than the run's, or with other tokens around documents.

    eos: GLM's token, which then ends documents. A store without boundary tokens fits, unless the config asks for them.
    """
    record = read_record(store)
    if record is None:
        return
    if record.identity != tokenizer.identity:
        raise TokenStoreError(
            f"{store.prefix} was made with the tokenizer {record.tokenizer} of {record.vocab_size:,} tokens, and data.tokenizer="
            f"{tokenizer.label} is another one, of {tokenizer.vocab_size:,}. Use data.tokenizer={record.tokenizer}, or tokenize the "
            "text again."
        )
    if record.eod is not None or data.eod not in (None, NONE):
        expected = tokenizer.eod if eos is None else eos
        key = "data.eod" if data.glm.tokens.eos is None or eos is None else "data.glm.tokens.eos"
        _require_same(store, tokenizer, "end in", key, record.eod, expected)
    if record.bos is not None or data.bos not in (None, NONE):
        _require_same(store, tokenizer, "begin with", "data.bos", record.bos, tokenizer.beginning.first)


def _require_same(
    store: TokenStore, tokenizer: Tokenizer, where: str, key: str, made: int | None, expected: int | None
) -> None:
    if made == expected:
        return
    was, now = (
        f"the token {shown(tokenizer, (token,))}" if token is not None else "no token of their own"
        for token in (made, expected)
    )
    option = "--bos" if key == "data.bos" else "--eod"
    name = NONE if expected is None else tokenizer.name_of(expected)
    raise TokenStoreError(
        f"the documents of {store.prefix} {where} {was}, and by {key} of this run they would {where} {now}. Use "
        f"{key}={NONE if made is None else made}, or tokenize the text again with {option} '{name}'."
    )
