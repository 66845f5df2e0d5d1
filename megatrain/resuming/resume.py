"""Resume a run: find its checkpoint, check that it is of the same model, tokenizer and text, load it, report changes of the config.

A run resumes from the newest of its own checkpoints that is whole (beginning.py decides which are its own). Layout, schedule, batch and
optimizer settings may differ from the checkpoint's (changed.py has the effects). Another model, tokenizer or training text is refused
unless checkpoint.accept_changes names it, since a loss curve that changes its subject half-way looks like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatrain.checkpoint.directory import catalogue
from megatrain.checkpoint.load import load, load_newest
from megatrain.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megatrain.checkpoint.run_state import check_resumable
from megatrain.checkpoint.together import ContentError, DamagedCheckpointError, together
from megatrain.config.budget import WarmUp, learning_rate, position, warmup_of
from megatrain.config.keys import show
from megatrain.config.schema import Config
from megatrain.data.identity import BESIDE, identity_of, listed, other_corpora, other_held_out, other_special, other_terms
from megatrain.data.terms import state_of
from megatrain.init_from import start_from
from megatrain.job import Job
from megatrain.optim.portions import portions
from megatrain.resuming.beginning import OwnCheckpoints, beginning_of, beginning_text
from megatrain.resuming.changed import bends_schedules, change_line, change_of, changes, values_then
from megatrain.resuming.dealing import deal_on
from megatrain.resuming.restart import load_copy
from megatrain.runtime.distributed import Session
from megatrain.stderr import note
from megatrain.training import Run
from megatrain.transport.consensus import broadcast_text

_COMPARED = ("data.train", "data.tokenizer")
"""Keys that are paths; what they lead to is compared, not the paths."""


def progress_of(run: Run) -> dict[str, Any]:
    """The run's state besides its tensors, as kept in a checkpoint."""
    config = run.config
    return {
        "samples": run.consumed_samples,
        "step": run.step,
        "tokens": run.consumed_samples * config.model.seq_length,
        "updates": int(run.optimizer.updates.item()),
        "loss_scale": run.loss_scale.state(),
        "gauge": asdict(run.warmup),
        "finished": run.step >= run.total_steps,
    }


def progress_of_job(job: Job) -> dict[str, Any]:
    """All that a checkpoint keeps of a job besides its tensors."""
    length = job.config.model.seq_length
    return {
        **progress_of(job),
        "identity": job.identity,
        "program": job.program,
        "began": job.beginning,
        "spikes": job.spikes.state(),
        "deal": state_of(job.left_out.source.terms, length),
        "left_out": [[first * length, end * length] for first, end in job.left_out.windows],
    }


def restore(run: Run, path: Path) -> Manifest:
    """Set a run to the state in the checkpoint at `path` (collective). Raises CheckpointError on every rank."""
    manifest = load(path, portions(run.optimizer), run.ctx)
    take_over(run, manifest)
    return manifest


def require_progress(path: Path, manifest: Manifest) -> None:
    """Raise DamagedCheckpointError where a checkpoint lacks what a run needs to go on from it."""
    try:
        check_resumable(manifest.progress, manifest.step)
    except ValueError as error:
        raise DamagedCheckpointError(f"{path / MANIFEST} cannot be used: {error}") from None


def take_over(run: Run, manifest: Manifest) -> None:
    """Set a run to a checkpoint's state, once its tensors are loaded into the optimizer's portions (collective)."""
    progress, then = manifest.progress, values_then(manifest)
    run.optimizer.refresh()
    run.step = progress["step"]
    # The checkpoint's number of samples, unless seq_length has changed: tokens count.
    run.consumed_samples = -(-progress["tokens"] // run.config.model.seq_length)
    run.optimizer.updates.fill_(progress["updates"])
    run.warmup = _warmup_then(progress.get("gauge"), then, run.config)
    if then["train.precision"] == "fp16":
        run.loss_scale.restore(progress["loss_scale"])


def _warmup_then(kept: dict[str, int] | None, then: dict[str, Any], config: Config) -> WarmUp:
    """The warm-up that the run began with, or that of `config` if it was changed. The first checkpoints do not have it (`kept`)."""
    if kept is not None:
        found = WarmUp(**kept)
    else:
        batch, ramp = then["train.global_batch_size"], then["train.batch_ramp"]
        began = replace(config, train=replace(config.train, global_batch_size=batch, batch_ramp=ramp))
        began = replace(began, optim=replace(config.optim, warmup_steps=then["optim.warmup_steps"]))
        found = warmup_of(replace(began, model=replace(config.model, seq_length=then["model.seq_length"])))
    if config.optim.warmup_steps is None:
        return found  # a default warm-up keeps the length that it had when the run began
    now = warmup_of(config)
    return found if found.warmup_steps == now.warmup_steps else replace(now, first=found.first, full=found.full)


def warmup_kept(config: Config, session: Session) -> WarmUp | None:
    """The warm-up of the run that `config` resumes; None if it resumes none (collective)."""
    text = "null"
    with session.together("looking at the checkpoints"):
        if session.rank == 0:
            beginning = beginning_of(config, session.launch)
            own, listed = OwnCheckpoints(config, session.launch, beginning), catalogue(Path(config.checkpoint_dir))
            manifest = next((manifest for path, manifest, _ in listed if manifest is not None and own(path, manifest)), None)
            if manifest is None and beginning["from"] == "checkpoint":
                manifest = read_manifest(Path(config.checkpoint.resume))
            if manifest is not None:
                text = json.dumps(asdict(_warmup_then(manifest.progress.get("gauge"), values_then(manifest), config)))
    found = json.loads(broadcast_text(text, session.everyone, session.device))
    return None if found is None else WarmUp(**found)


def resume(job: Job) -> None:
    """Set a run to its newest checkpoint or, if it has none of its own, begin where `checkpoint.resume` says (collective).

    A run without a checkpoint of its own starts from the weights at that path, with checkpoint.weights_only or where the path is a Hugging
    Face directory; from the whole state at that path otherwise; and with auto or never from the weights of model.init_from, if given.
    """
    job.identity = shared_identity(job)
    config, ctx, launch = job.config, job.ctx, job.session.launch
    text = ""
    with together(ctx):
        if ctx.world.rank == 0:
            text = json.dumps(beginning_of(config, launch))
    job.beginning = json.loads(broadcast_text(text, ctx.world.group, ctx.device))
    directory, own = Path(config.checkpoint_dir), OwnCheckpoints(config, launch, job.beginning)

    def accept(path: Path, manifest: Manifest) -> None:
        require_progress(path, manifest)
        _require_same_subject(path, manifest, config, job.identity)

    def tell(path: Path, why: str) -> None:
        _tell(job, path, why)

    found = load_copy(job, accept, partial(OwnCheckpoints, config, launch, job.beginning)) or load_newest(
        directory, portions(job.optimizer), ctx, tell, accept, own
    )
    if found is not None:
        if job.beginning["from"] != "auto":
            job.notes.append(
                f"checkpoint.resume={config.checkpoint.resume}, and {found[0]} is this run's own, which began "
                f"{beginning_text(job.beginning)}: it goes on from there. To begin there again, set checkpoint.dir to another directory"
            )
        _go_on(job, *found)
        job.goes_on = True
        job.beginning = dict(found[1].progress.get("began", job.beginning))
        return
    if job.beginning["from"] != "auto":
        job.notes += [f"the run begins {beginning_text(job.beginning)}", *own.others[:1]]
    if job.beginning["from"] == "checkpoint":
        path = Path(config.checkpoint.resume)
        with together(ctx):
            accept(path, read_manifest(path))
        _go_on(job, path, load(path, portions(job.optimizer), ctx))
    elif job.beginning["from"] == "weights":
        start_from(job, Path(config.checkpoint.resume))
        job.resumed_from = Path(config.checkpoint.resume)
    elif config.model.init_from is not None:
        start_from(job, Path(config.model.init_from))


def shared_identity(job: Job) -> dict[str, Any]:
    """The identity of the run's texts and tokenizer, the same on all ranks (collective).

    Raises RemoteError on every rank where they have different files, OSError or RemoteError where one cannot read them.
    """
    with job.session.together("reading the data"):
        mine = identity_of(job.config)
    job.session.same(
        "data",
        listed(job.config, mine),
        "These are bytes of index and tokens, hashes, and ids of special tokens. Copy the same files to every node, those beside the "
        f"tokenizer ({BESIDE}) too.",
    )
    return mine


def _tell(job: Job, path: Path, reason: str) -> None:
    job.damaged.append(f"{path}: {reason}")
    if job.session.rank == 0:
        note(f"megatrain: passing over the damaged checkpoint {path}: {reason}")


def _go_on(job: Job, path: Path, manifest: Manifest) -> None:
    """Take over the run's state from a loaded checkpoint, and report what has changed since."""
    take_over(job, manifest)
    progress, length = manifest.progress, job.config.model.seq_length
    job.left_out.leave_out(*((first // length, -(-end // length)) for first, end in progress.get("left_out", ())))
    deal_on(job, manifest)
    job.spikes.restore(progress.get("spikes", {}))
    job.resumed_from = path
    changed = list(changes(manifest, job.config))
    was, now = manifest.progress.get("identity", {}), job.identity
    same = {
        "data.train": "data" in was
        and not any(other_corpora(was["data"], now["data"], job.config.data.train))
        and not any(any(other_terms(*values)) for key, *values in changed if key == "data.train"),
        "data.tokenizer": "tokenizer" in was and was["tokenizer"] == now["tokenizer"],
        "data.valid": "valid" in was and not other_held_out(was["valid"], now["valid"]),
    }
    job.changes = [f"changed since then: {change_line(*change, same=same.get(change[0], False))}" for change in changed]
    if "valid" in was and not same["data.valid"]:
        job.changes.append("changed since then: data.valid is another text; losses of before and after do not compare")
    special = other_special(was.get("special", {}), now["special"], job.config.data.tokenizer)
    job.changes += [f"changed since then: {text}" for text in special]
    job.changes += [f"changed since then: {text}" for text in _other_program(manifest.progress.get("program", {}), job.program)]
    if any(bends_schedules(key) for key, _, _ in changed) and job.step < job.total_steps:
        job.changes.append(f"from here {_ahead(job)}")


def _other_program(was: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    """The differences in what a run computes with, as text; an earlier release did not keep it."""
    for name, here in now.items():
        if was.get(name, here) != here:
            yield f"{'the code of megatrain' if name == 'code' else name}: {was[name]} -> {here}; numbers may differ, in rounding at least"


def _ahead(run: Run) -> str:
    """The remaining steps, tokens and learning rates of a run, as text."""
    left, since, length = run.total_steps - run.step, run.consumed_samples, run.config.model.seq_length
    last, end = (run.budget.consumed(count, since) for count in (left - 1, left))
    rate = learning_rate(run.config.optim, position(run.config, run.warmup, run.total_steps - 1, last))
    return (
        f"{left} steps are left, {run.step + 1} to {run.total_steps}, with {(end - since) * length:,} tokens, {end * length:,} in all; the "
        f"learning rate is {run.lr:.3E} in the next step and {rate:.3E} in the last"
    )


def _require_same_subject(path: Path, manifest: Manifest, config: Config, identity: dict[str, Any]) -> None:
    """Raise ContentError where model, tokenizer or training text differ from the checkpoint's and checkpoint.accept_changes does not allow
    it.
    """
    accepted = set(config.checkpoint.accept_changes)
    for subject, what in _other_subjects(manifest, config, identity):
        if subject not in accepted:
            raise ContentError(
                f"{path} is of another {subject} than this config: {what}. Use the same, or another checkpoint.dir to begin anew; to "
                f"go on with the change, checkpoint.accept_changes=[{', '.join(sorted(accepted | {subject}))}]."
            )


def _other_subjects(manifest: Manifest, config: Config, identity: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(model, tokenizer or data; the difference) for each that differs from the checkpoint's."""
    was = manifest.progress.get("identity", {})
    for what in other_corpora(was["data"], identity["data"], config.data.train) if "data" in was else ():
        yield "data", what
    if "tokenizer" in was and was["tokenizer"] != identity["tokenizer"]:
        yield (
            "tokenizer",
            f"data.tokenizer={show(config.data.tokenizer)}: {show(was['tokenizer'])} -> {show(identity['tokenizer'])}",
        )
    for key, before, after in changes(manifest, config):
        if key == "data.train":
            for what in other_terms(before, after):
                yield "data", what
        if change_of(key).then == "refused" and key not in _COMPARED:
            yield "model" if key.startswith("model.") else "data", f"{key}: {show(before)} -> {show(after)}"
