"""Back to a checkpoint before a spike, within the process, leaving out the samples from there to behind it (docs/spikes.md).

    step        200 ........ 240 ........ 250           a checkpoint of step 200, a spike at step 250
    samples     a .......... c .......... b             consumed before 200 ends, 240 ends, 250 ends

    train.spike_window: null    samples a to b are left out
    train.spike_window: 10      samples c to b; steps 201 to 240 are taken again on the samples that they had

The run then has the state of the checkpoint, but for what was left out and the caution of its next steps: both are saved at once, as the
same step again, so that a run that resumes has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatrain.checkpoint.load import load_newest
from megatrain.checkpoint.manifest import Manifest
from megatrain.data.left_out import LeftOut, Origin, Window
from megatrain.job import Job
from megatrain.lifecycle.spikes import Bad, Diverged
from megatrain.optim.portions import portions
from megatrain.resuming.beginning import OwnCheckpoints
from megatrain.resuming.dealing import deal_on
from megatrain.resuming.resume import require_progress, take_over

LOOKED_AT = 4096
"""Most samples of a window whose documents are looked at."""


class WentBack(NamedTuple):
    """A rollback."""

    path: Path
    """The checkpoint gone back to."""
    window: Window
    """The samples left out by it, numbered as in the texts."""


def roll_back(job: Job, bad: Bad) -> WentBack:
    """Set a run to its newest checkpoint before what went wrong, without the samples from there on (collective; all saves are done).

    Raises Diverged, on every rank, where train.on_spike does not say so, its tries are used up, or there is no such checkpoint.
    """
    train, spikes = job.config.train, job.spikes
    if train.on_spike != "rollback":
        raise Diverged(f"step {bad.last}: {bad.why}, and train.on_spike={train.on_spike} does not go back (rollback would)")
    found = None
    job.flat.settle()
    for bound in dict.fromkeys((spikes.bound(), bad.first)):
        found = found or _load_before(job, bound)
    if found is None:
        raise Diverged(f"step {bad.last}: {bad.why}, and {job.config.checkpoint_dir} has no checkpoint of this run before")
    path, manifest = found
    tries = spikes.tries(manifest.step)
    if tries >= train.spike_retries:
        raise Diverged(
            f"step {bad.last}: {bad.why}, and after {tries} rollbacks without a checkpoint behind a spike, "
            f"train.spike_retries={train.spike_retries} allows no other"
        )
    job.loader.settle()  # its next batch is of the samples that are left out
    take_over(job, manifest)
    window = job.left_out.window(_first_left_out(job, bad), bad.consumed)
    job.left_out.leave_out(window)
    deal_on(job, manifest)
    spikes.go_back(bad, job.step, manifest.progress.get("spikes", {}))
    return WentBack(path, window)


def _load_before(job: Job, step: int) -> tuple[Path, Manifest] | None:
    """Load the run's newest checkpoint of an earlier step than `step` (collective); None if it has none."""
    own = OwnCheckpoints(job.config, job.session.launch, job.beginning)

    def earlier(path: Path, manifest: Manifest | None) -> bool:
        return own(path, manifest) and manifest is not None and manifest.step < step

    return load_newest(Path(job.config.checkpoint_dir), portions(job.optimizer), job.ctx, accept=require_progress, own=earlier)


def _first_left_out(job: Job, bad: Bad) -> int:
    """Number of the first sample to leave out, of a run that is at the checkpoint."""
    size = job.config.train.spike_window
    begins = job.step if size is None else max(job.step, min(bad.first - 1, bad.last - size))
    return job.budget.consumed(begins - job.step, job.consumed_samples)


def documents(samples: LeftOut[Any], window: Window) -> list[dict[str, Any]]:
    """The documents that samples of a window, numbered as in the texts, have tokens of; those that repeat one token most come first.

    Of a long window, those of the last samples.
    """
    first, end = max(window[0], window[1] - LOOKED_AT), window[1]
    found = [(-_repeated(tokens), piece) for n in range(first, end) for tokens, piece in _texts(samples, n)]
    return [piece._asdict() for _, piece in sorted(found, key=lambda pair: pair[0])]


def place_of(found: list[dict[str, Any]]) -> str:
    """The first of some documents, as text."""
    of = found[0]
    return f"document {of['document']} of {of['file']}, its {of['tokens']} tokens from token {of['offset']} of the file"


def _texts(samples: LeftOut[Any], n: int) -> Iterator[tuple[np.ndarray, Origin]]:
    """The tokens that sample n has of each document, and where they are."""
    pairs = samples.source.pairs(n)
    parts = [samples.source.sample(n)] if pairs is None else [part for pair in pairs for part in pair]
    tokens, begin = np.concatenate(parts), 0
    for piece in samples.source.pieces(n):
        yield tokens[begin : begin + piece.tokens], piece
        begin += piece.tokens


def _repeated(tokens: np.ndarray) -> int:
    """How often a text has its most frequent token."""
    return int(np.unique(tokens, return_counts=True)[1].max(initial=0))
