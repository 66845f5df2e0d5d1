"""Fills the blanks of a prompt: [MASK] and [sMASK] stand for short and long missing spans, [gMASK] for a missing end.

    def area([MASK]):  ->  def area(width, height):

Part A, the prompt with its masks, is fed once, and all its tokens see each other. Then each blank is decoded, in the order of the text:
a <|startofpiece|> at the blank's position, then tokens up to an end of piece. Later blanks see the tokens of earlier ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch

from megatrain.data.samples.infilling import Sentinels
from megatrain.inference.decoding import Beams, Decoder, Sampling, beam_search

_MASK = re.compile(r"\[(g|s|)MASK\]")


def parsed(prompt: str, ids: Sentinels) -> tuple[list[str], list[int]]:
    """The texts around a prompt's blanks, and the mask token of each blank; a prompt without a blank gets a [gMASK] at its end."""
    texts = _MASK.split(prompt)[::2]
    masks = [{"": ids.mask, "s": ids.smask, "g": ids.gmask}[kind] for kind in _MASK.findall(prompt)]
    return (texts, masks) if masks else ([prompt, ""], [ids.gmask])


class Filling:
    """The blanks of one prompt, to be filled in order."""

    def __init__(
        self, decoder: Decoder, texts: Sequence[Sequence[int]], masks: Sequence[int], ids: Sentinels, text_vocab: int
    ) -> None:
        """texts: tokens around the blanks, one more than `masks`; text_vocab: ids below it are text.

        Raises ValueError where the prompt does not fit the model.
        """
        self.decoder, self.ids = decoder, ids
        part_a = [ids.cls, *texts[0]]
        self._at: list[int] = []
        self._masks = list(masks)
        for mask, text in zip(masks, texts[1:], strict=True):
            self._at.append(len(part_a))
            part_a += [mask, *text]
        self.sep, limit = len(part_a), decoder.config.positions
        if self.sep + 2 * len(masks) > limit:
            raise ValueError(
                f"the prompt has {self.sep} tokens and {len(masks)} blanks, and model.max_positions is {limit}: there is no room to fill "
                "them. Shorten the prompt."
            )
        if max(part_a) >= decoder.chunks[0].build.vocab_size:
            raise ValueError(
                f"the tokenizer made token {max(part_a)} of the prompt, and the checkpoint's vocabulary has "
                f"{decoder.chunks[0].build.vocab_size} tokens. Give the tokenizer that the run was trained with: --tokenizer "
                "TOKENIZER.json."
            )
        never = {ids.cls, ids.mask, ids.gmask, ids.smask, ids.sop, ids.noise} | set(
            range(text_vocab, decoder.chunks[0].build.vocab_size)
        )
        self._never = torch.tensor(sorted(never - {ids.eop, ids.eos}))
        """Ids that are never decoded: neither text nor an end token."""
        decoder.restart()
        index = torch.arange(self.sep)[:, None]
        decoder.feed(torch.tensor(part_a)[:, None], index, torch.zeros_like(index), torch.tensor([self.sep]))

    def fill(self, number: int, max_tokens: int, sampling: Sampling, seed: int, beams: Beams | None = None) -> Iterator[int]:
        """The tokens of blank `number`, one by one, without the end of piece; they stay in the cache for the blanks after it.

        The same on every rank. Stops early when the model's positions are used up.
        """
        ends = {self.ids.eop, self.ids.eos}
        left_for_others = len(self._at) - number - 1
        room = min(max_tokens, self.decoder.config.positions - self.decoder.length - 1 - 2 * left_for_others)
        if beams is not None:
            yield from self._best(number, room, ends, beams)
            return
        generator = torch.Generator().manual_seed(seed)
        logits = self._feed(number, [[self.ids.sop]], 1)[0]
        for place in range(room):
            token = sampling.draw(logits, generator)
            if token in ends:
                return
            yield token
            if place + 1 < room or left_for_others:
                logits = self._feed(number, [[token]], place + 2)[0]

    def _best(self, number: int, room: int, ends: set[int], beams: Beams) -> Sequence[int]:
        """The tokens of a blank, by beam search."""
        begin = self.decoder.length
        first = self._feed(number, [[self.ids.sop]], 1)[0]

        def step(parents: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
            self.decoder.select(parents)
            return self._feed(number, [tokens], self.decoder.length - begin + 1)

        found = beam_search(first, step, ends, room, beams)
        tokens = found.tokens[:-1] if found.ended else found.tokens
        self.decoder.go_back(begin)
        self._feed(number, [[token] for token in (self.ids.sop, *tokens)], 1)
        return tokens

    def _feed(self, number: int, rows: Sequence[Sequence[int]], place: int) -> torch.Tensor:
        """Append rows [s][b] of tokens to part B, the first at place `place` of blank `number`; returns logits [b, v]."""
        tokens = torch.tensor(rows)
        inside = torch.arange(place, place + len(rows))[:, None].expand_as(tokens)
        stays = torch.full_like(tokens, self._at[number])
        config = self.decoder.config
        if not config.two_dimensional and self._masks[number] == self.ids.gmask != self.ids.mask:
            stays = self.decoder.length + torch.arange(len(rows))[:, None].expand_as(tokens)
        logits = self.decoder.feed(tokens, stays, inside)
        self._never = self._never.to(logits.device)  # copied once, at the first token
        return logits.index_fill(1, self._never, torch.finfo(logits.dtype).min)
