"""The counts of a server. Times are of one process's monotonic clock; a request's life, and what is measured of it:

arrives --- queue --- its prompt begins --- prefill --- first token --- decode --- last token
|---------------- time to first token ----------------|
|---------------------------------- end to end --------------------------------------------|
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatrain.inference.engine import Stats
from megatrain.serving.answer_signals import is_refusal, repetition
from megatrain.serving.replica import AnswerPart

SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
"""vLLM's bounds of the times of a request, of its first token, and between two tokens."""
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LOGPROB = (-8, -6, -5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.75, -0.5, -0.25, -0.1, 0)
SHARE = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
LATELY = 0.1
"""Weight of a request in the mean of how long they take."""
ABORTED = "abort"
"""Why a request ended that nobody waited for, in vLLM's words; other reasons are the engine's."""


def one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20 ... up to the last such number that is at most `most`."""
    return tuple(bound for power in range(10) for factor in (1, 2, 5) if (bound := factor * 10.0**power) <= most)


class Distribution:
    """How many values lay below each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(float(bound) for bound in bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """(bound, how many are at most that), as Prometheus has them."""
        total, found = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self._counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


@dataclass
class Timed:
    """The times of one request."""

    arrived: float
    prompt_tokens: int
    started: float | None = None
    """When its prompt began to be read."""
    first: float | None = None
    """When its first token came."""
    newest: float | None = None
    """When its newest token came."""
    tokens: int = 0

    def seconds(self) -> dict[str, float | None]:
        """Its time to the first token, and to the newest."""
        return {
            name: None if at is None else at - self.arrived for name, at in (("first_token", self.first), ("all", self.newest))
        }


NOTHING = Stats(*[0] * 10)


class Meters:
    """All counts of one server."""

    def __init__(self) -> None:
        self.stats = NOTHING
        """The engine's, at its newest step."""
        self.seconds_lately = 1.0
        """Mean time of requests lately."""
        self.finished: Counter[str] = Counter()
        """Requests by why they ended."""
        self.refused: Counter[int] = Counter()
        """HTTP requests by status, where an error was the answer."""
        self.thumbs: Counter[str] = Counter()
        self.prompt_tokens = self.generated_tokens = self.refusals = 0
        self.first_token, self.between_tokens = Distribution(FIRST_TOKEN), Distribution(BETWEEN_TOKENS)
        self.whole, self.queued, self.prefill, self.decode = (Distribution(SECONDS) for _ in range(4))
        self.logprobs, self.repetitions = Distribution(LOGPROB), Distribution(SHARE)
        self.measure_lengths(1)

    def measure_lengths(self, max_length: int) -> None:
        """Count lengths from now on, of texts for a model of so many positions."""
        lengths = one_two_five(max_length)
        self.prompt_lengths, self.answer_lengths = Distribution(lengths), Distribution(lengths)

    def part(self, timed: Timed, part: AnswerPart, at: float) -> None:
        """Count a part of an answer that came at a time."""
        count = len(part.tokens)
        if part.error is not None:
            return
        if timed.newest is None:
            self.prompt_tokens += timed.prompt_tokens
            self.first_token.observe(at - timed.arrived)
            timed.first = at
            count_after = count - 1
        else:
            count_after = count
        if count_after > 0:
            self.between_tokens.observe((at - (timed.newest or at)) / count_after, count_after)
        timed.newest = at
        timed.tokens += count
        self.generated_tokens += count
        if part.answer is not None:
            self.ended(timed, part.answer.finish, at)

    def ended(self, timed: Timed, why: str, at: float) -> None:
        """Count a request that has ended."""
        self.finished[why] += 1
        if why == ABORTED:
            return
        self.seconds_lately += LATELY * (at - timed.arrived - self.seconds_lately)
        self.whole.observe(at - timed.arrived)
        started = at if timed.started is None else timed.started
        self.queued.observe(started - timed.arrived)
        if timed.first is not None:
            self.prefill.observe(max(0.0, timed.first - started))
            self.decode.observe(at - timed.first)
        self.prompt_lengths.observe(timed.prompt_tokens)
        self.answer_lengths.observe(timed.tokens)

    def answered(self, text: str, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Count what an answer says of the model in use."""
        if logprobs:
            self.logprobs.observe(sum(logprobs) / len(logprobs))
            self.repetitions.observe(repetition(tokens))
        self.refusals += is_refusal(text)
