"""How often each document will have been seen by the end of a run, told before it begins.

Repeated text is worth nearly as much as new text up to about four times, and ever less beyond (Muennighoff et al., arXiv:2305.16264).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from megatrain.config.budget import budget_of
from megatrain.config.schema import Config, CorpusConfig
from megatrain.data.blended import BlendedSamples
from megatrain.data.terms import Deal, NothingLeftError, UsedUpError

OFTEN = 4
"""Times that text is seen, up to which it is worth as much as new text, or nearly."""
WIDEST = 40
"""Letters of a name in a report."""


@dataclass(frozen=True)
class Seen:
    """One corpus at the end of a run."""

    label: str
    samples: int
    tokens: int
    """Tokens of the text, of which a sample shares one with the next."""
    epochs: Fraction

    @property
    def times(self) -> str:
        """How often each of its documents is seen: `2 times`, `0 or 1 times`."""
        low, high = math.floor(self.epochs), math.ceil(self.epochs)
        return times(low) if low == high else f"{low} or {high} times"


@dataclass(frozen=True)
class Reached:
    """Where a run is: 0 before it begins."""

    step: int = 0
    consumed: int = 0

    def step_of(self, config: Config, sample: int) -> int:
        """The step, counted from 1, that takes a sample."""
        return self.step + budget_of(config).steps_to(max(sample, self.consumed) + 1, self.consumed)

    def longest(self, config: Config, samples: int) -> str:
        """The longest run that takes no more than so many samples, as a key and its value; "" if there is none."""
        budget = budget_of(config)
        more = budget.steps_to(samples, self.consumed)
        more -= budget.consumed(more, self.consumed) > samples
        if more < 1:
            return ""
        tokens = budget.consumed(more, self.consumed) * config.model.seq_length
        return f"train.steps={self.step + more}" if config.train.tokens is None else f"train.tokens={tokens}"


def dealt(config: Config, samples: BlendedSamples, place: Reached = Reached()) -> Deal:
    """The deal of a run's samples. Raises ValueError, with what would work, where its corpora do not last to its end."""
    try:
        return samples.deal
    except UsedUpError as error:
        raise ValueError(_used_up(config, samples, error, place)) from None
    except NothingLeftError as error:
        raise ValueError(_nothing_left(config, samples, error, place)) from None


def seen(config: Config, samples: BlendedSamples) -> list[Seen]:
    """Each corpus at the end of the run."""
    deal = samples.deal
    counts = deal.counts(max(deal.terms.end, deal.terms.first))
    return [
        Seen(of.label, count, int(count * corpus.tokens_per_sample), Fraction(count) / corpus.samples_per_epoch)
        for of, count, corpus in zip(config.data.train, counts, samples.corpora, strict=True)
    ]


def report(config: Config, samples: BlendedSamples, place: Reached = Reached()) -> list[str]:
    """The blend of a run as lines: its corpora at the end, and their shares on the way there."""
    rows = seen(config, samples)
    names = [short(row.label) for row in rows]
    wide = max(map(len, ("corpus", *names)))
    lines = [f"{'corpus':{wide}} {'samples':>15} {'tokens':>19} {'epochs':>9}  each document is seen"]
    lines += [
        f"{name:{wide}} {row.samples:>15,} {row.tokens:>19,} {float(row.epochs):>9.2f}  {row.times}"
        for name, row in zip(names, rows, strict=True)
    ]
    lines.append(f"{'total':{wide}} {sum(row.samples for row in rows):>15,} {sum(row.tokens for row in rows):>19,}")
    return [*lines, *_shares(config, samples.deal, place)]


def warnings(config: Config, samples: BlendedSamples) -> list[str]:
    """A line for each corpus that is seen more often than is worth it, unless its own key says so."""
    return [
        f"warning: {short(row.label)} is seen {float(row.epochs):.1f} times by the end; beyond {OFTEN} times repeated text teaches ever "
        "less (arXiv:2305.16264). Add text, give it a smaller weight or max_epochs, or train on fewer tokens"
        for row, corpus in zip(seen(config, samples), config.data.train, strict=True)
        if row.epochs > OFTEN and max(corpus.epochs or 0, corpus.max_epochs or 0) <= OFTEN
    ]


def short(label: str) -> str:
    """The end of a label, which tells paths apart."""
    return label if len(label) <= WIDEST else f"...{label[3 - WIDEST :]}"


def _shares(config: Config, deal: Deal, place: Reached) -> Iterator[str]:
    """The shares of each stretch that is not over, and who has left the blend where it begins.

    Left out are those within the last step, and those by which a corpus with `epochs`, of few samples, is done a little before the end.
    """
    corpora, end = config.data.train, max(deal.terms.end, place.consumed + 1)
    ends = [*(stretch.first for stretch in deal.stretches[1:]), end]
    last = max(place.consumed, end - budget_of(config).batch_size(end))
    begins = {piece.first for piece in deal.terms.pieces}
    before: tuple[Fraction, ...] = ()
    for stretch, until in zip(deal.stretches, ends, strict=True):
        left = [i for i, had in enumerate(before) if had and stretch.before[i] == deal.terms.most[i]]
        done = bool(left) and all(deal.terms.even[i] for i in left) and stretch.first not in begins
        if place.consumed < until and stretch.first <= last and not done:
            total = sum(stretch.shares)
            parts = [
                f"{short(of.label)} {float(share / total):.1%}"
                for of, share in zip(corpora, stretch.shares, strict=True)
                if share
            ]
            gone = "".join(f"; {allowed(corpora[i])}, and leaves" for i in left)
            yield f"from step {place.step_of(config, stretch.first)}: {', '.join(parts)}{gone}"
        before = stretch.shares


def allowed(corpus: CorpusConfig) -> str:
    """How often a corpus may be seen, once it has been."""
    return f"{short(corpus.label)} has been seen {times(corpus.epochs or corpus.max_epochs or 0)}"


def times(number: float) -> str:
    """A number of times, in words."""
    return "once" if number == 1 else f"{number:g} times"


def _used_up(config: Config, samples: BlendedSamples, error: UsedUpError, place: Reached) -> str:
    """The error for corpora that end before the run does."""
    terms, corpora = samples.terms, config.data.train
    ended = [i for i, most in enumerate(terms.most) if most is not None and error.given[i] >= most]
    others = [of.label for i, of in enumerate(corpora) if i not in ended]
    said = (
        f"the corpora of data.train end before the run does: at its sample {error.sample:,} of {terms.end:,}, in step "
        f"{place.step_of(config, error.sample)}, {' and '.join(allowed(corpora[i]) for i in ended)}"
    )
    if others:
        return f"{said}, and the weights there have no other. Give {short(others[0])} one there, or raise max_epochs."
    more = math.ceil(Fraction(100 * (terms.end + len(corpora)), max(1, error.sample))) / 100
    ways = [place.longest(config, error.sample), f"epochs and max_epochs that are {more:g} times as large"]
    ways += ["no max_epochs for one of them"] if any(of.max_epochs for of in corpora) else []
    return f"{said}. Use {', or '.join(filter(None, ways))}."


def _nothing_left(config: Config, samples: BlendedSamples, error: NothingLeftError, place: Reached) -> str:
    """The error for epochs that ask for the whole run where others have weights."""
    terms, corpora = samples.terms, config.data.train
    ahead = terms.end - terms.first
    asked, other = math.ceil(error.share * ahead), next(of.label for of in corpora if of.epochs is None)
    steps = place.step_of(config, terms.first + asked)
    tokens = (terms.first + asked + 1) * config.model.seq_length
    longer = f"train.steps={steps}" if config.train.tokens is None else f"train.tokens={tokens}"
    return (
        f"the epochs of data.train ask for {asked:,} samples, and the run has {ahead:,} ahead, so that nothing is left for {short(other)}, "
        f"which has a weight. Use {longer} or more, smaller epochs, or max_epochs in the place of epochs."
    )
