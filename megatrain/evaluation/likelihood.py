"""How well text is predicted, in units that can be compared across tokenizers.

| score | formula |
|---|---|
| nats per token | sum of nats / tokens predicted |
| perplexity | exp(nats per token); within one tokenizer alone |
| bits per byte | sum of nats / (ln 2 x UTF-8 bytes of the predicted text) |
| byte perplexity | exp(sum of nats / bytes) = 2^bits per byte |
| word perplexity | exp(sum of nats / words) |

Nats and bytes are of the same text: what is not predicted (special tokens, masked tokens, a context that is given) counts 0 on both
sides (nanochat's loss_eval.py; HELM's compute_perplexity_metrics; word perplexity as lm-evaluation-harness, whose words stand between
blanks). An item is a document; intervals are about documents (`intervals.ratio`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy.typing as npt

from megatrain.evaluation.intervals import Estimate, exponential, ratio, scaled
from megatrain.evaluation.text_scores import WRITTEN_WITHOUT_BLANKS

Clusters = Sequence[Hashable] | None


def utf8_bytes(text: str) -> int:
    """Bytes of a text in UTF-8; a lone surrogate counts 3, as the character that it stands for would."""
    return len(text.encode("utf-8", "surrogatepass"))


def blank_words(text: str) -> int:
    """Words of a text that is written with blanks, as lm-evaluation-harness counts them, and each Han or kana character as one."""
    return len(WRITTEN_WITHOUT_BLANKS.sub(" 字 ", text).split())


def nats_per_token(nats: npt.ArrayLike, tokens: npt.ArrayLike, clusters: Clusters = None) -> Estimate:
    """Mean loss, from documents' summed nats [n] and numbers of predicted tokens [n]."""
    return ratio(nats, tokens, clusters)


def perplexity(nats: npt.ArrayLike, units: npt.ArrayLike, clusters: Clusters = None) -> Estimate:
    """exp(sum of nats / sum of units): of tokens, words (word perplexity) or bytes (byte perplexity), [n] each."""
    return exponential(ratio(nats, units, clusters))


def bits_per_byte(nats: npt.ArrayLike, predicted_bytes: npt.ArrayLike, clusters: Clusters = None) -> Estimate:
    """sum of nats / (ln 2 x sum of bytes), [n] each."""
    return scaled(ratio(nats, predicted_bytes, clusters), 1.0 / math.log(2.0))
