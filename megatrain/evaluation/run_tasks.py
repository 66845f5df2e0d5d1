"""Tasks of a run under way (eval.tasks): made ready once, before its first step, and asked of its weights whenever it is time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatrain.data.tokenizer import Tokenizer
from megatrain.evaluation.estimates import finite
from megatrain.evaluation.prompts import Manner
from megatrain.evaluation.results import TaskResult, document
from megatrain.evaluation.subject import Subject, blank_tokens, model_facts
from megatrain.evaluation.tasks import load_tasks
from megatrain.extras import need
from megatrain.inference.engine import Engine
from megatrain.inference.running import dealing
from megatrain.records.rows import TasksRow
from megatrain.runtime.installed import versions
from megatrain.training import Run


class RunTasks:
    """The tasks of one run, as tokens."""

    def __init__(self, run: Run, codec: Tokenizer, engine: Engine) -> None:
        """Read and prepare the tasks of the run's config; no collective.

        Raises ConfigError and TaskError with file and line, ValueError, and ImportError where a package is missing.
        """
        asked = run.config.eval
        self.run, self.codec, self.dtype = run, codec, run.chunks[0].build.dtype
        self.facts = model_facts(engine, codec, run.ctx)
        self.blanks = blank_tokens(run.config, codec, engine.vocab_size)
        tasks = load_tasks(asked.tasks, asked.limit, "eval.tasks")
        if any({"bleu", "chrf"} & set(task.keys.metrics) for task in tasks):
            need("sacrebleu", "BLEU or chrF", "eval")
        self.warnings = [warning for task in tasks for warning in task.warnings]
        self.asked = self._subject(engine).prepare(tasks, Manner(asked.num_fewshot))

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each request at its end."""
        windows = [len(one.tokens) for task in self.asked for of in task.scored for part in of for one in part.windows]
        written = [len(one.tokens) + one.max_tokens for task in self.asked for one in task.requests if one is not None]
        return windows + written

    def results(self, engine: Engine) -> list[TaskResult]:
        """The results of the engine's weights, the same on every rank (collective). Raises ValueError as the engine does."""
        return list(self._subject(engine).results(self.asked))

    def document(self, results: Sequence[TaskResult]) -> dict[str, Any]:
        """The results as one JSON object, as `megatrain eval --tasks --json` writes it."""
        run, asked = self.run, self.run.config.eval
        about = {
            "source": run.config.log.dir,
            "identity": None,
            "step": run.step,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        model = {**about, **self.facts}
        manner = {"num_fewshot": asked.num_fewshot, "seed": Manner().seed, "limit": asked.limit, "chat": False, "long": "cut"}
        return document(results, {"model": model, "asked": manner, "versions": versions()})

    def row(self, results: Sequence[TaskResult], seconds: float) -> TasksRow:
        """The results as a row of metrics.jsonl; seconds: they took."""
        run = self.run

        def of(which: str) -> dict[str, dict[str, float | None]]:
            return {
                r.task.name: {name: finite(getattr(one, which)) for name, one in r.estimates.metrics.items()} for r in results
            }

        items = {result.task.name: len(result.outcomes) for result in results}
        tokens = run.consumed_samples * run.config.model.seq_length
        return TasksRow(run.step, tokens, of("value"), of("low"), of("high"), items, seconds)

    def _subject(self, engine: Engine) -> Subject:
        return Subject(engine, self.codec, dealing(self.run), self.blanks)
