"""The last passes: a vocabulary of the documents that stay, where one is asked for; token stores of each unit; and of them one for each
source and split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatrain.corpus import keeping
from megatrain.corpus.prepare_config import OutputConfig, TokenizeConfig
from megatrain.corpus.report.unit_audit import Audit
from megatrain.corpus.shards import documents_of
from megatrain.data.origins import origin_of
from megatrain.data.prepare.joined_store import join_stores
from megatrain.data.prepare.text_store import TextStoreWriter, TokenizeReport
from megatrain.data.tokenizer import Tokenizer, load_tokenizer
from megatrain.data.tokenizers.fast_engine import encode_with
from megatrain.data.tokenizers.fitting import train_tokenizer

Progress = Callable[[int], None]
TOKENIZER, STORE = "tokenizer.json", "store"
"""Files of the first pass and the last; the second is a prefix."""


def learn(shards: Callable[[], Iterable[Path]], size: int, sample: int, folder: Path, progress: Progress) -> Mapping[str, Any]:
    """Train a tokenizer of `size` entries on at most `sample` bytes of documents."""
    entries = train_tokenizer(list(shards()), size, folder / TOKENIZER, sample=sample)
    progress(1)
    return {"entries": entries}


def encode(
    shards: Mapping[keeping.Split, Callable[[], Path]],
    tokenizer: Callable[[], str | Path],
    tokenize: TokenizeConfig,
    folder: Path,
    progress: Progress,
) -> Mapping[str, Any]:
    """Write the token stores of a unit, one for each split, under its name; how much is in them. Without documents there is none."""
    encoder = load_tokenizer(tokenizer(), tokenize.eod, tokenize.bos)
    facts: dict[str, Any] = {}
    for split, shard in shards.items():
        report, _ = encode_with(encoder, tokenize.engine, partial(_write, shard(), folder / split, tokenize, progress))
        facts[split] = {"documents": report.documents, "tokens": report.tokens, "bytes": report.text_bytes}
    return facts


def _write(shard: Path, prefix: Path, tokenize: TokenizeConfig, progress: Progress, encoder: Tokenizer) -> TokenizeReport:
    """Write the store of a shard."""
    with TextStoreWriter(prefix, encoder, tokenize.threads, tokenize.append_eod) as tokens:
        for document in documents_of(shard):
            tokens.add_document(document.text, origin_of(document.file, document.at))
            progress(len(document.text))
    return tokens.report


def store(
    source: str,
    parts: Callable[[], Sequence[tuple[Path | None, Mapping[str, int]]]],
    output: OutputConfig,
    folder: Path,
    progress: Progress,
) -> Mapping[str, Any]:
    """Write the token store of a source and split: the stores of its units, in order; the audit, and how much is in it.

    parts: of each unit the prefix of its store, None where it has none, and how much is in that.
    """
    audit, found = Audit(output.seed, output.examples, output.sheet), parts()
    sums = {name: sum(facts[name] for _, facts in found) for name in ("documents", "tokens", "bytes")}
    prefixes = [prefix for prefix, _ in found if prefix is not None]
    if prefixes:
        join_stores(prefixes, folder / STORE)
    progress(1)
    audit.tokenized(source, sums["bytes"], sums["tokens"])
    return {"audit": audit.as_json(), **sums}
