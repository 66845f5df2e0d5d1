"""The values that a manifest's `progress` may hold: a run that resumes goes on with them, so none is taken that no run can have saved.

A key that is missing is an earlier release's, one that is unknown a later one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

MOST = 2**53
"""Counts are below: no run comes near, products with a sequence length fit in 64 bits, and every reader of JSON has them exactly."""
_MOST_WINDOWS = 10_000
_Test = Callable[[Any], bool]


def check_progress(progress: Mapping[str, Any]) -> None:
    """Raise ValueError for a value of another kind or range than runs save."""
    for key, (fits, what) in _KNOWN.items():
        if key in progress and not fits(progress[key]):
            raise ValueError(f"progress.{key} is {str(progress[key])[:80]!r}, and not {what}")
    corpora = [len(progress["deal"]["most"])] if "deal" in progress else []
    corpora += [len(progress["identity"]["data"])] if "data" in progress.get("identity", {}) else []
    if len(set(corpora)) > 1:
        raise ValueError(f"progress.deal is of {corpora[0]} corpora, and progress.identity of {corpora[1]}")


def check_resumable(progress: Mapping[str, Any], step: int) -> None:
    """Raise ValueError unless there is what a run needs to go on. step: the manifest's."""
    if missing := [key for key in ("step", "tokens", "updates") if key not in progress]:
        raise ValueError(f"its progress has no {', '.join(missing)}")
    if progress["step"] != step:
        raise ValueError(f"its progress is of step {progress['step']}, and its step is {step}")


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def _number(value: Any) -> bool:
    return abs(value) < MOST if type(value) is int else type(value) is float and math.isfinite(value)


def _share(value: Any) -> bool:
    return _number(value) and value >= 0


def _text(value: Any) -> bool:
    return type(value) is str


def _truth(value: Any) -> bool:
    return type(value) is bool


def _pair(first: _Test, second: _Test) -> _Test:
    return lambda value: type(value) is list and len(value) == 2 and first(value[0]) and second(value[1])


def _all(of: _Test, most: int = 1 << 20) -> _Test:
    return lambda value: type(value) is list and len(value) <= most and all(map(of, value))


def _named(of: _Test) -> _Test:
    return lambda value: type(value) is dict and all(map(of, value.values()))


def _fields(needed: Mapping[str, _Test], more: Mapping[str, _Test]) -> _Test:
    """A test of an object: of the fields that it must have, and of others that it may have."""

    def fits(value: Any) -> bool:
        known = type(value) is dict and all(key in value for key in needed)
        return known and all(of(value[key]) for key, of in {**needed, **more}.items() if key in value)

    return fits


def _corpus(value: Any) -> bool:
    """[identity of the text, weight], and that of the answers."""
    return type(value) is list and 2 <= len(value) <= 3 and _text(value[0]) and _number(value[1]) and all(map(_text, value[2:]))


def _window(value: Any) -> bool:
    return _pair(_count, _count)(value) and value[0] <= value[1]


def _began(value: Any) -> bool:
    """A beginning as `beginning_of` makes it."""
    needed = {"auto": (), "never": ("job",), "checkpoint": ("path", "digest"), "weights": ("path", "digest")}
    if not _named(_text)(value) or value.get("from") not in needed:
        return False
    return all(key in value for key in needed[value["from"]])


def _loss_scale(value: Any) -> bool:
    return _all(_number, 3)(value) and len(value) == 3 and value[0] > 0 <= value[1]  # overflows left may be negative


def _deal(value: Any) -> bool:
    """The terms of a deal as `state_of` makes them: weights, epochs and samples of as many corpora."""
    if not _fields(_DEAL, {})(value):
        return False
    corpora, firsts = len(value["most"]), [piece["first"] for piece in value["pieces"]]
    rows = [value["even"], *(piece["weights"] for piece in value["pieces"]), *([value["before"]] if value["before"] else [])]
    return bool(corpora and firsts) and firsts[0] == 0 and firsts == sorted(firsts) and all(len(row) == corpora for row in rows)


_COUNTS = "a whole number from 0 to 2^53"
_EASED = dict.fromkeys(("from", "steps", "shrink"), _count)
_SPIKES = {
    **dict.fromkeys(("history", "before"), _named(_all(_pair(_count, _number)))),
    "skipped": _count,
    "recent": _all(_count),
    "settled": _truth,
    "spiking": _truth,
    "eased": lambda value: value is None or _fields(_EASED, {})(value),
    "retries": _count,
    "gone": _pair(_count, _count),
}
_IDENTITY = {
    "data": _all(_corpus),
    "valid": _all(_pair(_text, _text)),
    "tokenizer": lambda value: value is None or _text(value),
    "special": lambda value: type(value) is dict,
}
_DEAL: dict[str, _Test] = {
    "pieces": _all(_fields({"first": _count, "weights": _all(_share)}, {})),
    "most": _all(lambda value: value is None or _count(value)),
    "even": _all(_truth),
    "before": _all(_count),
    "seq_length": lambda value: _count(value) and value > 0,
    **dict.fromkeys(("end", "first"), _count),
}
_KNOWN: dict[str, tuple[_Test, str]] = {
    **dict.fromkeys(("step", "samples", "tokens", "updates"), (_count, _COUNTS)),
    "loss_scale": (_loss_scale, "a scale and two counts"),
    "gauge": (_fields(dict.fromkeys(("first", "full", "warmup_steps", "warmup"), _count), {}), "a warm-up"),
    "finished": (_truth, "true or false"),
    "identity": (_fields({}, _IDENTITY), "the identity of texts and a tokenizer"),
    "program": (_named(_text), "versions by name"),
    "began": (_began, "where a run began"),
    "spikes": (_fields({}, _SPIKES), "what a loss guard has seen"),
    "deal": (_deal, "the terms of a deal of samples"),
    "left_out": (_all(_window, _MOST_WINDOWS), f"at most {_MOST_WINDOWS:,} windows [first, end] of tokens"),
}
"""Key -> whether a value fits, and what it should be."""
