"""Megabytes of text a second of processor time that one worker of `data prepare` reads, cleans and judges.

    python docs/benchmarks/prepare_speed.py TEXT.jsonl [--rules gopher,c4] [--near] [--profile]

Prints MB/s of the whole first phase (language found, personal data masked, the shard written), then what each stage costs by itself: the
time of a phase up to it less that of the one before. Compiled functions are warm, and files in the page cache.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatrain.corpus.duplicates.parameters import DedupConfig
from megatrain.corpus.mapping import Last, map_unit
from megatrain.corpus.prepare_config import PrepareConfig
from megatrain.corpus.reading.choices import ReadConfig, SourceConfig
from megatrain.corpus.reading.units import cut_units

ROUNDS = 3


def timed(work: Callable[[], object]) -> float:
    """The least seconds of processor time of some rounds."""
    found = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("--rules", default="gopher,c4")
    parser.add_argument("--near", action="store_true", help="fingerprint documents too")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    arguments = parser.parse_args()
    source = SourceConfig("text", (str(arguments.text),), rules=tuple(arguments.rules.split(",")))
    read = ReadConfig((source,), unit_bytes=1 << 30)
    dedup = DedupConfig(exact="text" if arguments.near else "none", near=arguments.near)
    config = PrepareConfig(read=read, dedup=dedup)
    megabytes, (unit,) = arguments.text.stat().st_size / 1e6, cut_units(read)

    def phase(last: Last) -> None:
        with tempfile.TemporaryDirectory() as folder:
            map_unit(unit, config, last, Path(folder), lambda _count: None)

    phase("filter")
    if arguments.profile:
        with cProfile.Profile(time.process_time) as profile:
            phase("filter")
        pstats.Stats(profile).sort_stats("cumtime").print_stats(60)
        return
    before = 0.0
    stages: tuple[Last, ...] = ("read", "clean", "filter")
    for last in stages:
        seconds = timed(lambda last=last: phase(last))  # type: ignore[misc]
        print(f"{last:8} {megabytes / (seconds - before):8.1f} MB/s by itself, {megabytes / seconds:8.1f} MB/s up to here")
        before = seconds


if __name__ == "__main__":
    main()
