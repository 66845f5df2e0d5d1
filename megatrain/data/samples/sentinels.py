"""Ids of GLM's special tokens: the config's, else the tokenizer's, else new ids after its vocabulary."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from megatrain.config.schema import GlmConfig
from megatrain.data.boundaries import END_OF_TEXT
from megatrain.data.samples.infilling import Sentinels
from megatrain.data.tokenizer import Tokenizer

NAMES: dict[str, tuple[str, ...]] = {
    "sop": ("<|startofpiece|>", "<sop>", "sop"),
    "eop": ("<|endofpiece|>", "<eop>", "eop"),
    "cls": ("[CLS]",),
    "mask": ("[MASK]",),
    "gmask": ("[gMASK]",),
    "smask": ("[sMASK]",),
    "noise": ("[dBLOCK]", "<|dblock|>"),
    "eos": (END_OF_TEXT, "[PAD]"),
}
"""The names of each token in tokenizers of GLM; new ids are given in this order."""


def resolve(glm: GlmConfig, tokenizer: Tokenizer | None, vocab_size: int | None) -> tuple[Sentinels, int]:
    """The special tokens' ids, and the vocabulary size of text: ids of text are below it.

    Without a tokenizer the last ids of `vocab_size` are used. Raises ValueError if two tokens have one id, or an id does not fit.
    """
    found = {name: value for name, value in asdict(glm.tokens).items() if value is not None}
    for name, spellings in NAMES.items():
        if name in found:
            continue
        known = None if tokenizer is None else next((i for i in map(tokenizer.special_id, spellings) if i is not None), None)
        if name == "eos" and tokenizer is not None and tokenizer.eod is not None:
            known = tokenizer.eod
        if known is not None:
            found[name] = known
    missing = [name for name in NAMES if name not in found]
    if not glm.task_masks:
        missing = [name for name in missing if name not in ("gmask", "smask")]
    if tokenizer is not None:
        text = tokenizer.vocab_size
    elif vocab_size is not None:
        text = vocab_size - len(missing)
    else:
        raise ValueError(
            "without a tokenizer and without a vocabulary there are no ids for GLM's special tokens: set one of them"
        )
    found |= {name: text + number for number, name in enumerate(missing)}
    if not glm.task_masks:
        found |= {"gmask": found["mask"], "smask": found["mask"]}
    ids = Sentinels(**found)
    _check(ids, glm, vocab_size)
    return ids, text


def _check(ids: Sentinels, glm: GlmConfig, vocab_size: int | None) -> None:
    """Raise ValueError if two tokens have one id, or an id does not fit."""
    by_id: dict[int, str] = {}
    for name, number in asdict(ids).items():
        if name in ("gmask", "smask") and not glm.task_masks:
            continue
        if number in by_id:
            raise ValueError(f"data.glm.tokens: {by_id[number]} and {name} are both {number}. Give each an id of its own.")
        by_id[number] = name
        if number < 0 or (vocab_size is not None and number >= vocab_size):
            raise ValueError(
                f"GLM's special token {name} has the id {number}, and model.vocab_size={vocab_size}. Use model.vocab_size="
                f"{max(by_id) + 1} or more, or leave it out."
            )


def sentence_ends(tokenizer: Tokenizer, vocab_size: int, end_chars: str, eos: int) -> npt.NDArray[np.bool_]:
    """[vocab_size] whether a token's text contains one of `end_chars`."""
    wanted = set(end_chars)
    ends = np.zeros(vocab_size, bool)
    for number in range(min(tokenizer.vocab_size, vocab_size)):
        ends[number] = number != eos and not wanted.isdisjoint(tokenizer.decode([number]))
    return ends
