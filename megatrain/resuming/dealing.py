"""Where each corpus goes on when a run does: behind the last sample that it has given, whatever the weights are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatrain.checkpoint.manifest import Manifest
from megatrain.data.identity import same_store
from megatrain.data.terms import Deal, Terms, endless, restored, terms_of
from megatrain.job import Job


def deal_on(job: Job, manifest: Manifest) -> None:
    """Set the terms on which a run that has taken over a checkpoint's progress deals its samples; no batch may be in the making.

    These are the checkpoint's where the config still asks for the same; else the config's from the next sample on. The same text goes on
    where it was, and another one begins.
    """
    progress, length, samples = manifest.progress, job.config.model.seq_length, job.left_out.source
    was, now = progress.get("identity", {}).get("data"), job.identity["data"]
    if was is None:
        return  # of the first releases: the config says it all
    saved, before_length = _saved(progress, was, length)
    n = job.left_out.number(job.consumed_samples)
    given = [-(-count * before_length // length) for count in Deal(saved).counts(-(-n * length // before_length))]
    home = _places(was, now)
    before = tuple(0 if place is None else given[place] for place in home)
    terms = terms_of(job.config, samples.per_epoch, job.step, job.consumed_samples, n, before)
    unchanged = before_length == length and home == list(range(len(was))) and saved.agrees(terms, n)
    samples.terms = replace(saved, end=terms.end) if unchanged else terms


def _saved(progress: Mapping[str, Any], was: Sequence[Sequence[Any]], length: int) -> tuple[Terms, int]:
    """The terms of a checkpoint, and the model.seq_length that its samples are counted in. Earlier releases had weights alone."""
    state = progress.get("deal")
    return (endless([row[1] for row in was]), length) if state is None else (restored(state), state["seq_length"])


def _places(was: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> list[int | None]:
    """The place among the corpora of the checkpoint of each present one; None: it was not there. was, now: their identities."""
    free, found = list(range(len(was))), []
    for row in now:
        place = next((i for i in free if same_store(was[i][0], row[0]) and was[i][2:] == row[2:]), None)
        if place is not None:
            free.remove(place)
        found.append(place)
    return found
