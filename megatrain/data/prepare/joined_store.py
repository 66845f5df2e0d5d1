"""Token stores one behind the other as one store, as if its documents had been encoded by one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatrain.data.indexed import TokenStore, TokenStoreError, TokenStoreWriter
from megatrain.data.origins import OriginsWriter
from megatrain.data.store_record import read_record

CHUNK_TOKENS = 1 << 20


def join_stores(prefixes: Sequence[str | Path], output: str | Path) -> None:
    """Write the documents of stores, in order, with their record and origins, to the store `output`.

    All are made with one tokenizer, by `TextStoreWriter`. Raises TokenStoreError and OSError.
    """
    stores = [TokenStore(prefix) for prefix in prefixes]
    records = [read_record(store) for store in stores]
    first, origins = records[0], OriginsWriter()
    with TokenStoreWriter(output, stores[0].dtype) as writer:
        for store, record in zip(stores, records, strict=True):
            if record is None or first is None or record.identity != first.identity:
                raise TokenStoreError(f"{store.prefix} was not made with the tokenizer of {stores[0].prefix}.")
            for begin in range(0, store.tokens, CHUNK_TOKENS):
                writer.write(store.read(begin, min(begin + CHUNK_TOKENS, store.tokens)))
            writer.end_documents(store.document_lengths())
            origins.add_store(store)
        if first is not None:
            writer.record = replace(first, documents=writer.documents, tokens=writer.tokens).text()
        writer.origins = origins.contents(writer.tokens)
