"""`knob` makes a field of the schema: its default, its documentation, its range and when it has an effect, all shown in docs/config.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatrain.config.effects import Effect

T = TypeVar("T")

LARGEST_INTEGER, LARGEST_NUMBER = (1 << 31) - 1, 1e15
"""Upper bounds of knobs that declare none. They lie far beyond what anybody trains: a larger number is a slip, which would otherwise
surface late, as some other error. A knob's own `at_most` is often such a bound too."""


@dataclass(frozen=True)
class Range:
    """The values of a knob's type that it takes: bounds of a number or of each number of a list; None: no bound of that kind."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    not_empty: bool = False
    """Whether text must have a character."""
    path: bool = False
    """Whether text is a path: not empty; ~ or ~user at its beginning is a home directory."""

    def words(self, whole: bool) -> str:
        """The range as text, to follow the type: `1 to 65536`, `above 0`, `in [0, 1)`, `not empty`, `a path`; "" without bounds.

        whole: whether the knob's numbers are integers.
        """
        if self.not_empty or self.path:
            text = "a path" if self.path else "not empty"
            return text if self.at_least is None else f"{self.at_least} or more, {text}"
        if whole and (self.at_least is not None or self.above is not None):
            least = self.at_least if self.above is None else self.above + 1
            return f"{least} or more" if self.at_most is None else f"{least} to {self.at_most}"
        if self.below is not None or self.at_most is not None:
            return f"in {self._interval}"
        return f"above {self.above}" if self.above is not None else "" if self.at_least is None else f"{self.at_least} or more"

    def broken_by(self, value: Any) -> str:
        """The rule that a value breaks, to follow its key and value; "" if none. Null, true and false are in every range; NaN in none."""
        if isinstance(value, str):
            return self._text_broken_by(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return ""
        low = (self.at_least is None or value >= self.at_least) and (self.above is None or value > self.above)
        if self.below is not None:
            return "" if low and value < self.below else f"must lie in {self._interval}"
        if not low:
            return f"must be {self.at_least} or more" if self.above is None else f"must be greater than {self.above}"
        at_most = self.at_most if self.at_most is not None else LARGEST_INTEGER if isinstance(value, int) else LARGEST_NUMBER
        return "" if value <= at_most else f"must be at most {at_most}"

    def _text_broken_by(self, value: str) -> str:
        if not value and (self.not_empty or self.path):
            return "must not be empty text"
        if self.path and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            return "must be the name of a file, which has no NUL and no half of a surrogate pair"
        return "must not begin with ~ and the name of no user" if self.path and value.startswith("~") else ""

    @property
    def _interval(self) -> str:
        """The range in the notation of intervals: [0, 1), (0, 1]."""
        low = f"[{self.at_least}" if self.above is None else f"({self.above}"
        return f"{low}, {self.at_most:g}]" if self.below is None else f"{low}, {self.below:g})"


@dataclass(frozen=True)
class Deferred:
    """Values of a knob that a later release takes, and this one refuses."""

    released: tuple[Any, ...]
    """The values of this release."""
    why: str


def knob(
    default: T,
    doc: str,
    effect: Effect | None = None,
    *,
    use: Any = None,
    deferred: Deferred | None = None,
    **limits: Any,
) -> T:
    """A config field: its default, its documentation, when it has an effect (None: always), and the values that it takes.

    limits    the fields of Range, such as at_least=0 or above=0, at_most=65536; every number needs a lower one
    use       a value in range, which errors advise; None: the default
    """
    metadata = {
        "doc": doc,
        "effect": effect,
        "range": Range(**limits),
        "use": default if use is None else use,
        "deferred": deferred,
    }
    return field(default=default, metadata=metadata)
