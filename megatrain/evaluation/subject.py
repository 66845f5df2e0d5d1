"""A model that is asked tasks: engine, tokenizer, and how its texts become tokens; a checkpoint's, or that of a run under way."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.config.schema import Config
from megatrain.data.samples.sentinels import resolve
from megatrain.data.tokenizer import Tokenizer
from megatrain.evaluation.asking import AskedTask, ask, prepare, require_askable
from megatrain.evaluation.blank_texts import BlankTexts, BlankTokens
from megatrain.evaluation.estimates import estimates_of
from megatrain.evaluation.prepared import LeftToRightTexts, Preparing
from megatrain.evaluation.prompts import Manner
from megatrain.evaluation.results import TaskResult
from megatrain.evaluation.tasks import EvalTask
from megatrain.inference.engine import Engine
from megatrain.inference.glm_positions import Marks
from megatrain.parallel.mesh import ParallelContext


@dataclass(frozen=True)
class Subject:
    """A model that is asked, on this rank.

    subject = Subject(engine, codec, ctx, blank_tokens(config, codec, engine.vocab_size))
    asked = subject.prepare(load_tasks(["quiz_en"]), Manner())       # raises what is wrong, alike on every rank
    results = list(subject.results(asked))
    """

    engine: Engine
    codec: Tokenizer
    ctx: ParallelContext
    blanks: BlankTokens | None = None
    """The special tokens of a GLM; None: it reads from left to right."""

    def texts(self, manner: Manner) -> Preparing:
        """How texts become tokens. Raises ValueError for a chat with a model that fills blanks."""
        if self.blanks is None:
            return LeftToRightTexts(self.codec, self.engine.max_length, manner.chat)
        if manner.chat is not None:
            raise ValueError("--chat: this model fills blanks, and is asked through them. Leave --chat out.")
        return BlankTexts(self.codec, self.engine.max_length, self.blanks)

    def prepare(self, tasks: Sequence[EvalTask], manner: Manner) -> list[AskedTask]:
        """Tasks as tokens, no collective. Raises TaskError, ValueError, MissingPackageError."""
        require_askable(tasks, self.blanks is not None)
        texts = self.texts(manner)
        asked = [prepare(task, manner, texts, self.engine.max_length) for task in tasks]
        if (largest := max(one.largest for one in asked)) >= self.engine.vocab_size:
            raise ValueError(
                f"the tokenizer {self.codec.label} made token {largest} of a task, and the model's vocabulary has "
                f"{self.engine.vocab_size} tokens. Give the tokenizer that the model was trained with: --tokenizer PATH."
            )
        return asked

    def results(self, asked: Sequence[AskedTask], advance: Callable[[int], None] = lambda _: None) -> Iterator[TaskResult]:
        """The results of tasks, one after the other; the same on every rank (collective). advance: told of requests that are done."""
        for one in asked:
            began = time.monotonic()
            outcomes = tuple(ask(one, self.engine, self.ctx, advance))
            yield TaskResult(one, outcomes, estimates_of(one.task, outcomes), time.monotonic() - began)


def model_facts(engine: Engine, codec: Tokenizer, ctx: ParallelContext) -> dict[str, Any]:
    """The facts about a model and its layout that belong to its results."""
    return {
        "max_length": engine.max_length,
        "vocab_size": engine.vocab_size,
        "layout": {axis: getattr(ctx, axis).size for axis in ("tp", "pp", "dp")},
        "device": ctx.device.type,
        "tokenizer": {
            "label": codec.label,
            "hash": hashlib.sha256(codec.identity.encode()).hexdigest(),
            "opening": list(codec.beginning.opening),
            "eod": codec.eod,
        },
    }


def blank_tokens(config: Config, codec: Tokenizer, vocab_size: int, marks: Marks | None = None) -> BlankTokens | None:
    """The special tokens of a GLM's run, or those of a Hugging Face directory that has `marks`; None for other models."""
    two_dimensional = config.model.two_dimensional
    if marks is not None:
        masks = {"[MASK]": marks.mask, "[gMASK]": marks.gmask}
        return BlankTokens((), masks, marks.sop, frozenset(codec.ending.stops), codec.eod, two_dimensional=two_dimensional)
    if config.data.objective != "glm":
        return None
    ids, text = resolve(config.data.glm, codec, vocab_size)
    ends = frozenset((ids.eop, ids.eos))
    special = {ids.cls, ids.mask, ids.gmask, ids.smask, ids.sop, ids.noise, *range(text, vocab_size)}
    masks = {"[MASK]": ids.mask, "[sMASK]": ids.smask, "[gMASK]": ids.gmask}
    return BlankTokens((ids.cls,), masks, ids.sop, ends, ids.eop, tuple(sorted(special - ends)), two_dimensional)
