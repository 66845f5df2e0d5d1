"""A merged tally as what the report shows: stages, rules, sources, histograms; and the alarms in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FEW = 20
"""Documents of a source below which shares raise no alarm."""


@dataclass(frozen=True)
class AlarmLimits:
    """When an alarm is raised."""

    loses: float = 0.3
    """Share of its documents that a source loses on the whole way, above which."""
    removes: float = 0.5
    """Share of a source that one rule refuses, above which."""
    cluster: int | None = 1000
    """Documents of a cluster of duplicates, above which; None: no alarm."""


USUAL = AlarmLimits()


@dataclass
class Flow:
    """Documents and bytes by source, and documents by length."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    letters: Counter[int] = field(default_factory=Counter)
    """Documents by bin of their number of characters."""


@dataclass
class RuleCount:
    """The documents that a rule refuses, and those that no other rule of the stage refuses."""

    refused: Flow = field(default_factory=Flow)
    alone: Flow = field(default_factory=Flow)


@dataclass
class StageCount:
    """Documents into and out of a stage, and by rule."""

    name: str
    into: Flow = field(default_factory=Flow)
    out: Flow = field(default_factory=Flow)
    rules: dict[str, RuleCount] = field(default_factory=dict)
    languages: Counter[str] = field(default_factory=Counter)


@dataclass
class Summary:
    """Everything that an audit's counts say."""

    stages: list[StageCount]
    tokens: Counter[str] = field(default_factory=Counter)
    tokenized: Counter[str] = field(default_factory=Counter)
    copies: Flow = field(default_factory=Flow)
    """Changed copies, which the tokens count too, and documents and bytes of stages do not."""
    perplexities: dict[str, Counter[int]] = field(default_factory=dict)
    """Documents by bin of their perplexity, by language."""
    clusters: dict[str, Counter[int]] = field(default_factory=dict)
    """Number of clusters by size, by kind."""
    others: Counter[str] = field(default_factory=Counter)
    """Counts of the steps themselves, such as "clean.email"."""
    limits: AlarmLimits = USUAL

    def rate(self, source: str) -> float:
        """Tokens a byte of a source, or of all where it has none tokenized; 0 where nothing is."""
        if self.tokenized[source]:
            return self.tokens[source] / self.tokenized[source]
        return self.tokens.total() / self.tokenized.total() if self.tokenized.total() else 0.0

    def about(self, flow: Flow) -> int:
        """The tokens that the bytes of a flow make, at the rate of each source."""
        return round(sum(self.rate(source) * size for source, size in flow.bytes.items()))


def summary_of(counts: Mapping[str, int], stages: Sequence[str], limits: AlarmLimits = USUAL) -> Summary:
    """The summary of a tally's counts. stages: their names in order; others that the counts name follow, by name."""
    by_name = {name: StageCount(name) for name in stages}
    rest: list[tuple[str, list[str], int]] = []
    summary = Summary([], limits=limits)
    for name, number in sorted(counts.items()):
        head, *parts = name.split("/")
        if parts and parts[0] in ("in", "out", "refused", "alone", "language"):
            _count(by_name.setdefault(head, StageCount(head)), parts, number)
        else:
            rest.append((head, parts, number))
    for head, parts, number in rest:
        if head in ("tokens", "tokenized") and parts:
            (summary.tokens if head == "tokens" else summary.tokenized)["/".join(parts)] += number
        elif head == "copies" and parts:
            (summary.copies.documents if parts[0] == "documents" else summary.copies.bytes)["/".join(parts[1:])] += number
        elif head in ("perplexity", "cluster") and len(parts) == 2:
            group = summary.perplexities if head == "perplexity" else summary.clusters
            group.setdefault(parts[0], Counter())[int(parts[1])] += number
        else:
            summary.others["/".join((head, *parts))] += number
    summary.stages = [stage for stage in by_name.values() if stage.into.documents or stage.out.documents or stage.rules]
    return summary


def _count(stage: StageCount, parts: Sequence[str], number: int) -> None:
    """Enter one count of a stage; parts: its name without the stage's."""
    way, first, *last = parts
    if way == "language":
        stage.languages["/".join((first, *last))] += number
        return
    flow = stage.into if way == "in" else stage.out
    if way in ("refused", "alone"):
        rule = stage.rules.setdefault(first, RuleCount())
        flow = rule.refused if way == "refused" else rule.alone
        first, *last = last
    if first == "letters":
        flow.letters[int(last[0])] += number
    else:
        (flow.documents if first == "documents" else flow.bytes)["/".join(last)] += number


def alarms(summary: Summary) -> list[str]:
    """The things that a user should look at, a sentence each."""
    return [*_losing(summary), *_removing(summary), *_swallowing(summary)]


def _losing(summary: Summary) -> list[str]:
    """Sources that lose much on the whole way."""
    found = []
    if not summary.stages:
        return []
    first, last = summary.stages[0].into.documents, summary.stages[-1].out.documents
    for source, before in sorted(first.items()):
        lost = before - last[source]
        if not lost or (last[source] and (before < FEW or lost <= summary.limits.loses * before)):
            continue
        worst = max(summary.stages, key=lambda stage: stage.into.documents[source] - stage.out.documents[source])
        most = worst.into.documents[source] - worst.out.documents[source]
        found.append(
            f"source {source} loses {_percent(lost, before)} of its documents ({lost:,} of {before:,}), most of them in "
            f"{worst.name} ({most:,})"
        )
    return found


def _removing(summary: Summary) -> list[str]:
    """Rules that refuse much of a source."""
    found = []
    for stage in summary.stages:
        for name, rule in stage.rules.items():
            for source, refused in sorted(rule.refused.documents.items()):
                before = stage.into.documents[source]
                if before >= FEW and refused > summary.limits.removes * before:
                    found.append(
                        f"rule {name} of {stage.name} refuses {_percent(refused, before)} of source {source} ({refused:,} of "
                        f"{before:,} documents)"
                    )
    return found


def _swallowing(summary: Summary) -> list[str]:
    """Clusters that are suspiciously large."""
    limit = summary.limits.cluster
    if limit is None:
        return []
    found = []
    for kind, sizes in sorted(summary.clusters.items()):
        large = {size: number for size, number in sizes.items() if size > limit}
        if large:
            found.append(
                f"clusters of {kind} duplicates with more than {limit:,} documents: {sum(large.values()):,}, the "
                f"largest of {max(large):,}"
            )
    return found


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%"
