"""The streamed text of one request: tokens go in one by one, text that can be shown comes out, up to the first stop string.

A character is never split (data/stream.py), and nothing is shown that may yet turn out to be the beginning of a stop string:

    stop "\\n\\n"    tokens  "a"  " b\\n"  "c\\n"  "\\nd"
                   shown   "a"  " b"   "\\nc"  ""       stopped at "\\n\\n"; the text is "a b\\nc"

The text is cut where the first stop string begins, as if each had been looked for in the text of all tokens: how the text is spread
over tokens changes nothing. An automaton reads each character once (Aho and Corasick, CACM 18(6), 1975), so a text takes linear time
whatever the stop strings are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from megatrain.data.stream import Decodes, GrowingText


class NamesSpecial(Decodes, Protocol):
    """A tokenizer's decoder, and which tokens are special."""

    def special_id(self, name: str) -> int | None:
        """Id of the special token of this name; None if there is none."""

    def name_of(self, token: int) -> str:
        """The name of a token."""


class TextStream:
    """The text of one request's new tokens."""

    def __init__(self, codec: NamesSpecial, before: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        """before: the tokens before; only those behind the last special one matter, as text between special tokens is encoded alone.
        stops: texts that end the text. Raises ValueError for an empty one.
        """
        self._codec = codec
        self._text = GrowingText(codec, _behind_special(codec, before))
        self._search = StopSearch(stops) if stops else None

    @property
    def stopped(self) -> str | None:
        """The stop string that has ended the text; whatever follows is dropped."""
        return None if self._search is None else self._search.found

    def push(self, token: int) -> str:
        """The text that can be shown now; a special token has none."""
        if self.stopped is not None or _is_special(self._codec, token):
            return ""
        piece = self._text.push(token)
        return piece if self._search is None else self._search.read(piece)

    def finish(self) -> str:
        """The rest of the text, after the last token; `stopped` may be known only now."""
        if self.stopped is not None:
            return ""
        rest = self._text.finish()
        return rest if self._search is None else self._search.read(rest) + self._search.end()


class StopSearch:
    """Looks for the first place where one of several strings stands in a text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty string, or none."""
        if not stops or not all(stops):
            raise ValueError("a stop string is empty: every text would end before it begins. Leave it out.")
        self.found: str | None = None
        self._next: list[dict[str, int]] = [{}]
        self._fail, self._depth, self._longest, self._spelled = [0], [0], [""], [""]
        for stop in stops:
            self._add(stop)
        self._link()
        self._state = 0  # what is held are the letters that lead to it, the beginning of a stop string
        self._first: tuple[int, str] | None = None  # place in what is held and string there; one begun before it may yet end

    def read(self, piece: str) -> str:
        """The text before every place where a stop string begins, or may have begun; "" once one is found."""
        if self.found is not None:
            return ""
        held = self._state
        for at, letter in enumerate(piece, self._depth[held] + 1):
            self._step(letter)
            longest = self._longest[self._state]
            if longest and (self._first is None or at - len(longest) < self._first[0]):
                self._first = at - len(longest), longest
            if self._first is not None and at - self._depth[self._state] >= self._first[0]:
                return self._cut(held, piece, self._first)
        begins = self._depth[held] + len(piece) - self._depth[self._state]
        if self._first is not None:
            self._first = self._first[0] - begins, self._first[1]
        return self._released(held, piece, begins)

    def end(self) -> str:
        """The rest that is held, as no more text comes."""
        if self.found is not None:
            return ""
        if self._first is not None:
            return self._cut(self._state, "", self._first)
        rest, self._state = self._released(self._state, "", self._depth[self._state]), 0
        return rest

    def _cut(self, held: int, piece: str, first: tuple[int, str]) -> str:
        self.found = first[1]
        return self._released(held, piece, first[0])

    def _released(self, held: int, piece: str, letters: int) -> str:
        """The first letters of what is held in a state and of a piece after it."""
        depth = self._depth[held]
        return self._spelled[held][: min(depth, letters)] + piece[: max(0, letters - depth)]

    def _step(self, letter: str) -> None:
        while self._state and letter not in self._next[self._state]:
            self._state = self._fail[self._state]
        self._state = self._next[self._state].get(letter, 0)

    def _add(self, stop: str) -> None:
        state = 0
        for letter in stop:
            if letter not in self._next[state]:
                self._next[state][letter] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self._depth.append(self._depth[state] + 1)
                self._longest.append("")
                self._spelled.append(stop)
            state = self._next[state][letter]
        self._longest[state] = stop

    def _link(self) -> None:
        """Where to go on when a letter does not follow: at the longest end of what was read with which a string begins."""
        states = deque(self._next[0].values())
        while states:
            state = states.popleft()
            for letter, following in self._next[state].items():
                states.append(following)
                back = self._fail[state]
                while back and letter not in self._next[back]:
                    back = self._fail[back]
                self._fail[following] = self._next[back].get(letter, 0)
                self._longest[following] = self._longest[following] or self._longest[self._fail[following]]


def _behind_special(codec: NamesSpecial, before: Sequence[int]) -> Sequence[int]:
    last = next((at for at in range(len(before) - 1, -1, -1) if _is_special(codec, before[at])), -1)
    return before[last + 1 :]


def _is_special(codec: NamesSpecial, token: int) -> bool:
    return codec.special_id(codec.name_of(token)) is not None
