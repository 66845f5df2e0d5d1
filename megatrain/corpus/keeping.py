"""The second pass over documents: copies and repeated lines go, and the perplexity of what stays is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import xxhash

from megatrain.corpus.cleaning.augment import augmenting
from megatrain.corpus.document import Document, Step
from megatrain.corpus.duplicates.normal import without
from megatrain.corpus.duplicates.outcome import NEAR
from megatrain.corpus.mapping import DOCUMENTS
from megatrain.corpus.ngram_choices import PerplexityConfig
from megatrain.corpus.perplexity import PerplexityScorer, fit, read_thresholds, sample_of, write_thresholds
from megatrain.corpus.prepare_config import PrepareConfig
from megatrain.corpus.report.unit_audit import Audit
from megatrain.corpus.row_places import row_told
from megatrain.corpus.shards import documents_of, writing
from megatrain.corpus.similar import Removed

Progress = Callable[[int], None]
Split = Literal["train", "valid"]
FILES: dict[Split, str] = {"train": DOCUMENTS, "valid": "held_out.jsonl.zst"}
"""Files of a unit, by split."""
THRESHOLDS = "thresholds.json"
LINES_GONE = "duplicates.lines"
"""The rule that refuses a document all of whose lines were there before."""


def is_held_out(document: Document, seed: int, share: float) -> bool:
    """Whether a document belongs to the held-out share: by a hash of its place, whatever else is prepared."""
    drawn = xxhash.xxh3_64_intdigest(f"{document.source}\0{document.name}".encode(), seed)
    return drawn < share * (1 << 64)


def staying(shard: Path, removed: Removed, config: PrepareConfig, audit: Audit) -> Iterator[Document]:
    """The documents of a unit that are no copies, without the lines that are.

    removed: documents and lines by row. Counts the stage `dedup`.
    """
    copies, lines = removed
    for row, document in enumerate(documents_of(shard)):
        audit.enter("dedup", document)
        copy = copies.get(row)
        if copy is not None:
            unit, of = copy.representative
            like = f"{copy.agreement:.0%} of " if copy.reason == NEAR else "in its place: "
            audit.leave("dedup", document, (copy.reason,), said=f"{like}{row_told(unit, of)}")
            continue
        part = config.dedup.lines
        if part != "none" and row in lines:
            document.text = without(document.text, part, lines[row])
            audit.tally.count("dedup.lines", len(lines[row]))
        refusals = () if document.text.strip() else (LINES_GONE,)
        audit.leave("dedup", document, refusals)
        if not refusals:
            yield document


def sample_unit(
    shard: Callable[[], Path], removed: Callable[[], Removed], config: PrepareConfig, folder: Path, progress: Progress
) -> Mapping[str, Any]:
    """Perplexities of a sample of what stays of a unit."""
    unheard = Audit(config.output.seed, examples=0, sheet=0)

    def documents() -> Iterator[Document]:
        for document in staying(shard(), removed(), config, unheard):
            progress(len(document.text))
            yield document

    return {"sample": sample_of(documents(), config.perplexity)}


def find_thresholds(
    samples: Callable[[], Iterable[Mapping[str, Any]]], settings: PerplexityConfig, folder: Path, progress: Progress
) -> Mapping[str, Any]:
    """Write where middle and tail of each language begin: as an earlier preparation has it, or by the samples of all units."""
    given = settings.thresholds
    found = fit(samples(), settings) if given is None else read_thresholds(given, settings)
    write_thresholds(folder / THRESHOLDS, found)
    progress(1)
    return {}


def keep_unit(
    shard: Callable[[], Path],
    removed: Callable[[], Removed],
    judge: Callable[[], Step | None],
    config: PrepareConfig,
    folder: Path,
    progress: Progress,
) -> Mapping[str, Any]:
    """Write what stays of a unit, each split to a file, with changed copies of what is trained on; the audit, and how many each has.

    judge: makes the step of the stage `perplexity`, if there is one.
    """
    step, grow = judge(), augmenting(config.augment, config.output.seed)
    audit = Audit(config.output.seed, config.output.examples, config.output.sheet)
    annotate, counts = config.filter.mode == "annotate", dict.fromkeys(FILES, 0)
    with ExitStack() as files:
        write = {split: files.enter_context(writing(folder / name)) for split, name in FILES.items()}
        documents = staying(shard(), removed(), config, audit)
        for document in documents if step is None else PerplexityScorer(config.perplexity).scored(documents):
            if step is not None:
                audit.enter("perplexity", document)
                refusals = tuple(step(document, audit.tally))
                keep = annotate or not refusals
                audit.leave("perplexity", document, refusals, keep=keep)
                if not keep:
                    continue
            split: Split = "valid" if is_held_out(document, config.output.seed, config.tokenize.held_out) else "train"
            audit.show(document)
            for one in grow(document, audit.tally) if split == "train" else (document,):
                counts[split] += 1
                if one is not document:
                    audit.copied(one)
                write[split](one)
            progress(len(document.text))
    return {"audit": audit.as_json(), "documents": counts}
