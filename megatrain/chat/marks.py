"""Text of a template and text of people in one string, told apart by marks, and that string as token ids.

A template writes the names of special tokens, `<|user|>`, between texts that people have written, which may hold the same letters. Those
are marked before the template sees them, in characters that no text has (noncharacters of Unicode, U+FDD0 on), so that a template works on
texts as ever (trims, cuts, looks for a part), and only names that the template itself has written become special tokens:

    content          say <|user|> now            say <·|·u·s·e·r·|·>· now
    template         <|user|>\\n + content        <|user|>\\nsay <·|·u·s·e·r·|·>· now
    token ids        [id of <|user|>] + encode("\\nsay <|user|> now")         by a tokenizer that takes text literally

Letters of a text that might become a name together with the template's letters beside it have a mark between them. Marks are no part of
what is encoded, so a text has the ids that it has alone. `transformers` has the same idea (apply_chat_template, sanitize_control_tokens).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatrain.data.boundaries import NamedToken
from megatrain.data.tokenizer import Tokenizer

BREAK, CUT, LAST, LITERAL = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
"""Between letters that must not become a name; where a text is encoded in two parts; the end of a message that is gone on with; before a
letter that is no mark and no name."""
_MARKS = BREAK + CUT + LAST + LITERAL


class MarkedText:
    """Marks what people have written, and encodes text with marks."""

    def __init__(self, codec: Tokenizer, controls: Sequence[NamedToken]) -> None:
        """controls: the tokens that the template may write by their names."""
        self._codec = codec
        self._controls = {control.name: control for control in controls}
        names = list(self._controls)
        self._name = re.compile(_any_of(names))
        self._own = re.compile(f"{LITERAL}(.)|({_any_of(names)})|([{_MARKS}])", re.DOTALL)
        self._foreign = re.compile(_any_of([*names, *_MARKS]))
        self._hidden = re.compile(_any_of([*(name for name in names if self._controls[name].special), *_MARKS]))
        self._ends = {name[n:] for name in names for n in range(1, len(name))}
        self._beginnings = {name[:n] for name in names for n in range(1, len(name))}
        self._longest = max(map(len, names), default=0)

    def marked(self, value: Any, written: bool = False) -> Any:
        """A text that is not the template's, or a JSON value with such texts, with marks; keys of objects are not marked.

        written: whether a model has written it, so that names of tokens that are not special, `<think>`, are those tokens.
        """
        if isinstance(value, str):
            return self._marked(value, self._hidden if written else self._foreign)
        if isinstance(value, Mapping):
            return {key: self.marked(item, written) for key, item in value.items()}
        return [self.marked(item, written) for item in value] if isinstance(value, list | tuple) else value

    def plain(self, text: str) -> str:
        """Text without marks."""
        return self._own.sub(lambda found: found[1] or found[2] or "", text)

    def encode(self, text: str) -> list[int]:
        """Ids of a text with marks; names outside of marks are special tokens."""
        ids: list[int] = []
        for part, at_start in self._parts(text):
            if isinstance(part, NamedToken):
                ids.append(part.token)
            elif part:
                ids += self._codec.encode(part) if at_start else self._codec.encode_inside(part)
        return ids

    def first_control(self, text: str) -> NamedToken | None:
        """The control token with which a text with marks begins, behind white space; None if it begins with anything else."""
        found = self._name.match(text.lstrip())
        return None if found is None else self._controls[found[0]]

    def _marked(self, text: str, names: re.Pattern[str]) -> str:
        text = names.sub(self._broken, text)
        lead, trail = len(text) - len(text.lstrip()), len(text.rstrip())
        lengths = range(1, self._longest)
        if any(text[max(0, trail - n) : trail] in self._beginnings for n in lengths):
            text = text[:trail] + BREAK + text[trail:]
        inner = text[lead:trail]
        within = 0 < len(inner) < self._longest and any(inner in name for name in self._controls)
        if within or any(text[lead : lead + n] in self._ends for n in lengths):
            text = text[:lead] + BREAK + text[lead:]
        return text

    def _broken(self, found: re.Match[str]) -> str:
        """A name as letters, no two of which are beside each other, and whose like a tokenizer does not find in text."""
        first, rest = found[0][:1], found[0][1:]
        if not rest:
            return LITERAL + first
        whole = self._controls[found[0]].special
        return first + (BREAK if whole else CUT) + BREAK.join(rest) + BREAK

    def _parts(self, text: str) -> Iterator[tuple[NamedToken | str, bool]]:
        """Control tokens and the literal texts between them, each with whether it begins the whole."""
        run, begin, at_start, eats = [""], 0, True, False
        for found in self._own.finditer(text):
            run[-1] += text[begin : found.start()]
            begin = found.end()
            if found[1] is not None:
                run[-1] += found[1]
            elif found[2] is not None:
                control = self._controls[found[2]]
                for literal in _trimmed(run, eats, control.eats_left):
                    yield literal, at_start
                    at_start = False
                yield control, False
                run, at_start, eats = [""], False, control.eats_right
            elif found[3] == CUT:
                run.append("")
        run[-1] += text[begin:]
        for literal in _trimmed(run, eats, False):
            yield literal, at_start
            at_start = False


def _any_of(names: Sequence[str]) -> str:
    """A pattern of any of these texts, the longest that is there; of none, nothing."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"


def _trimmed(run: list[str], left: bool, right: bool) -> Iterator[str]:
    """The parts of a text, without white space at the ends that the tokens beside it take away."""
    run[0] = run[0].lstrip() if left else run[0]
    run[-1] = run[-1].rstrip() if right else run[-1]
    return filter(None, run)
