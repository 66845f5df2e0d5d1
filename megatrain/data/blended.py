"""The samples of several corpora, dealt on the terms of a run."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatrain.data.left_out import Located, Origin
from megatrain.data.terms import Deal, Terms


class CorpusSamples(Located, Protocol):
    """The samples of one corpus."""

    @property
    def samples_per_epoch(self) -> Fraction | int:
        """Number of samples in which each document is seen once."""

    @property
    def tokens_per_sample(self) -> Fraction | int:
        """Tokens of text that a sample has on average, without the one that it shares with the next."""


class BlendedSamples:
    """The samples of several corpora, mixed on the terms of a run; other terms may be set while no batch is in the making."""

    def __init__(self, corpora: Sequence[CorpusSamples], terms: Terms) -> None:
        self.corpora = tuple(corpora)
        self._terms = terms
        self._deal: Deal | None = None

    @property
    def terms(self) -> Terms:
        """The terms on which samples are dealt."""
        return self._terms

    @terms.setter
    def terms(self, terms: Terms) -> None:
        self._terms, self._deal = terms, None

    @property
    def deal(self) -> Deal:
        """The deal of all samples, made when first asked for. Raises as Deal does."""
        if self._deal is None:
            self._deal = Deal(self._terms)
        return self._deal

    @property
    def per_epoch(self) -> list[Fraction | int]:
        """Number of samples in which each corpus is seen once."""
        return [corpus.samples_per_epoch for corpus in self.corpora]

    def sample(self, n: int) -> npt.NDArray[np.int64]:
        """Tokens [seq_length + 1] of sample n."""
        corpus, place = self.deal.place(n)
        return self.corpora[corpus].sample(place)

    def document_numbers(self, n: int) -> npt.NDArray[np.int64]:
        """[seq_length + 1] number of each token's document within sample n."""
        corpus, place = self.deal.place(n)
        return self.corpora[corpus].document_numbers(place)

    def pairs(self, n: int) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] | None:
        """Prompts and answers of sample n, if its corpus has them; else None."""
        corpus, place = self.deal.place(n)
        return self.corpora[corpus].pairs(place)

    def pieces(self, n: int) -> list[Origin]:
        """Where the tokens of sample n are."""
        corpus, place = self.deal.place(n)
        return self.corpora[corpus].pieces(place)
