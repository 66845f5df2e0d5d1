"""Small jobs that are broken on purpose: 2 or 4 ranks over gloo, by layout, and what was seen of the break."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jobs
import psutil

STEPS, SAVE_EVERY = 24, 4
SABOTAGE = Path(__file__).with_name("sabotage.py")
ROOT = Path(__file__).resolve().parents[2]


class Layout(NamedTuple):
    """So many ranks, and the keys that lay the model over them."""

    size: int
    keys: tuple[str, ...]


LAYOUTS = {
    "tp 2 x pp 2": Layout(4, ("parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2")),
    "dp 2": Layout(2, ()),
    "pp 2": Layout(2, ("parallel.pipeline_parallel_size=2",)),
    "1 rank": Layout(1, ()),
    "tp 2 x dp 2": Layout(4, ("parallel.tensor_parallel_size=2",)),
}
MAIN = "tp 2 x pp 2"


@dataclass
class House:
    """A folder with data and a config, and the jobs that are started there."""

    folder: Path
    whole: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def run(self, name: str) -> Path:
        """The directory of a run."""
        return self.folder / name

    def words(self, layout: str, name: str, *more: str) -> list[str]:
        """The words of a run behind its verb."""
        return [str(self.folder / "config.yaml"), f"log.dir={self.run(name)}", *LAYOUTS[layout].keys, *more]

    def start(self, layout: str, name: str, *more: str, act: dict[str, Any] | None = None) -> jobs.Job:
        """Start a run's ranks. act: of sabotage.py."""
        size, words = LAYOUTS[layout].size, self.words(layout, name, *more)
        folder = self.folder / f"job_{name}_{time.monotonic_ns()}"
        if act is None:
            return jobs.start(folder, words, size)
        job, port = jobs.Job(folder), jobs.free_port()
        act = {"ranks": None, "where": "step", "at": 1, "told": str(self.told(name)), **act}
        for rank in range(size):
            env = {**jobs.environment(rank, size, port), "GLIBC_TUNABLES": ""}  # else it would start itself anew, unbroken
            job.fork([str(SABOTAGE), json.dumps(act), "train", *words], env)
        return job

    def told(self, name: str) -> Path:
        """The file in which a sabotaged run says when it happened."""
        return self.folder / f"told_{name}"

    def since(self, name: str) -> float:
        """Seconds since the sabotage of a run."""
        return time.monotonic() - float(self.told(name).read_text())

    def finish(self, layout: str, name: str, *more: str) -> list[jobs.Ended]:
        """Start a run and wait for its end."""
        with self.start(layout, name, *more) as job:
            return job.finish(2 * jobs.SECONDS)

    def undisturbed(self, layout: str, *more: str) -> Path:
        """The run that nothing happened to, trained once for all tests that ask for it."""
        key = (layout, *more)
        if key not in self.whole:
            name = f"whole_{len(self.whole)}"
            ended = self.finish(layout, name, *more)
            assert [end.code for end in ended] == [0] * len(ended), ended
            self.whole[key] = self.run(name)
        return self.whole[key]


def furnish(folder: Path, **sections: dict[str, Any]) -> House:
    """A house whose model has dropout, whose runs are deterministic and save every SAVE_EVERY of STEPS steps."""
    tree = jobs.tiny(
        jobs.write_store(folder / "data"),
        folder / "run",
        model={"dropout": 0.1},
        train={"steps": STEPS, "deterministic": True},
        checkpoint={"save_every": SAVE_EVERY, "keep": 0},
    )
    jobs.write_config(folder / "config.yaml", {key: {**part, **sections.get(key, {})} for key, part in tree.items()})
    return House(folder)


def count(variable: str, few: int) -> int:
    """How often a fault is tried: what the environment says, or `few`."""
    return int(os.environ.get(variable, few))


def codes(ended: Sequence[jobs.Ended]) -> list[int]:
    """Exit codes by rank."""
    return [end.code for end in ended]


def said(ended: Sequence[jobs.Ended]) -> str:
    """Everything that the ranks wrote on stderr."""
    return "\n".join(end.err for end in ended)


def lost(run: Path) -> int:
    """Steps that were trained more than once."""
    return jobs.row_count(run) - len(jobs.rows(run))


def kinds(run: Path, *of: str) -> list[dict[str, Any]]:
    """The run's events of these kinds."""
    return [event for event in jobs.events(run) if event["event"] in of]


def await_that(true: Callable[[], bool], what: str, seconds: float = 60.0) -> float:
    """Wait until something is true; the seconds that it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(0.005)
    return time.monotonic() - began


def first_row(job: jobs.Job, run: Path, rows: int) -> float:
    """Wait until a started job has recorded one more step than `rows`; the seconds that it took."""
    began = time.monotonic()
    assert jobs.wait_for_rows(job, run, rows + 1), said([job.ended(i) for i in range(len(job.processes))])
    return time.monotonic() - began


def no_process_is_left(run: Path, seconds: float = 10.0) -> None:
    """Assert that soon no process names the run."""

    def gone() -> bool:
        own = os.getpid()
        named = [one for one in psutil.process_iter(["cmdline"]) if any(str(run) in word for word in one.info["cmdline"] or [])]
        return all(one.pid == own for one in named)

    await_that(gone, f"no process of {run} is left", seconds)
