"""Texts of a task for a GLM, which fills blanks: what is asked is part A, which all tokens see; the answer is part B.

    "The capital of France is" + " Paris"    A  [CLS] The capital of France is [gMASK]     B  <sop> Paris
    "It was [MASK]." + "great"               A  [CLS] It was [MASK] .                      B  <sop> great <eop>

A text without a blank gets a [gMASK] at its end, as in `megatrain generate`; nothing says where such an answer ends. The text of a [MASK]
or [sMASK] ends in <eop>, whose probability counts: it says that the blank is no longer. White space before a mask belongs to its text,
as in training, where spans are cut between tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatrain.data.tokenizer import Tokenizer
from megatrain.evaluation.joins import joined
from megatrain.evaluation.prepared import ToContinue, ToScore
from megatrain.evaluation.questions import MASK
from megatrain.evaluation.scoring import Window
from megatrain.inference.text_places import BlankPlaces, Segment


@dataclass(frozen=True)
class BlankTokens:
    """A GLM's special tokens."""

    opening: tuple[int, ...]
    """Put before a text: [CLS], or none."""
    masks: dict[str, int]
    """`[MASK]`, `[sMASK]`, `[gMASK]`, as far as there are such -> id."""
    sop: int
    ends: frozenset[int]
    """Tokens that end a blank's text."""
    eop: int | None
    """The one that does in training; None if there is none."""
    never: tuple[int, ...] = ()
    """Tokens that are no text and end none."""
    two_dimensional: bool = True
    """Whether positions within a blank are a second number."""


@dataclass(frozen=True)
class BlankTexts:
    """Texts for a GLM."""

    codec: Tokenizer
    max_length: int
    """Positions of the model."""
    special: BlankTokens

    @property
    def ends(self) -> frozenset[int]:
        """Ends of a piece, and of a document."""
        return self.special.ends

    @property
    def stops(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def never(self) -> tuple[int, ...]:
        """Special tokens, and ids that are no text."""
        return self.special.never

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[ToScore]:
        """(context, answer) texts, of which the answer is the text of the context's blank."""
        return [self._pair(context, answer) for context, answer in pairs]

    def prompt(self, text: str, most: int) -> ToContinue:
        """A context whose blank is to be filled."""
        before, mask, after = self._parted(text)
        part_a, place, cut = self._part_a(self.codec.encode(before.rstrip()), mask, after, most)
        return ToContinue((*part_a, self.special.sop), self._places(len(part_a), place, mask), cut)

    def document(self, text: str) -> ToScore:
        """A document as the text of a [gMASK], in windows, each after the end of the one before."""
        ids = self.codec.encode(text)
        around = len(self.special.opening) + 2
        known = self.max_length // 4
        found, done = [], 0
        while done < len(ids):
            seen = ids[max(0, done - known) : done]
            part = ids[done : done + max(self.max_length - around - len(seen) + 1, 1)]
            part_a, place, _ = self._part_a(seen, "[gMASK]", "", len(part))
            found.append(self._window(part_a, place, "[gMASK]", part))
            done += len(part)
        return ToScore(tuple(found), len(ids), len(found) > 1)

    def _pair(self, context: str, answer: str) -> ToScore:
        before, mask, after = self._parted(context)
        head = before.rstrip()
        text = before[len(head) :] + answer
        spanned, ids = False, self.codec.encode(text)
        if head:
            (join,) = joined(self.codec, [(head, text)])
            spanned, ids = join.spanned, list(join.continuation)
        if not ids:
            raise ValueError(f"{self.codec.label} makes no token of the answer {answer!r}, so it has none to score.")
        if mask != "[gMASK]" and self.special.eop is not None:
            ids = [*ids, self.special.eop]
        part_a, place, cut = self._part_a(self.codec.encode(head), mask, after, len(ids))
        return ToScore((self._window(part_a, place, mask, ids),), len(ids), cut, spanned)

    def _parted(self, text: str) -> tuple[str, str, str]:
        """The text before its blank, the mask, and the text behind it."""
        found = list(MASK.finditer(text))
        if len(found) > 1:
            raise ValueError(f"the text has {len(found)} blanks, and one is filled: {text[-80:]!r}. Leave one of them.")
        mask = found[0].group() if found else "[gMASK]"
        if mask not in self.special.masks:
            raise ValueError(f"the model has no {mask}. It has {', '.join(self.special.masks)}.")
        return (text[: found[0].start()], mask, text[found[0].end() :]) if found else (text, mask, "")

    def _part_a(self, before: Sequence[int], mask: str, after: str, room: int) -> tuple[tuple[int, ...], int, bool]:
        """Part A that leaves `room` places for part B, the place of its blank, and whether the beginning of its text was cut."""
        behind = self.codec.encode(after) if after else []
        left = self.max_length - room - len(self.special.opening) - 1 - len(behind)
        if left < 0:
            raise ValueError(
                f"the text behind the blank has {len(behind)} tokens and the answer {room}, and the model has {self.max_length} positions. "
                " Only text before a blank is cut: use a shorter item."
            )
        kept = list(before)[len(before) - max(left, 0) :] if len(before) > left else list(before)
        place = len(self.special.opening) + len(kept)
        return (*self.special.opening, *kept, self.special.masks[mask], *behind), place, len(kept) < len(before)

    def _places(self, part_a: int, place: int, mask: str) -> BlankPlaces:
        masks = self.special.masks
        counts_on = not self.special.two_dimensional and mask == "[gMASK]" and masks.get("[MASK]") != masks[mask]
        return BlankPlaces(part_a, (Segment(part_a, place, counts_on),))

    def _window(self, part_a: tuple[int, ...], place: int, mask: str, ids: Sequence[int]) -> Window:
        return Window((*part_a, self.special.sop, *ids), len(part_a) + 1, self._places(len(part_a), place, mask))
