"""The last passes: a vocabulary of the documents that stay, where one is asked for, and token stores, one for each source and split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from megatrain.corpus.prepare_config import OutputConfig, TokenizeConfig
from megatrain.corpus.report.unit_audit import Audit
from megatrain.corpus.shards import documents_of
from megatrain.data.origins import origin_of
from megatrain.data.prepare.text_store import TextStoreWriter, TokenizeReport
from megatrain.data.tokenizer import Tokenizer, load_tokenizer
from megatrain.data.tokenizers.engine import encode_with
from megatrain.data.tokenizers.fitting import train_tokenizer

Progress = Callable[[int], None]
TOKENIZER, STORE = "tokenizer.json", "store"
"""Files of the two passes; the second is a prefix."""


def learn(shards: Callable[[], Iterable[Path]], size: int, sample: int, folder: Path, progress: Progress) -> Mapping[str, Any]:
    """Train a tokenizer of `size` entries on at most `sample` bytes of documents."""
    entries = train_tokenizer(list(shards()), size, folder / TOKENIZER, sample=sample)
    progress(1)
    return {"entries": entries}


def store(
    source: str,
    shards: Callable[[], Iterable[Path]],
    tokenizer: Callable[[], str | Path],
    settings: tuple[TokenizeConfig, OutputConfig],
    folder: Path,
    progress: Progress,
) -> Mapping[str, Any]:
    """Write the token store of documents of a source; the audit, and how much is in it. Without documents there is no store."""
    tokenize, output = settings
    audit = Audit(output.seed, output.examples, output.sheet)

    def write(encoder: Tokenizer) -> TokenizeReport:
        with TextStoreWriter(folder / STORE, encoder, tokenize.threads, tokenize.append_eod) as tokens:
            for document in chain.from_iterable(map(documents_of, shards())):
                tokens.add_document(document.text, origin_of(document.file, document.at))
                progress(len(document.text))
        return tokens.report

    report, _ = encode_with(load_tokenizer(tokenizer()), tokenize.engine, write)
    audit.tokenized(source, report.text_bytes, report.tokens)
    return {"audit": audit.as_json(), "documents": report.documents, "tokens": report.tokens, "bytes": report.text_bytes}
