"""The last phase: the report, and the names under which users find what was made.

    OUT/REPORT.md, *.png ...       the report
    OUT/documents/SOURCE-N.jsonl.zst, OUT/held_out/...
    OUT/SOURCE.bin .idx ...        token stores; SOURCE_valid.* of the held-out documents
    OUT/tokenizer.json             where it was trained here
    OUT/blend.yaml                 the stores with the weights of their sources, to put into a training config
    OUT/prepared.json              all of these; those that an earlier run has left and this one has not are removed

They are links to the files of the phases, so they cost nothing, and each appears whole. Under a lock, since all workers come here at the
end: one does it, and two preparations in one folder end with the results of one of them.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import yaml

from megatrain.corpus import keeping, mapping, stores
from megatrain.corpus.duplicates import outcome
from megatrain.corpus.duplicates.leaks import LEAKS
from megatrain.corpus.perplexity import read_thresholds
from megatrain.corpus.prepare_config import PrepareConfig
from megatrain.corpus.report.compose import write_report
from megatrain.corpus.report.summary import AlarmLimits, summary_of
from megatrain.corpus.report.unit_audit import Audit
from megatrain.corpus.row_places import places_of, told_by_place
from megatrain.corpus.similar import Similar
from megatrain.corpus.work.chores import Phase, Published
from megatrain.files import doing, make_folder, whole

PREPARED, BLEND, PLACED = "prepared.json", "blend.yaml", "placed.json"
LOCK_SECONDS = 60.0
"""How long a worker waits for another one to give the results their names."""
STAGES = ("read", "clean", "filter", "dedup", "perplexity")


@dataclass
class Results:
    """The phases that are done, and what of them belongs to the result."""

    config: PrepareConfig
    sources: Sequence[str]
    """The source of each unit."""
    documents: Phase
    """The phase whose documents are the result."""
    audited: list[Phase]
    """Phases whose facts have an audit."""
    similar: Similar | None = None
    thresholds: Phase | None = None
    vocabulary: Phase | None = None
    tokens: Phase | None = None
    report: Phase | None = None


def report(results: Results, published: Published, folder: Path, progress: Callable[[int], None]) -> Mapping[str, Any]:
    """Write the report of all phases; its alarms."""
    output = results.config.output
    audit = Audit(output.seed, output.examples, output.sheet)
    for phase in results.audited:
        for chore in phase.chores:
            audit.add(Audit.from_json(published.facts(phase, chore.name)["audit"]))
            progress(0)
    found: list[str] = []
    if results.similar is not None:
        removals = results.similar.removals()
        for copies, number in removals.sizes().items():
            audit.tally.count(f"cluster/near/{copies + 1}", number)
        found = outcome.alarms(removals, results.sources, results.config.dedup)
        found = _by_place(audit, found, results.audited[0], published)
    found += _silent(audit, results.sources)
    if results.config.filter.mode == "annotate":
        found += _leaking(audit)
    cutoffs, limits = _cutoffs(results, published), AlarmLimits(cluster=None)  # the alarms found say more of clusters
    alarms = write_report(folder, audit, STAGES, found=found, cutoffs=cutoffs, limits=limits)
    progress(1)
    return {"alarms": alarms}


def _silent(audit: Audit, sources: Sequence[str]) -> list[str]:
    """Alarms for sources of which nothing was read, which tables do not show."""
    stages = summary_of(audit.tally.counts, STAGES).stages[:1]
    read = {source for stage in stages for source in stage.into.documents}
    return [
        f"source {source} has no document that can be read: look at the problems below, and at its key"
        for source in sorted({*sources} - read)
    ]


def _leaking(audit: Audit) -> list[str]:
    """Alarms for documents with passages of evaluation sets, where they stay."""
    rules = {
        name: rule.refused.documents
        for stage in summary_of(audit.tally.counts, STAGES).stages
        for name, rule in stage.rules.items()
        if name.startswith(LEAKS)
    }
    return [
        f"{count.total():,} documents have passages of the evaluation set {name.removeprefix(LEAKS)} and stay with filter.mode=annotate "
        f"({', '.join(f'{source} {number:,}' for source, number in sorted(count.items()))}): leave out those whose mark `breaks` has {name}"
        for name, count in sorted(rules.items())
    ]


def _by_place(audit: Audit, alarms: list[str], documents: Phase, published: Published) -> list[str]:
    """The alarms, with files and places where they tell of rows of units; so do the examples of the audit then.

    documents: the phase whose rows they are.
    """

    def shard(unit: int) -> Path:
        return published.file(documents, documents.chores[unit].name, mapping.DOCUMENTS)

    places = places_of([*audit.removed.said(), *alarms], shard)
    audit.removed.retell(partial(told_by_place, places=places))
    return [told_by_place(alarm, places) for alarm in alarms]


def _cutoffs(results: Results, published: Published) -> dict[str, tuple[float, float]]:
    """The perplexities where middle and tail of each language begin."""
    if results.thresholds is None:
        return {}
    path = published.file(results.thresholds, "all", keeping.THRESHOLDS)
    found = read_thresholds(path, results.config.perplexity)
    return {language: (threshold.middle, threshold.tail) for language, threshold in found.items() if threshold.documents}


def placed(target: Path, root: Path, run: str) -> list[str] | None:
    """The names of the results in the output folder, where those of a run are all there; root: the folder of the work."""
    try:
        names: list[str] = json.loads((target / PREPARED).read_bytes())["files"]
        same = json.loads((root / PLACED).read_bytes())["run"] == run
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return names if same and all((target / name).is_file() for name in names) else None


def place(results: Results, published: Published, run: str) -> list[str]:
    """Give everything its name in the output folder, unless another worker has; the names."""
    target = Path(results.config.output.dir)
    with _locked(published.root / PLACED) as mark:
        names = placed(target, published.root, run)
        if names is None:
            mark.unlink(missing_ok=True)
            names = _place(results, published, target)
            with whole(mark, text=True) as file:
                json.dump({"run": run}, file)
    return names


def _place(results: Results, published: Published, target: Path) -> list[str]:
    links = dict(_links(results, published))
    for name, path in links.items():
        link(path, target / name)
    blend = _blend(results, published)
    if blend:
        with whole(target / BLEND, text=True) as file:
            yaml.safe_dump(blend, file, sort_keys=False, allow_unicode=True)
    names = sorted([*links, *([BLEND] if blend else [])])
    _replace_list(target, names)
    return names


def _links(results: Results, published: Published) -> Iterator[tuple[str, Path]]:
    """(name below the output folder, file) of each result; what is looked at first comes last."""
    numbers: dict[str, int] = {}
    files = keeping.FILES if results.similar is not None else {"train": mapping.DOCUMENTS}
    for source, chore in zip(results.sources, results.documents.chores, strict=True):
        number = numbers[source] = numbers.get(source, -1) + 1
        for split, name in files.items():
            kind = "documents" if split == "train" else "held_out"
            yield f"{kind}/{source}-{number:06d}.jsonl.zst", published.file(results.documents, chore.name, name)
    if results.thresholds is not None:
        yield keeping.THRESHOLDS, published.file(results.thresholds, "all", keeping.THRESHOLDS)
    if results.vocabulary is not None:
        yield stores.TOKENIZER, published.file(results.vocabulary, "all", stores.TOKENIZER)
    for prefix, phase, name in _stores(results, published):
        for file in sorted(published.names(phase, name), key=lambda file: file.endswith(".idx")):
            yield prefix + file.removeprefix(stores.STORE), published.file(phase, name, file)
    if results.report is not None:
        for file in published.names(results.report, "all"):
            yield file, published.file(results.report, "all", file)


def _stores(results: Results, published: Published) -> Iterator[tuple[str, Phase, str]]:
    """(prefix, phase, chore) of each store that has documents."""
    if results.tokens is None:
        return
    names = [(source, split) for source in dict.fromkeys(results.sources) for split in keeping.FILES]
    for (source, split), chore in zip(names, results.tokens.chores, strict=True):
        if published.facts(results.tokens, chore.name)["documents"]:
            yield (source if split == "train" else f"{source}_valid"), results.tokens, chore.name


def _blend(results: Results, published: Published) -> dict[str, Any]:
    """The `data` section of a training config."""
    prefixes = [prefix for prefix, *_ in _stores(results, published)]
    if not prefixes:
        return {}
    output, read = Path(results.config.output.dir), results.config.read
    train = [
        {"path": str(output / source), "weight": read.source(source).weight}
        for source in dict.fromkeys(results.sources)
        if source in prefixes
    ]
    valid = [str(output / prefix) for prefix in prefixes if prefix.endswith("_valid")]
    tokenizer = str(output / stores.TOKENIZER) if results.vocabulary is not None else results.config.tokenize.tokenizer
    asked = {name: token for name in ("eod", "bos") if (token := getattr(results.config.tokenize, name)) is not None}
    return {"data": {"train": train, **({"valid": valid} if valid else {}), "tokenizer": tokenizer, **asked}}


def link(path: Path, target: Path) -> None:
    """Give a file a second name, at once; a copy where the file system has no links."""
    make_folder(target.parent)
    part = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        try:
            os.link(path, part)
        except OSError:
            with doing("writing", target):
                shutil.copyfile(path, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """A file, alone among the workers on all machines. On a file system without locks, and where another one holds it for longer than
    LOCK_SECONDS, as if it were: that one may be frozen, and both would do the same.
    """
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        deadline = time.monotonic() + LOCK_SECONDS
        with suppress(OSError):
            while not _is_locked(lock) and time.monotonic() < deadline:
                time.sleep(0.1)
        yield path


def _is_locked(lock: TextIO) -> bool:
    """Whether this process has a lock now. Raises OSError where there are none."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _replace_list(target: Path, names: list[str]) -> None:
    """Write which files are the result, and remove those of the list before that are none any more."""
    path = target / PREPARED
    try:
        before = json.loads(path.read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: nothing is known to be of an earlier run
        before = []
    with whole(path, text=True) as file:
        json.dump({"files": names}, file, indent=1)
    for name in set(before) - set(names):
        gone = target / name
        if target.resolve() in gone.resolve().parents:
            gone.unlink(missing_ok=True)
