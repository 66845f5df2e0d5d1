"""How fast de-duplication is, and which share of near duplicates it finds: the figures of docs/duplicates.md.

    python docs/benchmarks/duplicates.py [--megabytes 40] [--rounds 3] [--pairs 20000]

Speeds are megabytes of UTF-8 a second of CPU time of one process, the median of some rounds that take turns; the text is the sources and
documentation of this environment's packages, with an edited copy of every tenth file. datasketch is measured too where it is installed
(`pip install datasketch`), on the same shingles of a tenth of the text.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from megatrain.corpus.document import Document, Tally
from megatrain.corpus.duplicates.fingerprints import fingerprinting
from megatrain.corpus.duplicates.leaks import leaks_step
from megatrain.corpus.duplicates.minhash import band_keys, signatures
from megatrain.corpus.duplicates.parameters import DedupConfig, LeakConfig, LeakSet
from megatrain.corpus.duplicates.passes import Deduplication

NEAR = DedupConfig(exact="none")
EXACT, LINES = DedupConfig(near=False), DedupConfig(exact="none", near=False, lines="lines")


def collected(most: int) -> list[str]:
    """Files of text of this environment, in the order of a fixed shuffle, and edited copies of some, of so many characters."""
    paths = [path for name in ("stdlib", "purelib") for path in Path(sysconfig.get_path(name)).rglob("*")]
    found = sorted({path for path in paths if path.suffix in (".py", ".rst", ".md", ".txt") and path.is_file()})
    draw = random.Random(1)
    draw.shuffle(found)
    texts: list[str] = []
    held = 0
    for path in found:
        text = path.read_text(errors="replace")
        texts.append(text)
        if len(texts) % 10 == 0:
            texts.append("".join(line for line in text.splitlines(keepends=True) if draw.random() > 0.02))
        held += len(text)
        if held > most:
            break
    return texts


def deduplicated(texts: list[str], settings: DedupConfig) -> int:
    """How many documents are removed; all passes over files, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder, "unit")
        with fingerprinting(unit, settings) as prints:
            for text in texts:
                prints.add(text)
        job = Deduplication([unit], lambda name, task: Path(folder, f"{name}-{task}"), settings)
        for work in job.passes():
            for task in work.tasks:
                task.write(job.where(work.name, task.name))
        return len(job.removals().of(0))


def signed(texts: list[str]) -> None:
    """Signatures of texts, some at a time."""
    for begin in range(0, len(texts), 50):
        signatures(texts[begin : begin + 50])


def with_datasketch(texts: list[str]) -> None:
    """The same signatures by datasketch, with its default hash (sha1)."""
    from datasketch import MinHash

    for text in texts:
        words = text.lower().split()
        of = MinHash(120)
        of.update_batch([" ".join(words[i : i + 5]).encode() for i in range(max(len(words) - 4, 1))])


def looked_through(texts: list[str], folder: str) -> None:
    """Texts compared with an evaluation set that is made of some of their words."""
    draw, words = random.Random(2), " ".join(texts[:50]).split()
    file = Path(folder, "set.txt")
    file.write_text("\n".join(" ".join(draw.choices(words, k=40)) for _ in range(5000)))
    step = leaks_step(LeakConfig(sets=(LeakSet("set", (str(file),)),)))
    for text in texts:
        step(Document(text, "", "", 0), Tally())


def speeds(texts: list[str], rounds: int) -> None:
    """Print the speed of each stage."""
    tenth = texts[::10]
    with tempfile.TemporaryDirectory() as folder:
        stages: dict[str, tuple[Callable[[], object], list[str]]] = {
            "signatures": (lambda: signed(texts), texts),
            "near duplicates, all passes": (lambda: deduplicated(texts, NEAR), texts),
            "exact documents, all passes": (lambda: deduplicated(texts, EXACT), texts),
            "lines, all passes": (lambda: deduplicated(texts, LINES), texts),
            "leaks": (lambda: looked_through(texts, folder), texts),
        }
        if find_spec("datasketch"):
            stages["signatures by datasketch"] = (lambda: with_datasketch(tenth), tenth)
        for settings in (NEAR, EXACT, LINES):
            deduplicated(texts[:20], settings)  # compiled
        looked_through(texts[:20], folder)
        found: dict[str, list[float]] = {name: [] for name in stages}
        for _ in range(rounds):
            for name, (run, over) in stages.items():
                begin = time.process_time()
                run()
                found[name].append(sum(len(text.encode()) for text in over) / 1e6 / (time.process_time() - begin))
    for name, all_found in found.items():
        print(f"{name:30} {statistics.median(all_found):8.1f} MB/s")
    print(f"{deduplicated(texts, NEAR):,} of {len(texts):,} documents are near duplicates")


def shingles(words: list[str]) -> set[tuple[str, ...]]:
    """Every 5 words that follow each other."""
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def recall(pairs: int) -> None:
    """Print which share of pairs is found, by their true similarity in steps of 0.05."""
    draw = random.Random(17)
    counts = {step: [0, 0] for step in range(20)}
    for _ in range(-(-pairs // 1000)):
        texts = [[str(draw.randrange(10**6)) for _ in range(150)] for _ in range(1000)]
        others = [list(words) for words in texts]
        for other in others:  # scattered words, or a block of them
            length = draw.choice((1, draw.randrange(2, 70)))
            for at in draw.sample(range(150 - length), draw.randrange(1, 16) if length == 1 else 1):
                other[at : at + length] = [str(draw.randrange(10**6)) for _ in range(length)]
        of, _ = signatures([" ".join(words) for words in texts + others])
        keys = band_keys(of, NEAR.bands, NEAR.band_rows)
        found = (keys[:, :1000] == keys[:, 1000:]).any(0) & ((of[:1000] == of[1000:]).mean(1) >= NEAR.agreement)
        for i, (one, other) in enumerate(zip(texts, others, strict=True)):
            a, b = shingles(one), shingles(other)
            step = min(int(20 * len(a & b) / len(a | b)), 19)
            counts[step][0] += 1
            counts[step][1] += int(found[i])
    for step, (total, removed) in counts.items():
        if total:
            print(f"J {step / 20:.2f} .. {(step + 1) / 20:.2f}   {removed / total:7.4f} of {total:,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=20_000)
    arguments = parser.parse_args()
    speeds(collected(int(arguments.megabytes * 1e6)), arguments.rounds)
    recall(arguments.pairs)
