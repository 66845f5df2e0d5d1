"""Writes the record of a run as it goes on: log lines, events, evaluations, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

import torch

from megatrain.assembly import DTYPES, kernels_of, work_of_stages
from megatrain.checkpoint.directory import latest
from megatrain.checkpoint.retries import Retries
from megatrain.checkpoint.save import Contents, Saver
from megatrain.checkpoint.writing import staging_bytes
from megatrain.config.schema import Config, LogConfig, ParallelConfig
from megatrain.data.left_out import Window
from megatrain.duties import Pause, due
from megatrain.evaluate import Interrupted, evaluate
from megatrain.job import Job
from megatrain.kernels.dispatch import require
from megatrain.kernels.matmul import adds_inside
from megatrain.lifecycle.spikes import Bad, Diverged, Spike
from megatrain.lifecycle.stop import DIVERGED, PREEMPTED, write_marker
from megatrain.lifecycle.stragglers import Comparison, Stopwatch
from megatrain.optim.audit import AuditError
from megatrain.optim.optimizer import squares
from megatrain.optim.portions import portions
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import Part
from megatrain.parallel.zero import FlatParameters
from megatrain.records.log import RunLog
from megatrain.records.rows import ComputeRow, EvaluationRow, StepRow
from megatrain.resuming.restart import Keeper
from megatrain.resuming.resume import progress_of_job
from megatrain.resuming.rollback import documents, place_of, roll_back
from megatrain.runtime.device_memory import peak_memory_bytes
from megatrain.runtime.flops import Speed, hardware_flops_per_token, model_flops_per_token, parameter_count, peak_of_job
from megatrain.runtime.reports import Queued, StepReport
from megatrain.training import Run, queue_step
from megatrain.transport.consensus import broadcast_text, gather_texts

SUSPECTS = 16
"""Most documents that an event lists."""
OF_PEERS, OF_PAST, OF_WORK = "its peers", "what its stage took before", "what the other stages take"


class Watch:
    """Writes the record of one run. Every rank has one, as saving and evaluating are collective; the log writes on rank 0 alone."""

    speed: Speed
    """Speeds as shares of the devices' peak; set by `start`."""
    doubted = False
    """Whether the log has said that a share of the peak above 100% is impossible."""
    diverged: Diverged | None = None
    """Why the run may not go on."""

    hosts: Sequence[str] = ()
    """Host name of each rank; gathered by `start`."""

    def __init__(self, job: Job, log: RunLog) -> None:
        self.job, self.log, self.config, self.guard = job, log, job.config, job.guard
        self._norms: dict[int, dict[str, tuple[float, float]]] = {}
        """Norms of parts in steps that are not reported yet."""
        ranks, of_stage = job.ctx.world.size, job.ctx.world.size // job.ctx.pp.size  # a stage's ranks are neighbours (mesh.py)
        logs = self.config.log
        work = work_of_stages(self.config, job.chunks[0].build.vocab_size)
        self.comparison = Comparison([rank // of_stage for rank in range(ranks)], logs.slow_ratio, logs.slow_intervals, work)
        every = logs.stragglers_every if ranks > 1 else 0  # one rank has nobody to be compared with
        self.stopwatch = Stopwatch(job.ctx, job.session.recorder, every, self._compare)
        checkpoint = self.config.checkpoint
        self.saver = Saver(
            Path(self.config.checkpoint_dir),
            job.ctx,
            keep=checkpoint.keep,
            keep_every=checkpoint.keep_every,
            staging_bytes=staging_bytes(checkpoint.staging_gib, job.session.launch.local_world_size),
            on_saved=self._saved,
            on_failed=self._save_failed,
        )
        self.saver.before = job.claim.hold
        staging = staging_bytes(checkpoint.staging_gib, 2 * job.session.launch.local_world_size)
        self.keeper = Keeper(job, staging, log.say, self._restarted)
        self.retries = Retries(self.saver, checkpoint.give_up_after, checkpoint.timeout_seconds, log.say)

    @property
    def tokens(self) -> int:
        """Tokens consumed so far by the whole job."""
        return self.job.consumed_samples * self.config.model.seq_length

    def start(self, notes: Sequence[str] = ()) -> None:
        """Log the job, model, layout, and the checkpoint or weights that the run starts from (collective); notes: further lines."""
        job, config = self.job, self.config
        self.hosts = gather_texts(job.session.launch.host, job.ctx.world.group, job.ctx.device)
        vocab_size = job.chunks[0].build.vocab_size
        self.speed = Speed(
            model_flops_per_token(config.model, vocab_size),
            hardware_flops_per_token(config.model, vocab_size, config.train.recompute),
            job.session.world.size,
            peak_of_job(job.session, DTYPES[config.train.precision], config.log.peak_tflops),
        )
        size = parameter_count(config.model, vocab_size)
        ctx = job.ctx
        parallel, dtype = config.parallel, DTYPES[config.train.precision]
        sequence = " + sequence parallel" if parallel.sequence_parallel else ""
        chunks = f" x {parallel.virtual_pipeline_size} chunks" if parallel.virtual_pipeline_size > 1 else ""
        over = f" over {parallel.zero_ranks}" if parallel.zero_ranks else ""
        rounded = ", gradients sent in bf16" if parallel.reduce_dtype == "bf16" else ""
        zero = f" (zero {parallel.zero_stage}{over}{rounded})" if ctx.dp.size > 1 else ""
        layout = f"tp {ctx.tp.size}{sequence}, pp {ctx.pp.size}{chunks} ({parallel.schedule}), dp {ctx.dp.size}{zero}"
        self.log.say(self.job.session.describe())
        self.log.say(
            f"model: {size:,} parameters | layout: {layout} | precision {config.train.precision} | "
            f"batch {config.train.global_batch_size} x {config.model.seq_length} tokens | peak: {self.speed.peak.note}"
            f"{summing_note(ctx.device, dtype)} | kernels: {require(config.train.kernels, ctx.device, dtype)}"
        )
        if config.optim.warmup_steps is None:
            self.log.say(f"warm-up: {job.warmup.warmup_steps} of {job.total_steps} steps, as optim.warmup_steps is null")
        attention = kernels_of(config, ctx.tp.size, dtype, ctx.device).note
        if attention:
            self.log.say(attention)
        launch = job.session.launch
        for note in (launch.warning, *self._notes(), *between_nodes(parallel, ctx, launch.local_world_size)):
            if note:
                self.log.say(note)
        for what in (*notes, *job.notes):
            self.log.say(what)
        if self.job.resumed_from is not None:
            self.log.say(f"resumed from {self.job.resumed_from} at step {job.step}")
        for reason in job.damaged:
            self._event("damaged_checkpoint", message=reason)
        for change in job.changes:
            self.log.say(change)
        self._event("start" if self.job.resumed_from is None else "resume", checkpoint=str(self.job.resumed_from or ""))
        if job.step >= job.total_steps:
            tokens, steps = config.train.tokens, job.total_steps
            which, key = (
                (f"train.steps={steps}", "steps") if tokens is None else (f"{steps} (train.tokens={tokens:g})", "tokens")
            )
            self.log.say(f"nothing to do: step {job.step} of {which} is done. Raise train.{key} to go on.")
        elif config.train.on_spike == "rollback" and not job.goes_on:
            self.save(wait=True)  # so that there is one to go back to, from the first step on

    def _notes(self) -> list[str]:
        """Notes on settings that are legal, and unusual or wasteful."""
        return [*unusual_ratio(self.config), *wasteful(self.config, self.job)]

    def step(self, report: StepReport, seconds: float) -> None:
        """Write one step's row, its norms, and tell of a spike."""
        spikes = self.job.spikes.see(report)
        if report.step in self._norms:
            self.log.norms(report.step, self._norms.pop(report.step))
        tokens_per_second = report.samples * self.config.model.seq_length / seconds
        scale = report.loss_scale if self.job.loss_scale.dynamic else None
        if report.overflow and scale is not None:
            self.log.say(f"step {report.step} overflowed and changed nothing; the loss scale is {scale:g} now")
        doubt = None if self.doubted else self.speed.doubt(tokens_per_second)
        if doubt is not None:
            self.doubted = True
            self.log.say(doubt)
        self.log.step(
            StepRow(
                step=report.step,
                loss=report.loss,
                token_accuracy=report.accuracy,
                grad_norm=report.grad_norm,
                learning_rate=report.learning_rate,
                tokens=report.consumed_samples * self.config.model.seq_length,
                tokens_per_second=tokens_per_second,
                step_seconds=seconds,
                tflops_per_device=self.speed.tflops_per_device(tokens_per_second),
                mfu=self.speed.mfu(tokens_per_second),
                hfu=self.speed.hfu(tokens_per_second),
                memory_peak_bytes=peak_memory_bytes(self.job.session.device),
                skipped=report.skipped,
                loss_scale=scale,
                wait_seconds=report.wait_seconds,
                spike=bool(spikes),
            )
        )
        if spikes:
            self._spiked(report, spikes)
        if report.overflow and self.job.spikes.skipped == 1:
            self._skipped(report)

    def queue(self) -> Queued:
        """Queue the run's next step, measured (collective)."""
        return self.stopwatch.measure(self.job.step + 1, partial(queue_step, self.job))

    def _compare(self, step: int, seconds: list[float]) -> None:
        """Record the ranks' own seconds a step in the interval up to `step`, and who is slow or no more."""
        pace = self.comparison(seconds) if self.job.session.rank == 0 else None
        if pace is None:
            return
        host = self.hosts[pace.slowest]
        self.log.compute(ComputeRow(step, pace.least, pace.median, pace.most, pace.slowest, host, pace.ratio))
        for rank, ratio in pace.slow:
            beside = OF_PAST if rank in pace.of_stage else OF_WORK if rank in pace.of_work else OF_PEERS
            message = slow_note(rank, self.hosts[rank], ratio, beside, seconds[rank], self.config.log)
            self.log.event("slow", step, rank, host=self.hosts[rank], ratio=ratio, seconds=seconds[rank], message=message)
            self.log.say(message)
        for rank in pace.recovered:
            self.log.say(f"rank {rank} on {self.hosts[rank]} is as fast as it should be again")

    def norms(self, run: Run) -> None:
        """Take the norms of gradients and weights of each part, if they are due (collective). Observes a run before its updates."""
        step = run.step + 1
        if due(step, self.config.log.norms_every):
            norms = self._norms[step] = part_norms(run.flat, run.ctx, run.loss_scale.scale)
            self.job.spikes.see_parts(step, {part: gradient for part, (gradient, _) in norms.items()})

    def evaluate(self, pause: Pause) -> None:
        """Evaluate, write the row and redraw the picture. Ends early if a rank is told to stop meanwhile, and says so in the pause."""
        began = time.perf_counter()
        try:
            with self.guard.section("evaluation"):
                result = evaluate(self.job, self.config.train.eval_batches, self.job.stop_requested)
        except Interrupted:
            self.log.say(f"the evaluation after step {self.job.step} was left: the run was told to stop")
            pause.stop = True
            return
        seconds = time.perf_counter() - began
        losses = {name: of.loss for name, of in result.sets.items() if name}
        self.log.evaluation(
            EvaluationRow(
                self.job.step, result.loss, result.tokens, result.accuracy, self.tokens, seconds, losses, result.cloze_accuracy
            )
        )
        if not math.isfinite(result.loss):
            sets = [name or "data.valid" for name, of in result.sets.items() if not math.isfinite(of.loss)]
            message = f"the evaluation after step {self.job.step} gave a loss of {result.loss:g}, by {', '.join(sets)}"
            self._event("bad_evaluation", sets=sets, message=message)
            self.log.say(message)
        self.log.draw()

    def save(self, *, last: bool = False, wait: bool = False) -> None:
        """Save a checkpoint; returns when it is copied to host memory; with `wait`, and the last one of a run, which nothing follows, when
        it is on the disk. One that fails is tried again (checkpoint/retries.py).
        """
        job, contents = self.job, self._contents()
        with self.guard.section("save", self.saver.place):
            if last:
                self.retries.save_last(contents, portions(job.optimizer))
            else:
                self.retries.save(contents, portions(job.optimizer), wait=wait or not self.config.checkpoint.asynchronous)

    def recover(self, pause: Pause) -> None:
        """After steps that went wrong, go back to a checkpoint before them, or fail, with the reason in `diverged` (collective)."""
        job, bad = self.job, self.job.spikes.bad
        if bad is None:
            return
        last = job.left_out.window(bad.consumed - bad.samples, bad.consumed)
        try:
            with self.guard.section("save", self.saver.place):
                self.retries.settle()
                path, window = roll_back(job, bad)
        except Diverged as error:
            self.diverged, pause.failed = self._ended(bad, error), True
            return
        step, text = bad.last, f"samples {window[0]} to {window[1] - 1} are left out"
        self._event("rollback", step, to=job.step, checkpoint=str(path), why=bad.why, tries=job.spikes.retries)
        if self._reads:
            looks = self._suspects(step, window, last)
            self._event("skip_data", step, samples=list(window), **looks)
            self.log.say(
                f"step {step}: {bad.why}: back to step {job.step} ({path}); {text}, with {place_of(looks['documents'])}"
            )
        self.keeper.forget()  # else a restart would go on from steps that were gone back from
        self.log.went_back(job.step)
        self.save(wait=True)
        pause.gone_back = True

    def _spiked(self, report: StepReport, spikes: list[Spike]) -> None:
        """Record a spike, with the documents of its batch."""
        if not self._reads:
            return
        batch = self.job.left_out.window(report.consumed_samples - report.samples, report.consumed_samples)
        values = {spike.what: list(spike[1:]) for spike in spikes}
        looks = self._suspects(report.step, batch, batch)
        self._event("spike", report.step, values=values, samples=list(batch), **looks)
        if self.job.spikes.bad is None:  # else what follows is told together with it
            self.log.say(f"step {report.step}: {'; '.join(map(str, spikes))}, with {place_of(looks['documents'])}")

    @property
    def _reads(self) -> bool:
        """Whether this rank looks up the documents of a batch: rank 0, which writes them down."""
        return self.job.session.rank == 0

    def _skipped(self, report: StepReport) -> None:
        """Record the first of some skipped steps, whose loss or gradient was not finite."""
        batch = self.job.left_out.window(report.consumed_samples - report.samples, report.consumed_samples)
        message = f"step {report.step} was skipped: loss {report.loss:g}, gradient norm {report.grad_norm:g}"
        self._event("skipped", report.step, samples=list(batch), message=message)

    def _suspects(self, step: int, window: Window, batch: Window) -> dict[str, Any]:
        """For an event: the first documents of a batch, and the file to which those of the whole window are written."""
        name, of_batch = f"spikes/step_{step:08d}.json", documents(self.job.left_out, batch)
        every = of_batch if window == batch else documents(self.job.left_out, window)
        self.log.write(name, {"step": step, "samples": list(window), "batch": of_batch, "documents": every})
        return {"documents": of_batch[:SUSPECTS], "file": str(Path(self.config.log.dir, name))}

    def _ended(self, bad: Bad, error: Diverged) -> Diverged:
        """Record that the run ends, on every node in the marker that launch scripts look for; returns the error, with where to look
        (collective).
        """
        launch, left_out = self.job.session.launch, self.job.left_out
        window, batch = (
            left_out.window(max(0, bad.consumed - steps * bad.samples), bad.consumed) for steps in (bad.last - bad.first + 1, 1)
        )
        message, directory, looks = "", Path(self.config.checkpoint_dir), {}
        if self._reads:
            looks = self._suspects(bad.last, window, batch)
            message = (
                f"{error}. Look at {place_of(looks['documents'])} and what else the model read in these steps ({looks['file']}); "
                f"the last checkpoint is {directory / latest(directory)}"
            )
        message = broadcast_text(message, self.job.ctx.world.group, self.job.ctx.device)
        self._event("diverged", bad.last, message=message, samples=list(window), **looks)
        if launch.local_rank == 0:
            write_marker(Path(self.config.log.dir, DIVERGED), launch, message, bad.last)
        return Diverged(message)

    def audited(self, error: AuditError) -> None:
        """Record what an audit has found, which ends the run."""
        rank = error.ranks[0] if len(error.ranks) == 1 else None
        self._event("audit", rank=rank, ranks=error.ranks, tensors=error.tensors, message=str(error))

    def _contents(self) -> Contents:
        return Contents(self.job.step, progress_of_job(self.job), self.job.config_text)

    def copy(self) -> None:
        """Keep a copy of the state in memory, if one is due after this step."""
        if self.keeper.copies is None:
            return
        with self.guard.section("save", self.saver.place):
            self.keeper.after(self.job.step, self._contents, lambda: portions(self.job.optimizer))

    def _restarted(self, lost: int, seconds: float, source: str) -> None:
        self.log.event("restart", self.job.step, lost_steps=lost, seconds=round(seconds, 3), checkpoint=source)
        self.log.say(f"the restart took {seconds:.1f} s, to the end of its first step, and {lost} steps are trained again")

    def _saved(self, path: Path, step: int, seconds: float) -> None:
        self.log.event("save", step, path=str(path), seconds=round(seconds, 3))

    def _save_failed(self, step: int, message: str) -> None:
        self.log.event("save_failed", step, message=message)
        self.log.say(f"the checkpoint of step {step} could not be saved: {message}")

    def __enter__(self) -> Watch:
        self.job.observers.before_update.append(self.norms)
        self.guard.background, self.guard.on_event = self.saver.unfinished, self._guard_event
        self.guard.sections.longest_save = lambda: self.saver.longest
        events = str(self.log.directory.absolute() / "events.jsonl")
        self.guard.record = lambda: (self.job.step, events)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.job.observers.before_update.remove(self.norms)
        with self.guard.section("save", self.saver.place):
            self.saver.close()
            self.keeper.close(ended=False)
        self.guard.background, self.guard.on_event, self.guard.record = lambda: None, None, lambda: (0, "")

    def _guard_event(self, kind: Literal["hang", "death", "stopping"], rank: int | None, message: str) -> None:
        """Record what ended the run, or keeps it from its end; called from a thread of the guard, on any rank."""
        self.log.event(kind, self.job.step, rank=rank, message=message)

    def stopped(self, why: str) -> None:
        """Log that the run was told to stop and is saved; on every node, leave the marker that launch scripts look for."""
        self.stopwatch.finish()
        launch = self.job.session.launch
        self._event("signal", message=why)
        if launch.local_rank == 0:
            write_marker(Path(self.config.log.dir, PREEMPTED), launch, why, self.job.step)
        self.keeper.close(ended=True)
        self.log.say(f"stopped at step {self.job.step} with a checkpoint saved; the same command goes on from there")

    def finished(self) -> None:
        """Draw the last picture and write the last event."""
        self.stopwatch.finish()
        self.keeper.close(ended=True)
        self.log.draw()
        self._event("end")

    def _event(self, kind: Any, step: int | None = None, **fields: Any) -> None:
        if self.job.session.rank == 0:
            self.log.event(kind, self.job.step if step is None else step, **fields)


def summing_note(device: torch.device, dtype: torch.dtype) -> str:
    """Text for the start-up line: where a GPU adds products of 16-bit matrices to the float32 sums of weight gradients; "" on CPU."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return ""
    return f" | weight gradients: added {'inside' if adds_inside(device, dtype) else 'after'} the matmul"


def slow_note(rank: int, host: str, ratio: float, beside: str, seconds: float, log: LogConfig) -> str:
    """The text that names a rank which has become slow; beside: what its ratio is of."""
    return (
        f"rank {rank} on {host} is slow: its own work took {1000 * seconds:.1f} ms a step, {ratio:.2f}x of {beside}, "
        f"and all others wait for it (log.slow_ratio={log.slow_ratio:g} in {log.slow_intervals} intervals of {log.stragglers_every} steps)"
    )


def unusual_ratio(config: Config) -> list[str]:
    """A note if blanks take a share of the text that no published GLM was trained with."""
    ratio = config.data.glm.blank.mask_ratio
    if config.data.objective != "glm" or 0.1 <= ratio <= 0.2:
        return []
    return [f"data.glm.blank.mask_ratio={ratio}: GLMs are trained with 0.1 to 0.2, usually 0.15"]


def between_nodes(parallel: ParallelConfig, ctx: ParallelContext, of_node: int) -> list[str]:
    """A note where some of the replicas share shards, to spare the links between nodes, and shards go over them; of_node: its ranks."""
    inner = ctx.tp.size * ctx.cp.size
    if parallel.zero_ranks is None or ctx.world.size == of_node or of_node % (inner * ctx.shards.size) == 0:
        return []
    fits = of_node // inner
    advice = f": parallel.zero_ranks={fits} stays within one" if fits > 1 and ctx.dp_cp.size % fits == 0 else ""
    return [
        f"parallel.zero_ranks={parallel.zero_ranks}: {inner * ctx.shards.size} neighbouring ranks have the shards, and a node has "
        f"{of_node}, so that shards go between nodes{advice}"
    ]


class Traffic(NamedTuple):
    """Bytes that a rank sends in a step."""

    shards: int
    """Bytes to the ranks that share the shards with it: neighbours."""
    replicas: int
    """Bytes to those that have the same shard."""

    @property
    def total(self) -> int:
        """Bytes to all replicas."""
        return self.shards + self.replicas


def traffic(
    elements: int, shards: int, replicas: int, stage: int, micro_batches: int, weight_bytes: int, gradient_bytes: int
) -> Traffic:
    """The bytes that a rank sends over the replicas in a step, for so many parameters of its own (zero.py has the table).

    shards x replicas: data ranks; at stage 0 one shard, and all of them replicas. Stage 3 counts two gathers a micro-batch;
    recomputation adds none, since it lies within a layer's backward.
    """
    reduce, gather = elements * gradient_bytes, elements * weight_bytes
    within = {
        0: 0,
        1: reduce + gather,
        2: micro_batches * reduce + gather,
        3: micro_batches * (reduce + 2 * gather),
    }
    return Traffic(within[stage] * (shards - 1) // shards, 2 * reduce // shards * (replicas - 1) // replicas)


def wasteful(config: Config, run: Run) -> list[str]:
    """Notes on messages of ZeRO that save no memory."""
    flat, shards, replicas = run.flat, run.ctx.shards.size, run.ctx.replicas.size
    asked, micro_batches = config.parallel.zero_stage, config.train.global_batch_size // config.train.micro_batch_size
    if shards * replicas == 1:
        rounded, of = config.parallel.reduce_dtype, config.parallel.zero_ranks
        given = {
            f"parallel.zero_stage={asked}": asked > 1,
            f"parallel.zero_ranks={of}": of is not None,
            f"parallel.reduce_dtype={rounded}": rounded != "fp32",
        }
        return [f"{key} changes nothing: there is one replica" for key, changed in given.items() if changed]
    if shards == 1:
        return [f"parallel.zero_ranks=1 shards nothing: all {replicas} replicas keep everything, as with parallel.zero_stage=0"]
    micro_batches //= run.ctx.dp.size

    def moved(stage: int) -> int:
        sizes, total = (flat.dtype.itemsize, flat.sent.itemsize), 0
        for bucket in (local.bucket for local in flat.trained):
            among, over = run.ctx.factors(bucket.spec.average_over)
            total += traffic(bucket.size, among.size, over.size, stage, micro_batches, *sizes).total
        return total

    if asked < 2 or moved(asked) <= moved(1):
        return []
    return [
        f"parallel.zero_stage={asked} with {micro_batches} micro-batches on a rank moves {moved(asked) / 1e6:,.1f} MB a step over "
        f"the data axis, {moved(asked) / moved(1):.1f}x of stage 1: fewer and larger micro-batches (train.micro_batch_size) move less"
    ]


PARTS: tuple[Part, ...] = get_args(Part)
"""Parts of a model, for reports."""


def part_norms(flat: FlatParameters, ctx: ParallelContext, loss_scale: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Part -> (norm of its gradients, norm of its weights), over the whole model (collective over the world; before the update)."""
    shards = [shard for shard in flat.owned if shard.counts]
    parts = torch.tensor([PARTS.index(shard.parameter.spec.part) for shard in shards], dtype=torch.int64)
    both = torch.zeros(2, len(PARTS), dtype=torch.float64, device=ctx.device)
    if shards:
        for kind, tensors in enumerate(([shard.gradient for shard in shards], [shard.weight for shard in shards])):
            found, owners = squares(tensors)
            mine = (parts[owners] == torch.arange(len(PARTS))[:, None]).to(ctx.device)  # [parts, n]
            both[kind] = found.where(mine, 0.0).sum(1)
    gradients, weights = ctx.world.all_reduce(both).sqrt()
    rows = ctx.world.to_host(torch.stack([gradients / loss_scale, weights], 1)).tolist()
    return {part: (gradient, weight) for part, (gradient, weight) in zip(PARTS, rows, strict=True) if weight > 0}
