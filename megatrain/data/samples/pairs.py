"""Samples of prompts with answers, for a multi-task share of pre-training (GLM-130B, arXiv:2210.02414, section 2.2).

Two token stores have the same number of documents: document i of one is a prompt, document i of the other its answer. Every epoch visits
all pairs in another order; a sample has as many pairs as fit a text on average.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megatrain.data.draws import permutation
from megatrain.data.indexed import TokenStore, TokenStoreError, store_paths
from megatrain.data.left_out import Origin

Ids = npt.NDArray[np.int64]
PAIRS = 3
"""Part of the key of a permutation: of an epoch's pairs."""


class PairSamples:
    """The endless sequence of samples of two stores. Raises TokenStoreError unless both have the same number of documents."""

    def __init__(
        self, prompts: TokenStore, answers: TokenStore, text_length: int, seed: int, vocab_size: int | None = None
    ) -> None:
        if prompts.documents != answers.documents or not prompts.documents:
            raise TokenStoreError(
                f"{prompts.prefix} holds {prompts.documents} prompts and {answers.prefix} {answers.documents} answers. Tokenize both "
                "out of the same lines, none of them empty: --key prompt and --key answer."
            )
        self.prompts, self.answers, self.seed = prompts, answers, seed
        self._vocab_size = vocab_size
        for store in (prompts, answers):
            store.verify_ids(vocab_size)
        mean = (prompts.tokens + answers.tokens) / prompts.documents
        self.together = max(1, int(text_length / (mean + 3)))  # each with [CLS], [gMASK] and a start of piece
        self._order: tuple[int, Ids] = -1, np.zeros(0, np.int64)
        """The last epoch, and the order of its pairs: one value, since the loader's thread is not the only one that reads."""

    @property
    def samples_per_epoch(self) -> Fraction:
        """Number of samples in which each pair is seen once."""
        return Fraction(self.prompts.documents, self.together)

    @property
    def tokens_per_sample(self) -> Fraction:
        """Tokens of prompts and answers that a sample has on average."""
        return Fraction((self.prompts.tokens + self.answers.tokens) * self.together, self.prompts.documents)

    def pairs(self, n: int) -> list[tuple[Ids, Ids]]:
        """The (prompt, answer) pairs of sample n."""
        return [(self._document(self.prompts, number), self._document(self.answers, number)) for number in self._numbers(n)]

    def pieces(self, n: int) -> list[Origin]:
        """The prompts and answers of sample n."""
        found = []
        for number in self._numbers(n):
            for store in (self.prompts, self.answers):
                first, end = store.document_bounds(number)
                found.append(Origin(str(store_paths(store.prefix)[0]), number, first, end - first))
        return found

    def _numbers(self, n: int) -> list[int]:
        """The documents of sample n."""
        return [self._number(n * self.together + i) for i in range(self.together)]

    def _number(self, pair: int) -> int:
        epoch, place = divmod(pair, self.prompts.documents)
        kept = self._order
        if kept[0] != epoch:
            self._order = kept = epoch, permutation(self.prompts.documents, self.seed, epoch, PAIRS)
        return int(kept[1][place])

    def _document(self, store: TokenStore, number: int) -> Ids:
        return np.asarray(store.read(*store.document_bounds(number), self._vocab_size), np.int64)

    def sample(self, n: int) -> Ids:
        """Raises TokenStoreError: pairs are no running text."""
        raise TokenStoreError(f"{self.prompts.prefix} holds prompts, not text")

    def document_numbers(self, n: int) -> Ids:
        """Raises TokenStoreError, as `sample` does."""
        return self.sample(n)
