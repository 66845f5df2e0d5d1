"""Questions of a run to its own model between steps: prompts to be continued, for people to read (log.samples),
and tasks to be solved, as a measure (eval.tasks).

All is made ready before the first step, so that what is wrong is told at once. Whatever goes wrong with an answer later, the run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from megatrain.companions import tokenizer_of
from megatrain.config.asked import SamplesConfig
from megatrain.data.tokenizer import Tokenizer
from megatrain.duties import Pause, due
from megatrain.evaluation.scoring import on_replicas
from megatrain.inference.continuations import Continuations, FixedPrompt
from megatrain.inference.running import dealing, engine_of_run
from megatrain.job import Job
from megatrain.lifecycle.sections import Name
from megatrain.records.log import RunLog
from megatrain.records.samples_page import SamplesRow, SampleText

if TYPE_CHECKING:
    from megatrain.evaluation.run_tasks import RunTasks


class Midway:
    """The questions of one run to its own model; every rank has it, and asks alike."""

    def __init__(self, job: Job, log: RunLog) -> None:
        """Make prompts and tasks ready. Raises on all ranks what is wrong with one: ValueError, ConfigError, TaskError, ImportError."""
        self.job, self.log = job, log
        self.samples: Continuations | None = None
        self.tasks: RunTasks | None = None
        config = job.config
        if not config.log.samples.prompts and not config.eval.tasks:
            return
        with job.session.together("reading log.samples and eval.tasks"):
            self.codec = _codec(job)
            with engine_of_run(job, self.codec) as engine:
                if config.log.samples.prompts:
                    self.samples = Continuations(config, self.codec, engine)
                if config.eval.tasks:
                    from megatrain.evaluation.run_tasks import RunTasks  # noqa: PLC0415  (0.1 s that other runs need not spend)

                    self.tasks = RunTasks(job, self.codec, engine)
        for warning in self.tasks.warnings if self.tasks is not None else ():
            log.say(warning)

    def due(self, pause: Pause, every: int | None) -> bool:
        """Whether something asked every so many steps (None: train.eval_every) is to be asked: at the end of the run too."""
        steps = self.job.config.train.eval_every if every is None else every
        return pause.last or (not pause.stop and due(pause.step, steps))

    def wants_samples(self, pause: Pause) -> bool:
        """Whether samples are due."""
        return self.samples is not None and self.due(pause, self.job.config.log.samples.every)

    def write_samples(self, pause: Pause) -> None:
        """Let the model continue the prompts, and record it (collective). Ends early if a rank is told to stop, which the pause is told."""
        samples, job = self.samples, self.job
        if samples is None:
            return

        def ask() -> list[Any]:
            lengths = [prompt.longest for prompt in samples.prompts]
            with engine_of_run(job, self.codec, lengths, job.stop_requested) as engine:
                work: Callable[[Sequence[FixedPrompt]], list[Any]] = lambda some: samples.written(engine, some)  # noqa: E731
                return on_replicas(engine, samples.prompts, lambda prompt: prompt.longest, work, dealing(job))

        texts = self._asked("samples", ask, pause)
        if texts is not None:
            made = tuple(_made(prompt, of) for prompt, of in zip(samples.prompts, texts, strict=True))
            tokens = job.consumed_samples * job.config.model.seq_length
            self.log.samples(SamplesRow(job.step, tokens, manner(job.config.log.samples), made))

    def wants_tasks(self, pause: Pause) -> bool:
        """Whether tasks are due."""
        return self.tasks is not None and self.due(pause, self.job.config.eval.every)

    def solve_tasks(self, pause: Pause) -> None:
        """Let the model solve the tasks, and record it (collective). Ends early if a rank is told to stop, which the pause is told."""
        tasks, job, began = self.tasks, self.job, time.perf_counter()
        if tasks is None:
            return

        def ask() -> list[Any]:
            with engine_of_run(job, self.codec, tasks.lengths, job.stop_requested) as engine:
                return tasks.results(engine)

        results = self._asked("tasks", ask, pause)
        if results is not None:
            seconds = time.perf_counter() - began
            self.log.tasks(tasks.row(results, seconds), partial(tasks.document, results))

    def _asked(self, what: Name, ask: Callable[[], list[Any]], pause: Pause) -> list[Any] | None:
        """The result of `ask`; None, with a word in the log, where a rank is told to stop meanwhile, or the model has no answer."""
        job, failure = self.job, ""
        with job.guard.section(what):
            try:
                return ask()
            except ValueError as error:  # the same on all ranks (on_replicas)
                failure = str(error)
            wishes = torch.full((), float(job.stop_requested()), device=job.ctx.device)
            told = bool(job.ctx.world.to_host(job.ctx.world.all_reduce(wishes)))
        if told:
            self.log.say(f"the {what} after step {job.step} were left: the run was told to stop")
            pause.stop = True
            return None
        message = f"the {what} after step {job.step} came to nothing: {failure}"
        if job.session.rank == 0:
            self.log.event("bad_evaluation", job.step, message=message)
        self.log.say(message)
        return None


def _codec(job: Job) -> Tokenizer:
    codec = tokenizer_of(job.config)
    if codec is None:  # validate.py refuses it before
        raise ValueError("data.tokenizer is null, and prompts are text.")
    return codec


def manner(asked: SamplesConfig) -> str:
    """How tokens are chosen, in words."""
    drawn = "the most probable tokens" if asked.temperature == 0 else f"drawn at temperature {asked.temperature:g}"
    return drawn + (f", top_p {asked.top_p:g}" if asked.top_p is not None else "")


def _made(prompt: FixedPrompt, texts: Sequence[Sequence[Any]]) -> SampleText:
    """A prompt with what the model made of it."""
    said, tokens, finish = zip(*texts, strict=True)
    return SampleText(prompt.text, said, tokens, tuple(how == "stop" for how in finish), bool(prompt.masks))
