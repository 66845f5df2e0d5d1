"""Writes REPORT.md: what a preparation took in, what it removed and why, and what is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatrain.corpus.document import Sighting
from megatrain.corpus.report.bins import quantile
from megatrain.corpus.report.examples import Example, Examples
from megatrain.corpus.report.summary import StageCount, Summary, alarms
from megatrain.files import brief, printable

QUANTILES = (0.05, 0.3, 0.5, 0.6, 0.95)


def page(
    summary: Summary,
    places: Mapping[str, Sequence[Sighting]],
    *,
    title: str,
    note: str = "",
    found: Sequence[str] = (),
    linked: bool = True,
    pictures: Iterable[str] = (),
    cutoffs: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """REPORT.md as text.

    places: of each problem, as in a tally. note: a paragraph below the title. found: alarms that others raise. linked: whether sheet.md
    and removed.md lie beside the page. pictures: names of files beside it. cutoffs: the perplexities where middle and tail begin, by
    language.
    """
    parts = [
        f"# {_cell(title)}",
        _cell(note),
        _whole(summary),
        "## Alarms\n\n" + ("\n".join(f"- {_cell(line)}" for line in (*alarms(summary), *found)) or "None."),
        "To read: [documents that are kept](sheet.md), [what rules refuse](removed.md)." if linked else "",
        _stages(summary),
        *(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
        *(_rules(summary, stage) for stage in summary.stages if stage.rules),
        _sources(summary),
        _languages(summary),
        _quantiles("Lengths", "characters of documents", _lengths(summary)),
        _perplexities(summary, cutoffs or {}),
        _clusters(summary),
        _problems(summary, places),
        _others(summary, places),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def examples_page(removed: Examples) -> str:
    """removed.md: examples of the documents that each rule refused, a line each."""
    parts = ["# Examples of what each rule refuses", "Chosen by a hash of seed, rule and document; each shows how it begins."]
    for name in removed.names():
        parts += [f"## {_cell(name)}", "\n".join(map(_example, removed.of(name)))]
    return "\n\n".join(parts) + "\n"


def _example(row: Example) -> str:
    said = f" ({brief(row.said)})" if row.said else ""
    return f"- `{_code(row.file)}:{row.at}`{_cell(said)}, {row.letters:,} characters: `{_code(row.text)}`"


def _whole(summary: Summary) -> str:
    if not summary.stages:
        return "Nothing was counted."
    into, out = summary.stages[0].into, summary.stages[-1].out
    tokens = f", {summary.tokens.total():,} tokens" if summary.tokens else ""
    before, after = into.documents.total(), out.documents.total()
    return (
        f"{before:,} documents ({_size(into.bytes.total())}) became {after:,} ({_share(after, before)}; "
        f"{_size(out.bytes.total())}, {_share(out.bytes.total(), into.bytes.total())} of the bytes{tokens}).{_copies(summary)}"
    )


def _copies(summary: Summary) -> str:
    """The changed copies of documents, if there are any."""
    copies = summary.copies
    each = ", ".join(
        f"{source} {number:,} ({_size(copies.bytes[source])})" for source, number in sorted(copies.documents.items())
    )
    also = ", which the tokens count too" if summary.tokens else ""
    return (
        f" Beside them stand {copies.documents.total():,} changed copies ({_size(copies.bytes.total())}){also}: {each}."
        if each
        else ""
    )


def _stages(summary: Summary) -> str:
    tokens = bool(summary.tokenized)
    head = ["stage", "documents in", "out", "kept", "bytes in", "out", *(("tokens in", "out") if tokens else ())]
    rows = []
    for stage in summary.stages:
        into, out = stage.into, stage.out
        row = [stage.name, f"{into.documents.total():,}", f"{out.documents.total():,}"]
        row += [_share(out.documents.total(), into.documents.total()), _size(into.bytes.total()), _size(out.bytes.total())]
        rows.append([*row, *((f"{summary.about(into):,}", f"{summary.about(out):,}") if tokens else ())])
    note = "\n\nTokens are counted where text is tokenized; before that they are its bytes at the same rate." if tokens else ""
    return "## Stages\n\n" + _table(head, rows) + note if rows else ""


def _rules(summary: Summary, stage: StageCount) -> str:
    """The rules of a stage, the one that refuses most first."""
    before, size, tokens = stage.into.documents.total(), stage.into.bytes.total(), bool(summary.tokenized)
    rows = []
    for name, rule in sorted(stage.rules.items(), key=lambda item: (-item[1].refused.documents.total(), item[0])):
        refused, alone = rule.refused.documents, rule.alone.documents.total()
        worst = max(refused, key=lambda source: (_part(refused, stage, source), source), default="")
        row = [name, f"{refused.total():,}", _share(refused.total(), before), _share(rule.refused.bytes.total(), size)]
        row += [f"{summary.about(rule.refused):,}"] if tokens else []
        rows.append([*row, f"{alone:,}", f"{worst} {100 * _part(refused, stage, worst):.1f}%"])
    head = ["rule", "refuses", "of documents", "of bytes", *(["tokens"] if tokens else []), "it alone", "most of source"]
    return (
        f"## Rules of {_cell(stage.name)}\n\n{_table(head, rows)}\n\nA document may be refused by several rules; `it alone`: by "
        "no other rule of the stage, so it would stay without this one."
    )


def _part(refused: Counter[str], stage: StageCount, source: str) -> float:
    return refused[source] / max(1, stage.into.documents[source])


def _sources(summary: Summary) -> str:
    """For each source, what is left of it, and the share that each stage took."""
    if not summary.stages:
        return ""
    first, last = summary.stages[0].into, summary.stages[-1].out
    names = [stage.name for stage in summary.stages]
    rows = []
    for source in sorted(first.documents | last.documents):
        before = first.documents[source]
        lost = (stage.into.documents[source] - stage.out.documents[source] for stage in summary.stages)
        rows.append(
            [source, f"{before:,}", f"{last.documents[source]:,}", _share(last.documents[source], before)]
            + [_size(last.bytes[source]), *([f"{summary.rate(source):.3f}"] if summary.tokenized[source] else ["-"])]
            + [_share(number, before) for number in lost]
        )
    head = ["source", "documents", "left", "kept", "bytes left", "tokens a byte", *(f"lost in {name}" for name in names)]
    return f"## Sources\n\n{_table(head, rows)}" if rows else ""


def _languages(summary: Summary) -> str:
    """Documents by language where they leave each stage."""
    stages = [stage for stage in summary.stages if stage.languages]
    codes = Counter[str]()
    for stage in stages:
        codes |= stage.languages
    if not set(codes) - {"?"}:
        return ""
    rows = [[code, *(f"{stage.languages[code]:,}" for stage in stages)] for code, _ in _ranked(codes)[:30]]
    return "## Languages\n\n" + _table(["language", *(f"after {stage.name}" for stage in stages)], rows)


def _lengths(summary: Summary) -> Iterator[tuple[str, Counter[int]]]:
    if summary.stages:
        first, last = summary.stages[0], summary.stages[-1]
        yield f"into {first.name}", first.into.letters
        if last.out.letters != first.into.letters:
            yield f"out of {last.name}", last.out.letters


def _quantiles(title: str, what: str, histograms: Iterable[tuple[str, Counter[int]]]) -> str:
    rows = [[name, *(_number(quantile(bins, share)) for share in QUANTILES)] for name, bins in histograms if bins]
    head = [what, *(f"{100 * share:.0f}%" for share in QUANTILES)]
    return f"## {title}\n\n{_table(head, rows)}" if rows else ""


def _perplexities(summary: Summary, cutoffs: Mapping[str, tuple[float, float]]) -> str:
    found = _quantiles("Perplexities", "perplexity by language", sorted(summary.perplexities.items()))
    used = ", ".join(f"{code} {middle:.1f} and {tail:.1f}" for code, (middle, tail) in sorted(cutoffs.items()))
    return f"{found}\n\nThe middle and the tail begin at: {used}." if found and used else found


def _clusters(summary: Summary) -> str:
    """Clusters by size, in octaves."""
    if not summary.clusters:
        return ""
    octaves = sorted({size.bit_length() for sizes in summary.clusters.values() for size in sizes})
    rows = []
    for kind, sizes in sorted(summary.clusters.items()):
        within = Counter[int]()
        for size, number in sizes.items():
            within[size.bit_length()] += number
        rows.append([kind, *(f"{within[octave]:,}" for octave in octaves), f"{max(sizes):,}"])
    head = ["duplicates", *(_octave(octave) for octave in octaves), "largest"]
    return "## Clusters of duplicates\n\nNumber of clusters by their documents:\n\n" + _table(head, rows)


def _octave(bits: int) -> str:
    low, high = 1 << bits >> 1, (1 << bits) - 1
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _problems(summary: Summary, places: Mapping[str, Sequence[Sighting]]) -> str:
    lines = []
    for name in sorted(places):
        number = summary.others[name]
        lines.append(f"- **{_cell(name)}**: {number:,}")
        for place in places[name]:
            where = f", {place.where}" if place.where else ""
            lines.append(f"  - `{_code(place.file)}`{_cell(where)}: {_cell(brief(place.said))}")
        if number > len(places[name]):
            lines.append(f"  - and {number - len(places[name]):,} more")
    return "## Problems\n\n" + "\n".join(lines) if lines else ""


def _others(summary: Summary, places: Mapping[str, Any]) -> str:
    rows = [
        [name, f"{number:,}"]
        for name, number in sorted(summary.others.items())
        if name not in places and not name.startswith("language.")
    ]
    return "## Other counts\n\n" + _table(["what", "number"], rows) if rows else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """The counts, largest first, equal ones by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _cell(text: str) -> str:
    """A text of a file as Markdown that is nothing but text: one line, no column, no tag, no link."""
    shown = printable(text)
    return "".join(f"\\{letter}" if letter in "|<>[]`*\\" else letter for letter in shown)


def _code(text: str) -> str:
    """A text between backticks."""
    return printable(text).replace("`", "'")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def _size(size: float) -> str:
    """A number of bytes in units of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
