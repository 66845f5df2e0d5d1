"""Identity of a run's texts, independent of their paths: sizes, and a hash of blocks spread evenly over each file.

Of a store of any size at most 5 MiB are read; a small one is read whole. Another text, other answers or another tokenizer are
noticed; a few tokens changed in the middle of a large store may not be. Of files beside the tokenizer the ids that they lead to count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from megatrain.config.keys import show
from megatrain.config.schema import Config, CorpusConfig
from megatrain.data.boundaries import GENERATION, LARGEST_TOKENIZER, SPECIAL_TOKENS, TOKENIZER_CONFIG, TokenizerError
from megatrain.data.indexed import store_paths
from megatrain.data.samples.sentinels import resolve
from megatrain.data.tokenizer import Tokenizer, load_tokenizer
from megatrain.data.unchanged import blocks
from megatrain.files import opened_plain
from megatrain.untrusted import read_plain

_INDEX_BYTES = 2**20
"""The beginning of an index is also hashed by itself: with the sizes this is the whole identity in earlier releases."""


BESIDE = f"{TOKENIZER_CONFIG}, {SPECIAL_TOKENS} and {GENERATION}"
UNCLEAR = "not clear"


def identity_of(config: Config) -> dict[str, Any]:
    """Identity of the texts, the tokenizer and its special tokens of a config, as plain JSON. Raises OSError and ValueError."""
    data = config.data
    return {
        "data": [_corpus_identity(corpus) for corpus in data.train],
        "valid": [[corpus.set, store_identity(corpus.path)] for corpus in data.valid],
        "tokenizer": data.tokenizer
        if data.tokenizer in (None, "bytes")
        else hash_of(read_plain(data.tokenizer, LARGEST_TOKENIZER)),
        "special": special_tokens(config),
    }


def special_tokens(config: Config) -> dict[str, Any]:
    """Name -> id or ids of the tokens around documents and, with data.objective=glm, of the blanks; {} without a tokenizer.

    Files beside the tokenizer decide some of them; UNCLEAR where they allow several, which no run needs. Raises OSError and ValueError.
    """
    data = config.data
    if data.tokenizer is None:
        return {}
    tokenizer = load_tokenizer(data.tokenizer, data.eod, data.bos)
    blanks = asdict(resolve(data.glm, tokenizer, None)[0]) if data.objective == "glm" else {}
    return {**_end(tokenizer), **_begin(tokenizer), **{f"glm.tokens.{name}": token for name, token in blanks.items()}}


def _end(tokenizer: Tokenizer) -> dict[str, Any]:
    try:
        return {"eod": tokenizer.ending.eod, "stops": list(tokenizer.ending.stops)}
    except TokenizerError:
        return {"eod": UNCLEAR}


def _begin(tokenizer: Tokenizer) -> dict[str, Any]:
    try:
        found = tokenizer.beginning
    except TokenizerError:
        return {"bos": UNCLEAR}
    return {"bos": found.bos, "first": found.first, "opening": list(found.opening)}


def listed(config: Config, identity: dict[str, Any]) -> str:
    """An identity as text, a line for each store, the tokenizer, and each special token."""
    train, valid = config.data.train, config.data.valid
    rows = [(f"data.train[{i}]={of.path}", row[0]) for i, (of, row) in enumerate(zip(train, identity["data"], strict=True))]
    rows += [
        (f"data.train[{i}].answers={of.answers}", row[2])
        for i, (of, row) in enumerate(zip(train, identity["data"], strict=True))
        if of.answers is not None
    ]
    rows += [(f"data.valid[{i}]={of.path}", row[1]) for i, (of, row) in enumerate(zip(valid, identity["valid"], strict=True))]
    rows += [("data.tokenizer", identity["tokenizer"])]
    rows += [
        (f"special token {name} of data.tokenizer={config.data.tokenizer}", value)
        for name, value in identity["special"].items()
    ]
    return "\n".join(f"{name}: {value}" for name, value in rows)


def _corpus_identity(corpus: CorpusConfig) -> list[Any]:
    """[identity of the text, weight], and the identity of the answers if there are any."""
    return [store_identity(corpus.path), corpus.weight, *([] if corpus.answers is None else [store_identity(corpus.answers)])]


def store_identity(prefix: str | Path) -> str:
    """Sizes of index and tokens in bytes, hash of the beginning of the index, hash of the `sampled` blocks of both."""
    tokens, index = store_paths(prefix)
    with opened_plain(index) as file:
        beginning = file.read(_INDEX_BYTES)
    hashes = hash_of(beginning), hash_of(sampled(index) + sampled(tokens))
    return f"{index.stat().st_size}-{tokens.stat().st_size}-{hashes[0]}-{hashes[1]}"


def sampled(path: Path) -> bytes:
    """The contents of a small file, or blocks of a large one: the first, the last, and others evenly between."""
    with opened_plain(path) as file:
        return b"".join(os.pread(file.fileno(), length, at) for at, length in blocks(path.stat().st_size))


def hash_of(data: bytes) -> str:
    """XXH3-128, as 32 digits."""
    return str(xxhash.xxh3_128_hexdigest(data))


def same_store(was: str, now: str) -> bool:
    """Whether two identities are of the same store; an older identity may lack the last hash."""
    parts = was.split("-")
    return now.split("-")[: len(parts)] == parts


def other_corpora(was: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]], corpora: Sequence[CorpusConfig]) -> Iterator[str]:
    """The differences in training data, as text. was, now: identities; corpora: the present ones, for names."""
    if len(was) != len(now):
        yield f"data.train has {len(now)} corpora, and had {len(was)}"
        return
    for number, (before, after, corpus) in enumerate(zip(was, now, corpora, strict=True)):
        name = f"data.train[{number}]"
        if not same_store(before[0], after[0]):
            yield f"{name}={corpus.path} is another text: {before[0]} -> {after[0]}"
        if before[1] != after[1]:
            yield f"{name}.weight: {before[1]} -> {after[1]}"
        if before[0].count("-") == after[0].count("-"):  # older releases did not record answers
            then, here = (row[2] if len(row) > 2 else None for row in (before, after))
            if then != here:
                yield f"{name}.answers={show(corpus.answers)} are others: {show(then)} -> {show(here)}"


def other_terms(was: Any, now: Any) -> Iterator[str]:
    """The differences in how often corpora are seen, as text. was, now: data.train as it is saved, of as many corpora."""
    for number, pair in enumerate(zip(was, now, strict=False)):
        before, after = (corpus if isinstance(corpus, dict) else {} for corpus in pair)
        for name in ("epochs", "max_epochs", "old"):
            if before.get(name) != after.get(name):
                yield f"data.train[{number}].{name}: {show(before.get(name))} -> {show(after.get(name))}"


def other_held_out(was: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> bool:
    """Whether the held-out texts differ. was, now: (set, identity) of each."""
    return len(was) != len(now) or any(a[0] != b[0] or not same_store(a[1], b[1]) for a, b in zip(was, now, strict=True))


def other_special(was: Mapping[str, Any], now: Mapping[str, Any], tokenizer: str | None) -> Iterator[str]:
    """The differences in special tokens, as text; those that only one of the two has do not count. tokenizer: the present one."""
    why = f"by data.eod, data.bos, or {BESIDE} beside it"
    for name in (name for name in now if name in was and was[name] != now[name]):
        yield f"special token {name} of data.tokenizer={tokenizer}: {show(was[name])} -> {show(now[name])}, {why}"
