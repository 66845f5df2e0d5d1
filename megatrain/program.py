"""The training program around the step: from a config file to a finished run, with everything that people watch.

build    config -> session -> context -> data -> run, resumed where there is something to resume
train    step, log, evaluate, save, until done or told to stop
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from megatrain.checkpoint import load as checkpoint_load
from megatrain.checkpoint import save as checkpoint_save
from megatrain.checkpoint.manifest import WEIGHTS, LocalTensor
from megatrain.checkpoint.together import CheckpointError
from megatrain.config.budget import budget_of
from megatrain.config.load import Loaded, dump, from_dict, load
from megatrain.config.schema import Config, ParallelConfig
from megatrain.config.source import ConfigError
from megatrain.config.validate import validate
from megatrain.data.loader import HeldOut, Loader, build_held_out, build_samples
from megatrain.data.tokenizer import load_tokenizer
from megatrain.evaluate import evaluate
from megatrain.models.objective import Objective
from megatrain.optim.audit import audit
from megatrain.optim.clip import part_norms
from megatrain.optim.mixed_precision import StateTensors
from megatrain.parallel.buckets import traffic
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.schedules import chunks_problem
from megatrain.runtime.distributed import Launch, Session, connect
from megatrain.runtime.flops import Speed, hardware_flops_per_token, model_flops_per_token, parameter_count, peak_flops
from megatrain.runtime.guard import Guard
from megatrain.runtime.memory import tune_allocator
from megatrain.runtime.metrics import EvaluationRow, RunLog, StepRow, peak_memory_bytes
from megatrain.training import DTYPES, Run, StepReport, assemble, train_step

PREEMPTED = "preempted"
"""File in log.dir that says: stopped early, with a checkpoint; start me again."""


@dataclass(kw_only=True)
class Job(Run):
    """A run, and the process that it lives in."""

    session: Session
    config_text: str
    """The resolved config with the origin of each value."""
    resumed_from: Path | None = None


def build(
    config: Config | dict[str, Any] | str | Path, overrides: Sequence[str] = (), objective: Objective | None = None
) -> Job:
    """Join the world that the environment describes and make the run of `config` (a file, a tree or a Config) in it.

    Raises ConfigError, LaunchError, TransportError, TokenStoreError or CheckpointError, on every rank at once.
    """
    loaded = load(config, overrides) if isinstance(config, (str, Path)) else Loaded(from_dict(config), {})
    config, text = loaded.config, dump(loaded.config, loaded.origins)
    session = connect(Launch.from_environment(os.environ), config.parallel, config.train.hang_timeout_seconds)
    try:
        return _build_in(session, config, text, objective)
    except BaseException:
        session.close()  # so that the next build of this process can join a world
        raise


def _build_in(session: Session, config: Config, text: str, objective: Objective | None) -> Job:
    """The run of `config`, whose text with origins is `text`, in a world that was joined."""
    session.same("config", text)
    validate(config, session.world.size)
    require_schedule(config)
    _prepare_torch(config)
    ctx = ParallelContext.build(session.world, mesh_shape(config.parallel, session.world.size), session.device)
    with session.together("opening the data"):
        vocab_size = vocabulary(config)
        loader, held_out = open_data(config, ctx, vocab_size)
    run = assemble(config, ctx, loader, vocab_size, objective=objective, held_out=held_out)
    parts = {item.name: getattr(run, item.name) for item in fields(run)}
    job = Job(**parts, session=session, config_text=text)
    job.resumed_from = resume(job)
    return job


def require_schedule(config: Config) -> None:
    """Raise ConfigError where parallel.schedule cannot have parallel.virtual_pipeline_size chunks."""
    problem = chunks_problem(config.parallel.schedule, config.parallel.virtual_pipeline_size)
    if problem is not None:
        raise ConfigError(problem)


def mesh_shape(parallel: ParallelConfig, world_size: int) -> MeshShape:
    """The mesh of a config: data-parallel ranks are what remains of the world."""
    tp, cp, pp = parallel.tensor_parallel_size, parallel.context_parallel_size, parallel.pipeline_parallel_size
    return MeshShape(tp, cp, world_size // (tp * cp * pp), pp, parallel.expert_parallel_size)


def vocabulary(config: Config) -> int:
    """Size of the model's vocabulary. Raises ConfigError where it is not known or smaller than the tokenizer's."""
    given = config.model.vocab_size
    if config.data.tokenizer is None:
        if given is None:
            raise ConfigError(
                "model.vocab_size and data.tokenizer are both null. Set one: data.tokenizer=PATH, or model.vocab_size=8192."
            )
        return given
    size = load_tokenizer(config.data.tokenizer).vocab_size
    if given is not None and given < size:
        raise ConfigError(
            f"model.vocab_size={given} is smaller than the {size} tokens of data.tokenizer={config.data.tokenizer}. "
            f"Use model.vocab_size={size}, or leave it out."
        )
    return given or size


def open_data(config: Config, ctx: ParallelContext, vocab_size: int) -> tuple[Loader, dict[str, HeldOut]]:
    """This rank's loader, and the validation sets by name. Raises TokenStoreError."""
    data = config.data
    samples = build_samples(data.train, config.model.seq_length, config.train.seed, data.cache_dir, vocab_size)
    held_out = build_held_out(data.valid, config.model.seq_length, vocab_size, data.isolate_documents)
    sizes = (budget_of(config).batch_size, config.train.micro_batch_size, ctx.dp.rank, ctx.dp.size)
    return Loader(samples, *sizes, isolate_documents=data.isolate_documents), held_out


def _prepare_torch(config: Config) -> None:
    """Process-wide settings of torch that the config asks for."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # every buffer here is written before it is read


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save(job: Job) -> Path:
    """Save the state of the run and return the checkpoint's directory (collective)."""
    config = job.config
    progress = {
        "samples": job.consumed_samples,
        "step": job.step,
        "tokens": job.consumed_samples * config.model.seq_length,
        "updates": int(job.optimizer.updates.item()),
        "loss_scale": job.loss_scale.state(),
    }
    directory = Path(config.checkpoint_dir)
    return checkpoint_save.save(
        directory, job.step, _stored(job.optimizer.tensors()), job.ctx, progress, job.config_text, config.checkpoint.keep
    )


def resume(job: Job) -> Path | None:
    """Continue from the checkpoint that `checkpoint.resume` means, and return it; None for a fresh start (collective).

    With checkpoint.weights_only, a run that has no checkpoint of its own yet starts from the weights at that path.
    """
    checkpoint = job.config.checkpoint
    directory = Path(job.config.checkpoint_dir)
    checkpoint_save.tidy(directory, job.ctx)
    if checkpoint.resume == "never":
        return None
    own = _newest_whole(job, directory) if checkpoint.resume == "auto" or checkpoint.weights_only else None
    path = own or (None if checkpoint.resume == "auto" else Path(checkpoint.resume))
    if path is None:
        return None
    tensors = job.optimizer.tensors()
    if own is None and checkpoint.weights_only:
        tensors = {WEIGHTS: tensors[WEIGHTS]}
        checkpoint_load.load(path, _stored(tensors), job.ctx)
    else:
        progress = checkpoint_load.load(path, _stored(tensors), job.ctx, check=own is None).progress
        job.consumed_samples, job.step = progress["samples"], progress["step"]
        job.optimizer.updates.fill_(progress["updates"])
        job.loss_scale.restore(progress.get("loss_scale", job.loss_scale.state()))
    job.optimizer.restore(tensors)
    return path


def _stored(tensors: StateTensors) -> dict[str, dict[str, LocalTensor]]:
    """What a checkpoint of this rank holds: kind -> logical name -> tensor."""
    return {kind: {name: LocalTensor(*pair) for name, pair in named.items()} for kind, named in tensors.items()}


def _newest_whole(job: Job, directory: Path) -> Path | None:
    """The newest checkpoint of `directory` that verifies; None where there is none at all (collective).

    Raises CheckpointError where all are damaged: a run that lost its past must not begin anew by itself.
    """
    damaged: list[str] = []

    def pass_over(path: Path, reason: str) -> None:
        damaged.append(f"{path.name}: {reason}")
        if job.session.rank == 0:
            print(f"megatrain: passing over the damaged checkpoint {path}: {reason}", file=sys.stderr, flush=True)  # noqa: T201

    found = checkpoint_load.newest(directory, job.ctx, pass_over)
    if found is None and damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {directory} is whole (the newest: {damaged[0]}). "
            "Put a whole copy of one back, or begin anew with checkpoint.resume=never, which leaves them where they are."
        )
    return found


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(job: Job) -> bool:
    """Train until all steps are done (True), or until some rank is told to stop and a checkpoint is saved (False)."""
    config, limits = job.config, Limits(job.config)
    with _open_log(job) as log:
        watch = Watch(job, log)
        with Guard(job.session, config.train.hang_timeout_seconds, watch.guard_event) as guard:
            job.stop_requested = lambda: guard.stop_requested or limits.reached()
            return _loop(job, watch, guard)


def _loop(job: Job, watch: Watch, guard: Guard) -> bool:
    config = job.config
    watch.start()
    while job.step < job.budget.steps:
        job.before_update = watch.norms if _due(job.step + 1, config.log.norms_every) else None
        began = time.perf_counter()
        report = train_step(job)
        guard.tick()
        watch.step(report, time.perf_counter() - began)
        last = job.step == job.budget.steps
        if _due(job.step, config.train.audit_every):
            audit(job.flat, job.optimizer, job.ctx)
        if job.held_out and (last or _due(job.step, config.train.eval_every)):
            watch.evaluate()
        if last or report.stop or _due(job.step, config.checkpoint.save_every):
            watch.save()
        if report.stop and not last:
            watch.stopped()
            return False
    watch.finished()
    return True


class Limits:
    """When a run stops by itself before its last step: after a time, or when a file appears."""

    def __init__(self, config: Config) -> None:
        minutes = config.train.exit_after_minutes
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._file = None if config.train.exit_file is None else Path(config.train.exit_file)

    def reached(self) -> bool:
        """Whether it is time; asked once a step."""
        return time.monotonic() >= self._deadline or (self._file is not None and self._file.exists())


def _due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: only at the end) is due after `step`."""
    return every > 0 and step % every == 0


@contextmanager
def _open_log(job: Job) -> Any:
    """The run's log, with the resolved config beside it. A directory that cannot be written is an error on every rank."""
    config, rank = job.config, job.session.rank
    with ExitStack() as stack:
        with job.session.together("opening the log"):
            log = RunLog(
                config.log.dir,
                total_steps=job.budget.steps,
                sequence_length=config.model.seq_length,
                rank=rank,
                world_size=job.session.world.size,
                start_step=job.step,
                every=config.log.every,
                writers=config.log.to,
            )
            stack.enter_context(log)
            if rank == 0:
                Path(config.log.dir, "config.yaml").write_text(job.config_text, encoding="utf-8")
                Path(config.log.dir, PREEMPTED).unlink(missing_ok=True)
                _require_writable(Path(config.checkpoint_dir))
        yield log


def _require_writable(directory: Path) -> None:
    """Make the directory of the checkpoints. Raises CheckpointError, now and not at the first save, if it cannot be written."""
    probe = directory / f".writable_{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint.dir={directory} cannot be written ({error.strerror or error}). "
            "Set checkpoint.dir to a directory of your own, such as /tmp/run/checkpoints."
        ) from error


class Watch:
    """What is written about a run while it goes on; every rank has one, and rank 0's speaks."""

    def __init__(self, job: Job, log: RunLog) -> None:
        self.job, self.log, self.config = job, log, job.config
        model, vocab_size = self.config.model, job.chunks[0].vocab_size
        self.speed = Speed(
            model_flops_per_token(model, vocab_size),
            hardware_flops_per_token(model, vocab_size, self.config.train.recompute),
            job.session.world.size,
            peak_flops(job.session.device, DTYPES[self.config.train.precision], self.config.log.peak_tflops),
        )

    @property
    def tokens(self) -> int:
        """Tokens consumed so far by the whole job."""
        return self.job.consumed_samples * self.config.model.seq_length

    def start(self) -> None:
        """Say what begins, and where it comes from."""
        job, config = self.job, self.config
        size = parameter_count(config.model, job.chunks[0].vocab_size)
        ctx = job.ctx
        parallel = config.parallel
        sequence = " + sequence parallel" if parallel.sequence_parallel else ""
        chunks = f" x {parallel.virtual_pipeline_size} chunks" if parallel.virtual_pipeline_size > 1 else ""
        zero = f" (zero {parallel.zero_stage})" if ctx.dp.size > 1 else ""
        layout = f"tp {ctx.tp.size}{sequence}, pp {ctx.pp.size}{chunks} ({parallel.schedule}), dp {ctx.dp.size}{zero}"
        self.log.say(self.job.session.describe())
        self.log.say(
            f"model: {size:,} parameters | layout: {layout} | precision {config.train.precision} | "
            f"batch {config.train.global_batch_size} x {config.model.seq_length} tokens | peak: {self.speed.peak.note}"
        )
        for note in self._notes():
            self.log.say(note)
        if self.job.resumed_from is not None:
            self.log.say(f"resumed from {self.job.resumed_from} at step {job.step}")
        self._event("start" if self.job.resumed_from is None else "resume", checkpoint=str(self.job.resumed_from or ""))
        if job.step >= job.budget.steps:
            tokens, steps = config.train.tokens, job.budget.steps
            which, key = (
                (f"train.steps={steps}", "steps") if tokens is None else (f"{steps} (train.tokens={tokens:g})", "tokens")
            )
            self.log.say(f"nothing to do: step {job.step} of {which} is done. Raise train.{key} to go on.")

    def _notes(self) -> list[str]:
        """What is legal and wasteful in this layout, with the figure."""
        config, flat, replicas = self.config, self.job.flat, self.job.ctx.dp_cp.size
        asked, micro_batches = config.parallel.zero_stage, config.train.global_batch_size // config.train.micro_batch_size
        if replicas == 1:
            return [f"parallel.zero_stage={asked} changes nothing: there is one replica"] if asked > 1 else []
        micro_batches //= self.job.ctx.dp.size
        elements = sum(held.bucket.size for held in flat.trained)

        def moved(stage: int) -> int:
            sizes = flat.dtype.itemsize, flat.wide.itemsize
            return traffic(elements, replicas, stage, micro_batches, *sizes)

        if asked < 2 or moved(asked) <= moved(1):
            return []
        return [
            f"parallel.zero_stage={asked} with {micro_batches} micro-batches on a rank moves {moved(asked) / 1e6:,.1f} MB a step over "
            f"the data axis, {moved(asked) / moved(1):.1f}x of stage 1: fewer and larger micro-batches (train.micro_batch_size) move less"
        ]

    def step(self, report: StepReport, seconds: float) -> None:
        """Write one step's row."""
        tokens_per_second = report.samples * self.config.model.seq_length / seconds
        scale = float(self.job.loss_scale.scale) if self.job.loss_scale.dynamic else None
        if report.overflow and scale is not None:
            self.log.say(f"step {report.step} overflowed and changed nothing; the loss scale is {scale:g} now")
        self.log.step(
            StepRow(
                step=report.step,
                loss=report.loss,
                token_accuracy=report.accuracy,
                grad_norm=report.grad_norm,
                learning_rate=report.learning_rate,
                tokens=self.tokens,
                tokens_per_second=tokens_per_second,
                step_seconds=seconds,
                tflops_per_device=self.speed.tflops_per_device(tokens_per_second),
                mfu=self.speed.mfu(tokens_per_second),
                hfu=self.speed.hfu(tokens_per_second),
                memory_peak_bytes=peak_memory_bytes(self.job.session.device),
                skipped=report.skipped,
                loss_scale=scale,
            )
        )

    def norms(self, run: Run) -> None:
        """Write the norms of gradients and weights of each part (collective)."""
        self.log.norms(run.step + 1, part_norms(run.flat, run.ctx, run.loss_scale.scale))

    def evaluate(self) -> None:
        """Evaluate, write the row and redraw the picture."""
        began = time.perf_counter()
        result = evaluate(self.job, self.config.train.eval_batches)
        seconds = time.perf_counter() - began
        losses = {name: of.loss for name, of in result.sets.items() if name}
        self.log.evaluation(
            EvaluationRow(self.job.step, result.loss, result.tokens, result.accuracy, self.tokens, seconds, losses)
        )
        self.log.draw()

    def save(self) -> None:
        """Save a checkpoint."""
        began = time.perf_counter()
        path = save(self.job)
        self._event("save", path=str(path), seconds=round(time.perf_counter() - began, 3))

    def guard_event(self, kind: Literal["hang", "death"], rank: int | None, message: str) -> None:
        """Record what ended the run; called from a thread of the guard, on any rank."""
        self.log.event(kind, self.job.step, rank=rank, message=message)

    def stopped(self) -> None:
        """Say that the run was told to stop and is saved, and leave the marker that launch scripts look for."""
        if self.job.session.rank == 0:
            Path(self.config.log.dir, PREEMPTED).touch()
        self._event("signal")
        self.log.say(f"stopped at step {self.job.step} with a checkpoint saved; the same command goes on from there")

    def finished(self) -> None:
        """Last picture and event."""
        self.log.draw()
        self._event("end")

    def _event(self, kind: Any, **fields: Any) -> None:
        if self.job.session.rank == 0:
            self.log.event(kind, self.job.step, **fields)


def main(config_path: str, overrides: Sequence[str]) -> int:
    """`megatrain train`: exit code 0 when done, 75 when stopped early with a checkpoint saved."""
    allocator = tune_allocator()
    job = build(config_path, overrides)
    if job.session.rank == 0 and allocator:
        print(f"allocator: {allocator}", flush=True)  # noqa: T201
    try:
        return 0 if train(job) else os.EX_TEMPFAIL
    finally:
        job.loader.close()
        job.session.close()
