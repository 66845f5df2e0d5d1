"""Fills the blanks of a prompt: [MASK] and [sMASK] stand for short and long missing spans, [gMASK] for a missing end.

    def area([MASK]):  ->  def area(width, height):

Part A, the prompt with its masks, is read once, and all its tokens see each other. Then each blank is decoded, in the order of the text:
a <|startofpiece|> at the blank's position, then tokens up to an end of piece. Later blanks see the tokens of earlier ones. Each blank is
one request; what came before it lies in the engine's cache of prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from megatrain.data.samples.infilling import Sentinels
from megatrain.inference.engine import Engine
from megatrain.inference.requests import Request
from megatrain.inference.text_places import BlankPlaces, Segment

_MASK = re.compile(r"\[(g|s|)MASK\]")


def parsed(prompt: str, ids: Sentinels) -> tuple[list[str], list[int]]:
    """The texts around a prompt's blanks, and the mask token of each blank; a prompt without a blank gets a [gMASK] at its end."""
    texts = _MASK.split(prompt)[::2]
    masks = [{"": ids.mask, "s": ids.smask, "g": ids.gmask}[kind] for kind in _MASK.findall(prompt)]
    return (texts, masks) if masks else ([prompt, ""], [ids.gmask])


class Filling:
    """The blanks of one prompt, to be filled in order."""

    def __init__(
        self, engine: Engine, texts: Sequence[Sequence[int]], masks: Sequence[int], ids: Sentinels, text_vocab: int
    ) -> None:
        """texts: tokens around the blanks, one more than `masks`; text_vocab: ids below it are text.

        Raises ValueError where the prompt does not fit the model.
        """
        self.engine, self.ids = engine, ids
        part_a = [ids.cls, *texts[0]]
        self._at: list[int] = []
        self._masks = list(masks)
        for mask, text in zip(masks, texts[1:], strict=True):
            self._at.append(len(part_a))
            part_a += [mask, *text]
        self.sep, limit = len(part_a), engine.max_length
        if self.sep + 2 * len(masks) > limit:
            raise ValueError(
                f"the prompt has {self.sep} tokens and {len(masks)} blanks, and model.max_positions is {limit}: there is no room to fill "
                "them. Shorten the prompt."
            )
        if max(part_a) >= engine.vocab_size:
            raise ValueError(
                f"the tokenizer made token {max(part_a)} of the prompt, and the checkpoint's vocabulary has {engine.vocab_size} tokens. "
                "Give the tokenizer that the run was trained with: --tokenizer TOKENIZER.json."
            )
        never = {ids.cls, ids.mask, ids.gmask, ids.smask, ids.sop, ids.noise} | set(range(text_vocab, engine.vocab_size))
        self._never = tuple(sorted(never - {ids.eop, ids.eos}))
        """Ids that are never decoded: neither text nor an end token."""
        self.tokens = part_a
        """Part A, and of part B what is known."""
        self._segments: list[Segment] = []

    @property
    def left(self) -> int:
        """Number of blanks to be filled."""
        return len(self._at) - len(self._segments)

    def request(self, asked: Request) -> Request:
        """The request that fills the next blank, with the sampling, seed and limits of `asked`, whose tokens are not read.

        It has fewer tokens where the model's positions are used up.
        """
        start, number = len(self.tokens), len(self._segments)
        mask = self._masks[number]
        counts_on = not self.engine.two_dimensional and mask == self.ids.gmask != self.ids.mask
        places = BlankPlaces(self.sep, (*self._segments, Segment(start, self._at[number], counts_on)))
        room = min(asked.max_tokens, self.engine.max_length - start - 1 - 2 * (self.left - 1))
        sampling = replace(asked.sampling, never=self._never)
        ends, tokens = frozenset({self.ids.eop, self.ids.eos}), (*self.tokens, self.ids.sop)
        return replace(asked, tokens=tokens, max_tokens=room, sampling=sampling, ends=ends, places=places)

    def fill(self, request: Request, tokens: Sequence[int]) -> None:
        """Put tokens, without the end of piece, into the blank that `request` was made for."""
        self._segments = list(request.places.segments) if isinstance(request.places, BlankPlaces) else self._segments
        self.tokens += [self.ids.sop, *tokens]
