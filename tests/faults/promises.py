"""What is promised when something breaks, measured: one row for each test marked `fault`, and the table of docs/reliability.md.

    @pytest.mark.fault(injection="kill -9 of one rank in a step", promise="all ranks end, the error names it", bound=30, layout="tp 2")
    def test_one_rank_is_killed(measured):
        ...
        measured.detected(seconds)  # asserts that they are within the bound
        measured.recovered(seconds, lost=steps)

A text may have `{name}` of a parameter of the test. A mark without texts makes no row. The row is HELD if the test has passed. It is a
line of JSON in the file named by MEGATRAIN_FAULTS, where it replaces the one that the test left before; `launch/faults.sh` sets it.

    python tests/faults/promises.py ROWS.jsonl [PAGE.md]    the table of these rows, in the page between its two markers if one is given
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

ROWS = "MEGATRAIN_FAULTS"
BEGIN, END = "<!-- table: written by launch/faults.sh -->", "<!-- end of the table -->"
HEAD = "| injection | promise | layout | within s | detected after s | recovered after s | steps lost | |"


@dataclass
class Measured:
    """What one test has seen; of several measurements of a kind the largest counts."""

    bound: float | None = None
    detected_after: float | None = None
    recovered_after: float | None = None
    lost: int | None = None

    def detected(self, seconds: float) -> None:
        """The fault was told, or all have ended, so many seconds after it. Asserts the bound."""
        self.detected_after = max(seconds, self.detected_after or 0.0)
        assert self.bound is None or seconds <= self.bound, f"detected after {seconds:.1f} s, promised within {self.bound:g} s"

    def recovered(self, seconds: float | None = None, lost: int = 0) -> None:
        """The run went on so many seconds after the fault, or after its new start, and trained `lost` steps again."""
        if seconds is not None:
            self.recovered_after = max(seconds, self.recovered_after or 0.0)
        self.lost = max(lost, self.lost or 0)


MEASURED, PROGRESS = pytest.StashKey[Measured](), pytest.StashKey["Progress"]()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """Where a test marked `fault` says what it has measured."""
    return request.node.stash.setdefault(MEASURED, Measured(bound_of(request.node)))


def bound_of(item: pytest.Item) -> float | None:
    """The bound of a test's mark, in seconds: a number, or a text of one parameter and a number, as `{limit} + 10`."""
    mark, values = item.get_closest_marker("fault"), getattr(item, "callspec", None)
    bound = mark.kwargs.get("bound") if mark else None
    if not isinstance(bound, str):
        return bound
    return sum(float(part) for part in bound.format(**values.params if values else {}).split("+"))


def row(item: pytest.Item, held: bool, seconds: float) -> dict[str, Any] | None:
    """The row of a test that took so many seconds; None for one that promises nothing in words."""
    mark = item.get_closest_marker("fault")
    if mark is None or "injection" not in mark.kwargs:
        return None
    told = {"promise": "", "layout": "", **mark.kwargs}
    values = getattr(item, "callspec", None)
    texts = {key: told[key].format(**(values.params if values else {})) for key in ("injection", "promise", "layout")}
    measures = asdict(item.stash.get(MEASURED, Measured(bound_of(item))))
    return {"test": item.nodeid, **texts, **measures, "held": held, "seconds": round(seconds, 1)}


# --- hooks; tests/conftest.py registers this module -------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a session is that leaves rows."""

    path: Path
    left: list[str]
    known: dict[str, float]
    """Seconds of each test in the last session that ran it."""

    def minutes(self) -> float:
        """About how long the tests that are left will take; those never seen as long as the others do on average."""
        average = sum(self.known.values()) / max(1, len(self.known))
        return sum(self.known.get(test, average) for test in self.left) / 60


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where rows are asked for, look up how long the tests took the last time."""
    if path := os.environ.get(ROWS):
        known = {told["test"]: told["seconds"] for told in read(Path(path))}
        session.config.stash[PROGRESS] = Progress(Path(path), [item.nodeid for item in session.items], known)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test; then write its row and tell what is left."""
    began, progress = time.monotonic(), item.config.stash.get(PROGRESS, None)
    result = yield
    if progress is None:
        return result
    seconds = time.monotonic() - began
    progress.left.remove(item.nodeid)
    progress.known[item.nodeid] = seconds
    told = row(item, item.stash.get(HELD, False), seconds)
    if told:
        write(progress.path, told)
    print(f"\n    {seconds:.0f} s; {len(progress.left)} left, about {progress.minutes():.0f} min", flush=True)
    return result


HELD = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Note whether every phase of a test has passed."""
    report = yield
    item.stash[HELD] = item.stash.get(HELD, True) and report.passed
    return report


# --- rows and the table ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, which may not be there yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path: Path, told: dict[str, Any]) -> None:
    """Put a row in the place of the one of the same test, or at the end."""
    rows = read(path)
    tests = [one["test"] for one in rows]
    at = tests.index(told["test"]) if told["test"] in tests else len(rows)
    rows[at : at + 1] = [told]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of rows, each as long as it needs; what was not measured is empty."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [HEAD, "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for one in rows:
        measures = (
            number(one["bound"], "g"),
            number(one["detected_after"], ".1f"),
            number(one["recovered_after"], ".1f"),
            number(one["lost"], "d"),
        )
        cells = (one["injection"], one["promise"], one["layout"], *measures, "HELD" if one["held"] else "**FAILED**")
        lines.append("| " + " | ".join(cells).replace("|  |", "| |").replace("|  |", "| |") + " |")
    return "\n".join(lines) + "\n"


def between(page: str, text: str) -> str:
    """The page with `text` between its two markers. Raises ValueError without them."""
    before, marker, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not marker or not end:
        raise ValueError(f"the page has no {BEGIN} with {END} behind it")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def main(rows: str, page: str = "") -> None:
    """Print the table, or write it into a page."""
    text = table(read(Path(rows)))
    if page:
        Path(page).write_text(between(Path(page).read_text(), text))
    else:
        print(text, end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
