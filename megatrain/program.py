"""The training program around the step: from a config file to a finished run, with its log, evaluations and checkpoints.

build    config -> session -> context -> data -> run, resumed from its newest checkpoint if it has one
train    step, log, evaluate, save, until done or told to stop
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatrain.assembly import DTYPES, assemble, mesh_shape, require_schedule
from megatrain.auditor import Auditor
from megatrain.checkpoint.claim import claim, claim_log
from megatrain.checkpoint.manifest import MANIFEST
from megatrain.companions import keep_tokenizer, take_along, tokenizer_of
from megatrain.config.budget import budget_of
from megatrain.config.load import load, load_tree
from megatrain.config.schema import Config, TrainConfig
from megatrain.config.source import ConfigError
from megatrain.config.validate import validate
from megatrain.data.blended import BlendedSamples
from megatrain.data.held_out import Evaluated
from megatrain.data.left_out import LeftOut
from megatrain.data.loader import Loader
from megatrain.data.samples.sentinels import resolve
from megatrain.data.seen import Reached, dealt, report, warnings
from megatrain.data.sources import open_sources
from megatrain.data.tokenizer import load_tokenizer
from megatrain.duties import Duty, Pause, always, do, due, goes_on
from megatrain.files import whole
from megatrain.init_from import require_weights, shapes_of
from megatrain.job import Job
from megatrain.lifecycle.guard import Guard
from megatrain.lifecycle.limits import Limits
from megatrain.lifecycle.monitor import Monitor
from megatrain.lifecycle.sections import SectionLimits
from megatrain.lifecycle.stop import DIVERGED, PREEMPTED, StopRequest
from megatrain.midway import Midway
from megatrain.models.batch import Objective
from megatrain.parallel.mesh import ParallelContext
from megatrain.records import provenance
from megatrain.records.log import LogDisplay, RunLog
from megatrain.resuming.resume import progress_of_job, resume, warmup_kept
from megatrain.runtime import installed
from megatrain.runtime.allocator import tune_allocator
from megatrain.runtime.device_memory import memory_of
from megatrain.runtime.distributed import Session, connect
from megatrain.runtime.flops import parameter_count
from megatrain.runtime.interface import launched
from megatrain.runtime.launch import Launch
from megatrain.runtime.reports import Reports
from megatrain.runtime.rounding import require_same_kernels
from megatrain.transport.leftovers import remove_leftovers
from megatrain.watch import Watch


def build(
    config: Config | dict[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    objective: Objective | None = None,
    monitor: Monitor | None = None,
) -> Job:
    """Join the world that the environment describes and make the run of `config` (a file, a tree or a Config) in it.

    monitor: of this process, where it has one that began before.

    Raises ConfigError, LaunchError, TransportError, TokenStoreError or CheckpointError, on every rank at once.
    """
    config_file = Path(config) if isinstance(config, (str, Path)) else None
    loaded = load(config, overrides, shapes_of) if isinstance(config, (str, Path)) else load_tree(config, shapes_of)
    config, text = loaded.config, loaded.text
    launch = launched(os.environ)
    launch.require_ranks()
    limits = limits_of(config)
    with ExitStack() as stack:  # so that the next build of this process can join a world, if this one fails
        guard = stack.enter_context(Guard(launch, limits, monitor))
        with guard.section("set-up"), guard.watching():
            session = connect(
                launch,
                config.parallel,
                max(vars(limits).values()),
                join_seconds=limits.start,
                met=guard.meet,
                job=described(config, launch),
            )
            stack.callback(session.close)
            guard.join(session)
            job = _build_in(session, guard, config, text, objective)
        stack.pop_all()
        job.config_file, job.observers.phase = config_file, guard.phase
        guard.reader = lambda: job.loader.thread
        job.loader.goes_on = lambda: job.step + 1 < job.total_steps
        return job


def described(config: Config, launch: Launch) -> str:
    """The words that tell a run from others where its ranks meet: its log.dir, which no other has at the same time.

    Of ranks on one machine the whole path; several may have it at other places.
    """
    where = Path(config.log.dir)
    return f"the run in log.dir={where if launch.is_spread else where.absolute()}"


def limits_of(config: Config) -> SectionLimits:
    """The limits of a run's sections."""
    train = config.train
    return SectionLimits(train.start_timeout_seconds, train.hang_timeout_seconds, config.checkpoint.timeout_seconds)


def _build_in(session: Session, guard: Guard, config: Config, text: str, objective: Objective | None) -> Job:
    """The run of `config`, whose text with origins is `text`, in a world that was joined."""
    with session.together("looking at the code"):
        code = installed.sources()
    session.same("code", installed.described(code), "Install the same versions on every node.")
    session.same("config", text)
    require_same_kernels(session, config.train.kernels, DTYPES[config.train.precision])
    validate(config, session.world.size, partial(warmup_kept, config, session))
    require_schedule(config)
    require_precision(config.train.precision, session.device)
    prepare_torch(config.train)
    ctx = ParallelContext.build(session.world, mesh_shape(config.parallel, session.world.size), session.device)
    with session.together("opening the data"):
        vocab_size = vocabulary(config)
        loader, left_out, held_out = open_data(config, ctx, vocab_size)
    with session.together("looking for memory"):
        require_memory(config, vocab_size, session.world.size, memory_of(session.device))
    with session.together("looking at the weights to start from"):
        require_weights(config, vocab_size)
    run = assemble(config, ctx, loader, vocab_size, objective=objective, held_out=held_out)
    parts = {item.name: getattr(run, item.name) for item in fields(run)}
    job = Job(**parts, session=session, guard=guard, left_out=left_out, config_text=text)
    job.program = installed.program(code)
    try:
        job.log_claim = claim_log(Path(config.log.dir), ctx, session.launch.job)  # before anything is written
        job.claim = claim(Path(config.checkpoint_dir), ctx, session.launch.job)
        removed = remove_leftovers() if session.launch.local_rank == 0 else ""
        job.notes += [note for note in (job.log_claim.note, job.claim.note, removed) if note]
        resume(job)
        with session.together("dealing the samples"):
            job.notes += blend_notes(config, left_out.source, Reached(job.step, job.consumed_samples))
        with session.together("keeping the tokenizer"):
            _keep_companions(job)
    except BaseException:
        job.give_up()
        raise
    return job


def _keep_companions(job: Job) -> None:
    """Copy the tokenizer, and other files that came with the weights, to the run's checkpoint directory."""
    if job.session.rank:
        return
    if job.resumed_from is not None and (job.resumed_from / MANIFEST).is_file():
        take_along(job.resumed_from.parent, Path(job.config.checkpoint_dir))
    keep_tokenizer(job.config)


def require_precision(precision: str, device: torch.device) -> None:
    """Raise ConfigError where parallel.device=auto has taken a GPU for a run in float64, whose kernels sum in float32 there."""
    if precision == "fp64" and device.type == "cuda":
        raise ConfigError("train.precision=fp64 is for checks on CPU, and there is a GPU. Use parallel.device=cpu, or fp32.")


def require_memory(config: Config, vocab_size: int, world_size: int, available: int) -> None:
    """Raise ConfigError if not even a rank's weights fit into `available` bytes. Does not predict whether all of a step fits."""
    parallel, count = config.parallel, parameter_count(config.model, vocab_size)
    shared = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    shared *= config.shard_size(world_size) if parallel.zero_stage == 3 else 1
    needed = count * DTYPES[config.train.precision].itemsize / shared
    if needed > available:
        raise ConfigError(
            f"the model has {count:,} parameters: {needed / 2**30:,.0f} GiB of weights a rank in {config.train.precision}, of "
            f"{available / 2**30:,.0f} GiB that there are. Use a smaller model.hidden_size, model.num_layers or model.vocab_size, or "
            "more ranks with a larger parallel.tensor_parallel_size, or with parallel.zero_stage=3 (and parallel.zero_ranks=null)."
        )


def vocabulary(config: Config) -> int:
    """Size of the model's vocabulary. Raises ConfigError where it is not known or smaller than the tokenizer's."""
    given = config.model.vocab_size
    if config.data.tokenizer is None:
        if given is None:
            raise ConfigError(
                "model.vocab_size and data.tokenizer are both null. Set one: data.tokenizer=PATH, or model.vocab_size=8192."
            )
        return given
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eod, config.data.bos)
    size, sentinels = tokenizer.vocab_size, ""
    if config.data.objective == "glm":
        largest = max(vars(resolve(config.data.glm, tokenizer, None)[0]).values())
        size, sentinels = max(size, largest + 1), " and of GLM's blanks"
    if given is not None and given < size:
        raise ConfigError(
            f"model.vocab_size={given} is smaller than the {size} tokens of data.tokenizer={config.data.tokenizer}{sentinels}. "
            f"Use model.vocab_size={size}, or leave it out."
        )
    return given or size


def blend_notes(config: Config, samples: BlendedSamples, place: Reached) -> list[str]:
    """A run's blend for the log: all of it where there is more to say than one corpus, and what is seen too often.

    Raises ValueError where the corpora do not last to the end of the run.
    """
    deal = dealt(config, samples, place)
    told = report(config, samples, place) if len(samples.corpora) > 1 or len(deal.stretches) > 1 else []
    return [*told, *warnings(config, samples)]


def open_data(
    config: Config, ctx: ParallelContext, vocab_size: int
) -> tuple[Loader, LeftOut[BlendedSamples], dict[str, Evaluated]]:
    """(this rank's loader, its samples, validation sets by name). Raises TokenStoreError."""
    source, samples, validation = open_sources(config, vocab_size, tokenizer_of(config))
    if samples is None:
        raise ConfigError("data.train is empty")
    sizes = (budget_of(config).batch_size, config.train.micro_batch_size, ctx.dp.rank, ctx.dp.size)
    left_out = LeftOut(samples)
    return Loader(left_out, *sizes, compose=source.compose), left_out, validation


def prepare_torch(train: TrainConfig) -> None:
    """Set torch for this process: determinism as the config asks, and float32 sums in products of 16-bit matrices."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if train.precision in ("fp32", "fp64"):  # TensorFloat-32 keeps 10 of 23 bits
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # every buffer here is written before it is read


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(job: Job, stop: StopRequest | None = None) -> bool:
    """Train until all steps are done (True), or until some rank is told to stop and a checkpoint is saved (False).

    stop: who listens to signals; without one, this call does while it lasts. Raises Diverged where training went wrong for good.
    """
    guard, limits = job.guard, Limits(job.config.train, job.session.launch)
    with (
        StopRequest() if stop is None else stop as told,
        guard.watching(),
        guard.section("records"),
        _open_log(job) as log,
        Watch(job, log) as watch,
        Auditor(job, watch.audited, partial(progress_of_job, job)) as auditor,
        guard.section("step"),
        guard.watching(),
    ):
        told.started()
        guard.told = lambda: told.came

        def told_to_stop() -> bool:
            """Whether this rank is told to stop, or at a limit; called once a step, and once a batch of an evaluation."""
            guard.tick()
            return bool(told) or limits.reached()

        job.stop_requested = told_to_stop
        midway = Midway(job, log)
        watch.start(auditor.notes())
        done = _loop(job, watch, duties_of(job, watch, auditor, midway))
        if done:
            watch.finished()
        elif watch.diverged is None:
            watch.stopped(told.signal.name if told.signal else limits.why or "told by another rank")
    if watch.diverged is not None:
        guard.leave()  # waits for the other ranks
        raise watch.diverged
    return done


def duties_of(job: Job, watch: Watch, auditor: Auditor, midway: Midway) -> list[Duty]:
    """The run's duties between steps, in order."""
    config = job.config.train

    def evaluates(pause: Pause) -> bool:
        return bool(job.held_out) and (pause.last or (not pause.stop and due(pause.step, config.eval_every)))

    def save(pause: Pause) -> None:
        auditor.check(copies=False)  # no checkpoint keeps what a device has changed by itself
        watch.save(last=pause.final)

    return [
        Duty(lambda pause: auditor.updated(), when=always, waits=False),
        Duty(watch.recover, when=lambda pause: job.spikes.bad is not None),
        Duty(lambda pause: auditor.check(copies=True), every=config.audit_every),
        Duty(lambda pause: auditor.recompute(), every=config.audit_compute_every),
        Duty(watch.evaluate, when=evaluates),
        Duty(midway.write_samples, when=midway.wants_samples),
        Duty(midway.solve_tasks, when=midway.wants_tasks),
        Duty(save, every=job.config.checkpoint.save_every, when=lambda pause: pause.final or watch.retries.due(pause.step)),
        Duty(lambda pause: watch.copy(), when=goes_on, waits=False),
    ]


def _loop(job: Job, watch: Watch, duties: Sequence[Duty]) -> bool:
    """Train; returns whether all steps are done. A step is reported when the next one is queued, or before what waits for it."""
    with Reports(watch.step) as reports:
        while job.step < job.total_steps:
            reports.follow(watch.queue())
            pause = Pause(job.step, last=job.step == job.total_steps, stop=reports.stop)
            do(duties, pause, reports.catch_up)
            if pause.ends:
                return False
    return True


@contextmanager
def _open_log(job: Job) -> Any:
    """The run's log, with the resolved config beside it. A directory that cannot be written is an error on every rank."""
    config, rank = job.config, job.session.rank
    with ExitStack() as stack:
        with job.session.together("opening the log"):
            log = RunLog(
                config.log.dir,
                LogDisplay(config.log.every, config.log.to),
                total_steps=job.total_steps,
                sequence_length=config.model.seq_length,
                rank=rank,
                world_size=job.session.world.size,
                start_step=job.step,
                lost=job.log_claim.lost,
            )
            stack.enter_context(log)
            if rank == 0:
                with whole(Path(config.log.dir, "config.yaml"), text=True) as file:
                    file.write(job.config_text)
                provenance.keep(Path(config.log.dir), job.config_file, os.environ, sys.orig_argv)
            if job.session.launch.local_rank == 0:  # each node has its own log.dir where it is not shared
                for marker in (PREEMPTED, DIVERGED):
                    Path(config.log.dir, marker).unlink(missing_ok=True)
        yield log


def main(config_path: str, overrides: Sequence[str], stop: StopRequest, monitor: Monitor | None = None) -> int:
    """`megatrain train`: exit code 0 when done, 75 when stopped early with a checkpoint saved. Raises Diverged."""
    allocator = tune_allocator()
    job = build(config_path, overrides, monitor=monitor)
    if job.session.rank == 0 and allocator:
        print(f"allocator: {allocator}", flush=True)  # noqa: T201
    try:
        return 0 if train(job, stop) else os.EX_TEMPFAIL
    finally:
        job.close()
