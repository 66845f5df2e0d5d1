"""How a text is to be generated, as lm-evaluation-harness' tasks say it (`generation_kwargs`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatrain.inference.requests import Sampling

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_NUMBERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_ONE = ("num_beams", "num_return_sequences")
"""Arguments whose value may be 1, which changes nothing."""
_KNOWN = {"until", "do_sample", "seed", *_LENGTHS, *_NUMBERS, *_ONE}


@dataclass(frozen=True)
class GenerationArguments:
    """Arguments of one text."""

    until: tuple[str, ...]
    """Texts at which it is cut."""
    max_tokens: int | None
    """New tokens at most; None: not said."""
    sampling: Sampling
    seed: int | None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> GenerationArguments:
        """The arguments of a task. A temperature of 0 is the most probable token, as is no `do_sample` and no temperature.

        Raises ValueError for an argument that is not known, or a value that cannot be: none is passed over.
        """
        if unknown := [name for name in given if name not in _KNOWN]:
            raise ValueError(f"the generation argument {unknown[0]} is not known here. Known are {', '.join(sorted(_KNOWN))}.")
        if more := [name for name in _ONE if given.get(name, 1) != 1]:
            raise ValueError(f"{more[0]}={given[more[0]]}: a task gets one text for each request. Use {more[0]}=1.")
        lengths = [int(given[name]) for name in _LENGTHS if given.get(name) is not None]
        numbers = {name: given[name] for name in _NUMBERS if given.get(name) is not None}
        temperature = float(numbers.pop("temperature", 1.0 if given.get("do_sample") else 0.0))
        greedy = temperature == 0 or given.get("do_sample") is False
        until = given.get("until") or ()
        seed = given.get("seed")
        return cls(
            tuple(dict.fromkeys(text for text in ([until] if isinstance(until, str) else until) if text)),
            lengths[0] if lengths else None,
            Sampling(greedy=greedy, temperature=1.0 if greedy else temperature, **numbers),
            None if seed is None else int(seed),
        )
