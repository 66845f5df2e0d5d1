"""From a token of a store back to its document, and to the file and row that it comes from (`megatrain data inspect PREFIX --token N`)."""

from __future__ import annotations

from megatrain.data.boundaries import TokenizerError
from megatrain.data.indexed import TokenStore, TokenStoreError, origins_path
from megatrain.data.origins import FilePlace, read_origin
from megatrain.data.prepare.read import CHUNK_BYTES
from megatrain.data.store_record import read_record
from megatrain.data.tokenizer import Tokenizer, load_tokenizer
from megatrain.files import opened_plain

SHOWN = 64
"""Tokens shown of a document."""
FARTHEST = 1 << 32
"""Bytes of a file before a document that are read to tell its line."""


def describe_token(prefix: str, token: int) -> str:
    """The document, file and row of the token at a place of a store, and what stands around it. Raises TokenStoreError."""
    store = TokenStore(prefix)
    if token >= store.tokens:
        raise TokenStoreError(_outside(prefix, "token", token, store.tokens))
    document = store.document_of(token)
    first, end = store.document_bounds(document)
    tokenizer = tokenizer_of(store)
    value = int(store.read(token, token + 1)[0])
    named = f" {tokenizer.name_of(value)!r}" if tokenizer is not None and value < tokenizer.vocab_size else ""
    said = f"  token {token:,} of the store, {token - first:,} of the document: {value}{named}"
    around = max(first, token - SHOWN // 2), min(end, token + SHOWN // 2)
    return "\n".join([*_document_rows(store, document), said, _shown(store, tokenizer, *around)])


def describe_document(prefix: str, document: int) -> str:
    """The file and row of a document of a store, and its beginning. Raises TokenStoreError."""
    store = TokenStore(prefix)
    if document >= store.documents:
        raise TokenStoreError(_outside(prefix, "document", document, store.documents))
    first, end = store.document_bounds(document)
    return "\n".join([*_document_rows(store, document), _shown(store, tokenizer_of(store), first, min(end, first + SHOWN))])


def _document_rows(store: TokenStore, document: int) -> list[str]:
    first, end = store.document_bounds(document)
    place = read_origin(store, document)
    source = (
        f"from {place}{_line(place)}"
        if place is not None
        else f"from where is not known: there is no {origins_path(store.prefix)}"
    )
    tokens = f"tokens {first:,} to {end - 1:,} ({end - first:,})" if end > first else "no tokens"
    return [f"document {document:,} of {store.prefix}: {tokens}", f"  {source}"]


def _line(place: FilePlace) -> str:
    """The line of a byte in words, where the file is at hand, not packed, and a line begins there."""
    if place.unit != "byte" or place.at > FARTHEST or place.file.lower().endswith((".gz", ".zst")):
        return ""
    number, left, last = 1, place.at, b""
    try:
        with opened_plain(place.file) as file:
            while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                number, left, last = number + chunk.count(b"\n"), left - len(chunk), chunk[-1:]
    except OSError:
        return ""
    return f", line {number:,}" if not left and last in (b"", b"\n") else ""


def _shown(store: TokenStore, tokenizer: Tokenizer | None, first: int, end: int) -> str:
    """Tokens first .. end - 1, as text where the tokenizer is at hand."""
    ids = store.read(first, end).tolist()
    if tokenizer is None:
        return f"  ids {ids}"
    return f"  text {tokenizer.decode(i for i in ids if 0 <= i < tokenizer.vocab_size)!r}"


def tokenizer_of(store: TokenStore) -> Tokenizer | None:
    """The tokenizer that made a store, where it still is what it was."""
    record = read_record(store)
    try:
        tokenizer = None if record is None else load_tokenizer(record.tokenizer)
    except TokenizerError:
        return None
    return tokenizer if tokenizer is not None and record is not None and tokenizer.identity == record.identity else None


def _outside(prefix: str, what: str, number: int, count: int) -> str:
    if not count:
        return f"{prefix} has no {what}s."
    return f"{prefix} has {what}s 0..{count - 1}, and no {what} {number}."
