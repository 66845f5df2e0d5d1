"""The samples and batches that a config's `data` section trains and evaluates on, by `data.objective`.

next_token    seq_length + 1 tokens; each is predicted from those before it
glm           text_length tokens; blanks are predicted from the text around them (docs/glm.md)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatrain.config.schema import Config, CorpusConfig, DataConfig
from megatrain.data.blended import BlendedSamples, CorpusSamples
from megatrain.data.draws import Draws
from megatrain.data.held_out import Evaluated, HeldOut, build_held_out
from megatrain.data.indexed import TokenStore, record_path
from megatrain.data.loader import Batch, Compose, isolated_documents, next_token
from megatrain.data.samples.glm import KINDS, Drawn, GlmBatches, Plan, assembled
from megatrain.data.samples.gpt import GptSamples
from megatrain.data.samples.infilling import InfillingText
from megatrain.data.samples.pairs import PairSamples
from megatrain.data.samples.sentinels import resolve, sentence_ends
from megatrain.data.store_record import require_made_with
from megatrain.data.terms import endless, terms_of
from megatrain.data.tokenizer import Tokenizer

LOOKED_AT = 1024
"""Number of documents of a store that are checked for whether they end in eos."""
HELD_OUT = 13
"""Part of the key of a stream of random numbers: blanks of held-out text."""


@dataclass(frozen=True)
class Source:
    """Turns text into batches, for one objective."""

    compose: Compose
    sample_length: int
    """Tokens of a sample, without the one that it shares with the next."""
    text_vocab: int
    """Number of ids that text may have, from 0; larger ids are special tokens."""
    validation: Callable[[HeldOut], dict[str, Evaluated]]
    """Function: held-out text -> the validation sets made of it, by name."""


def source_of(config: Config, vocab_size: int, tokenizer: Tokenizer | None, *, closed: bool = True) -> Source:
    """The source of a config. closed: whether documents of its stores end in eos. Raises ValueError if no text fits."""
    data, seq_length = config.data, config.model.seq_length
    if data.objective == "next_token":
        compose = isolated_documents if data.isolate_documents else next_token
        return Source(compose, seq_length, vocab_size, lambda held_out: {"": held_out})
    ids, text_vocab = resolve(data.glm, tokenizer, vocab_size)
    needed = data.glm.objective_mix.sentence > 0 or data.glm.short_seq_prob > 0
    ends = (
        sentence_ends(tokenizer, vocab_size, data.glm.sentence.end_chars, ids.eos) if tokenizer is not None and needed else None
    )
    plan = Plan(
        data.glm,
        ids,
        seq_length,
        config.train.seed,
        ends,
        data.isolate_documents,
        config.model.two_dimensional,
        closed,
        data.has_answers,
    )
    if plan.text_length < 8:
        raise ValueError(
            f"model.seq_length={seq_length} leaves room for {plan.text_length} tokens of text beside the sentinels of its blanks. "
            "Use model.seq_length=64 or more."
        )
    return Source(GlmBatches(plan), plan.text_length - 1, text_vocab, lambda held_out: _by_objective(held_out, plan))


def open_sources(
    config: Config, vocab_size: int, tokenizer: Tokenizer | None, *, train: bool = True
) -> tuple[Source, BlendedSamples | None, dict[str, Evaluated]]:
    """The source of a config, its training samples (None unless `train`), and its validation sets by name.

    Raises TokenStoreError (missing or damaged store, too short, ids out of range) and ValueError.
    """
    data = config.data
    eos = resolve(data.glm, tokenizer, vocab_size)[0].eos if data.objective == "glm" else None
    if tokenizer is not None:
        _require_made_with((*(data.train if train else ()), *data.valid), tokenizer, data, eos)
    texts = (*(data.train if train else ()), *data.valid)
    paths = [corpus.path for corpus in texts if corpus.answers is None]
    closed = eos is None or _closed(paths, eos)
    source = source_of(config, vocab_size, tokenizer, closed=closed)
    samples = None
    if train:
        corpora = _open_corpora(data.train, source.sample_length, config.train.seed, data.cache_dir, source.text_vocab)
        samples = BlendedSamples(corpora, terms_of(config, [corpus.samples_per_epoch for corpus in corpora]))
    isolate = data.isolate_documents or data.objective == "glm"
    sets = build_held_out(data.valid, source.sample_length, source.text_vocab, isolate)
    validation = {
        _set_name(name, kind): of for name, held_out in sets.items() for kind, of in source.validation(held_out).items()
    }
    return source, samples, validation


def _require_made_with(corpora: Sequence[CorpusConfig], tokenizer: Tokenizer, data: DataConfig, eos: int | None) -> None:
    """Raise TokenStoreError if a store was made with another tokenizer, or with other tokens around its documents."""
    for path in (path for corpus in corpora for path in (corpus.path, corpus.answers)):
        if path is not None and record_path(path).exists():
            require_made_with(TokenStore(path), tokenizer, data, eos)


def _set_name(name: str, kind: str) -> str:
    return f"{name}_{kind}" if name and kind else name or kind


def _closed(paths: Sequence[str], eos: int) -> bool:
    """Whether documents end in eos, from the first of each store. Raises ValueError if some do and some do not."""
    ended: dict[bool, str] = {}
    for path in paths:
        store = TokenStore(path)
        for number in range(min(store.documents, LOOKED_AT)):
            first, end = store.document_bounds(number)
            if end > first:
                ended.setdefault(bool(store.read(end - 1, end)[0] == eos), path)
    if len(ended) > 1:
        raise ValueError(
            f"documents of {ended[True]} end in the token {eos}, and some of {ended[False]} do not. Tokenize all with --append-eod, "
            "or all without."
        )
    return False not in ended


def _by_objective(held_out: HeldOut, plan: Plan) -> dict[str, Evaluated]:
    """Held-out text with the blanks of each objective that the mix has, by objective."""
    mix = plan.config.objective_mix
    return {kind: GlmHeldOut(held_out, plan, number) for number, kind in enumerate(KINDS) if getattr(mix, kind) > 0}


class GlmHeldOut:
    """Held-out text with the blanks of one objective: the same blanks at every evaluation."""

    def __init__(self, held_out: HeldOut, plan: Plan, kind: int) -> None:
        """held_out: a validation set with isolated documents and text_length - 1 tokens a sample."""
        config = replace(plan.config, short_seq_prob=0.0, blank=replace(plan.config.blank, decoder_noise_prob=0.0))
        self.held_out, self.kind, self.stores = held_out, kind, held_out.stores
        self.plan = replace(plan, config=replace(config, loss_norm="global_tokens"), answers=False)
        self._batches = GlmBatches(self.plan)

    def __len__(self) -> int:
        return len(self.held_out)

    def batch(self, first: int, places: npt.NDArray[np.int64]) -> Batch:
        """Samples first + places [m, b]; those past the end have loss weight 0."""
        rows = [self._row(first + int(place)) if first + int(place) < len(self) else [] for place in places.flat]
        return assembled(rows, [self.kind] * len(rows), places, self.plan)

    def _row(self, n: int) -> list[InfillingText]:
        tokens, labelled = self.held_out.sample(n)
        size = min(labelled + 1, self.plan.text_length - 1)
        documents = self._batches.documents(tokens[:size], self.held_out.document_numbers(n)[: size + 1])
        return self._batches.lay_out(Draws(self.plan.seed, HELD_OUT, self.kind, n), documents, Drawn(self.kind))


def build_samples(
    corpora: Sequence[CorpusConfig],
    seq_length: int,
    seed: int,
    cache_dir: str | Path | None = None,
    vocab_size: int | None = None,
) -> BlendedSamples:
    """The endless training samples of corpora by their weights: opens every store and checks what is cheap to check.

    Raises TokenStoreError (missing or damaged store, too short, ids out of range) and ValueError (no corpora, bad weight; epochs, which
    hang on the length of a run: `open_sources` takes one).
    """
    bounded = next((corpus for corpus in corpora if (corpus.epochs, corpus.max_epochs) != (None, None)), None)
    if bounded is not None:
        raise ValueError(f"{bounded.label} has epochs, which hang on the length of a run. Use open_sources with its config.")
    samples = BlendedSamples(
        _open_corpora(corpora, seq_length, seed, cache_dir, vocab_size), endless([corpus.weight for corpus in corpora])
    )
    _ = samples.deal  # a bad weight is an error at once
    return samples


def _open_corpora(
    corpora: Sequence[CorpusConfig], seq_length: int, seed: int, cache_dir: str | Path | None, vocab_size: int | None
) -> list[CorpusSamples]:
    """The samples of each corpus. Raises TokenStoreError and ValueError."""
    if not corpora:
        raise ValueError("data.train is empty: give the prefix of a token store, e.g. data.train=runs/demo/data/train.")
    samples: list[CorpusSamples] = []
    for corpus in corpora:
        store = TokenStore(corpus.path)
        if corpus.answers is None:
            samples.append(GptSamples(store, seq_length, seed, cache_dir, vocab_size))
        else:
            samples.append(PairSamples(store, TokenStore(corpus.answers), seq_length + 1, seed, vocab_size))
    return samples
