"""`megatrain eval --tasks`: a model's answers to tasks, with intervals, under any layout; and two models compared item by item."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.manifest import read_manifest
from megatrain.data.bar import bar
from megatrain.data.indexed import TokenStore
from megatrain.data.tokenizer import Tokenizer
from megatrain.evaluation.chat_format import chat_of
from megatrain.evaluation.compared import compared, comparison_table, differences_of_manner, read_results, verdicts
from megatrain.evaluation.contamination import codec_of_store, overlaps, text_to_look_for, texts_of_store
from megatrain.evaluation.items import TaskError
from megatrain.evaluation.prompts import Manner
from megatrain.evaluation.results import TaskResult, document, table, write_items, write_json
from megatrain.evaluation.scoring import Advance
from megatrain.evaluation.subject import Subject, blank_tokens, model_facts
from megatrain.evaluation.tasks import EvalTask, load_tasks
from megatrain.huggingface.model_files import is_hf
from megatrain.inference.engine import EngineSettings
from megatrain.inference.opening import Opened, TokenizerWish, opened
from megatrain.records.tensorboard import TensorBoard
from megatrain.runtime.installed import versions
from megatrain.stderr import note


@dataclass(frozen=True)
class TaskOptions:
    """The options of `megatrain eval --tasks`."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    seed: int = 1234
    limit: int | None = None
    chat: bool = False
    chat_template: str | None = None
    """A built-in template, or a file; None: the model's."""
    refuse_long: bool = False
    at_once: int | None = None
    dtype: str = "float32"
    tokenizer: TokenizerWish = field(default_factory=TokenizerWish)
    contamination: bool = False
    """Whether items are looked for in the run's data.train."""
    against: tuple[str, ...] = ()
    """Prefixes of token stores in which they are looked for."""
    json: Path | None = None
    items: Path | None = None
    tensorboard: Path | None = None
    overrides: tuple[str, ...] = ()
    png: Path | None = None
    """A picture of the scores."""


@dataclass(frozen=True)
class Findings:
    """The results of an evaluation, on the first rank."""

    results: list[TaskResult]
    about: dict[str, Any]
    step: int


def main(model: str, options: TaskOptions) -> int:
    """Evaluate a model on tasks: print a table, write files. Returns 0.

    Raises TaskError, ConfigError, CheckpointError, ImportError, OSError.
    """
    _require_folders(options)
    tasks = _tasks(options)
    found = _evaluated(model, tasks, options)
    if found is not None:
        sys.stdout.write(table(found.results) + "\n")
        _write(found, options)
    return 0


def compare(first: str, second: str, options: TaskOptions) -> int:
    """Compare two files of results, or two models on the same tasks: print the differences. Returns 0. Errors as `main`."""
    _require_folders(options)
    documents = [_document(name, options) for name in (first, second)]
    if None not in documents:
        before, after = documents
        found = compared(before, after)
        lines = [f"first: {first}", f"second: {second}", comparison_table(found), *verdicts(found)]
        sys.stdout.write("\n".join([*lines, *differences_of_manner(before, after)]) + "\n")
        if options.png is not None:
            _draw({f"first: {first}": before["tasks"], f"second: {second}": after["tasks"]}, options.png)
    return 0


def _document(name: str, options: TaskOptions) -> Any:
    """The results in a file, or of a model; None on ranks but the first."""
    if Path(name).is_file() or name.endswith(".json"):
        return read_results(Path(name))
    if not options.tasks:
        raise TaskError(
            f"--compare {name}: a model needs tasks to be compared on: --tasks NAME. Files of results (.json) need none."
        )
    found = _evaluated(name, _tasks(options), options)
    return None if found is None else document(found.results, found.about)


def _require_folders(options: TaskOptions) -> None:
    """Raise TaskError where a file of results could not be written, before hours of work."""
    for name, path in (("--json", options.json), ("--items", options.items), ("--png", options.png)):
        if path is not None and not path.parent.is_dir():
            raise TaskError(f"{name} {path}: there is no folder {path.parent}. Make it first.")
        if path is not None and path.is_dir():
            raise TaskError(f"{name} {path} is a folder. Give a file in it.")


def _tasks(options: TaskOptions) -> tuple[EvalTask, ...]:
    return load_tasks(options.tasks, options.limit)


def _evaluated(path: str, tasks: Sequence[EvalTask], options: TaskOptions) -> Findings | None:
    """The results of a model on tasks; None on ranks but the first."""
    settings = EngineSettings() if options.at_once is None else EngineSettings(most_running=options.at_once)
    dtype = getattr(torch, options.dtype)
    with opened(path, options.overrides, tokenizer=options.tokenizer, dtype=dtype, settings=settings) as model:
        with model.session.together("preparing the tasks"):
            manner = Manner(
                options.num_fewshot,
                options.seed,
                chat_of(model, options.chat_template) if options.chat else None,
                options.refuse_long,
            )
            codec = model.codec
            subject = Subject(
                model.engine, codec, model.ctx, blank_tokens(model.config, codec, model.engine.vocab_size, model.marks)
            )
            asked = subject.prepare(tasks, manner)
            stores = _stores(model, options)
        for task in tasks:
            advice = "Give every machine the same task files."
            model.session.same(f"task {task.name}", f"{len(task.questions)} items, hash {task.identity}", advice)
        if model.is_first:
            for said in [warning for task in tasks for warning in task.warnings]:
                note(f"megatrain: {said}")
        with _progress(sum(one.size for one in asked) // model.ctx.dp.size, model.is_first) as advance:
            results = list(subject.results(asked, advance))
        about, step = _about(model, options), _step(model.source)
        first = model.is_first
    if not first:
        return None
    if stores:
        results = contaminated(results, stores)
    return Findings(results, about, step)


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Advance]:
    """A bar with the time left, on a terminal."""
    if not shown:
        yield lambda _count: None
        return
    with bar("requests", total) as advance:
        yield advance


def _stores(model: Opened, options: TaskOptions) -> list[tuple[TokenStore, Tokenizer]]:
    """The token stores in which items are looked for, with their tokenizers. Raises TaskError, TokenStoreError."""
    if not (options.contamination or options.against):
        return []
    train = model.config.data.train
    prefixes = options.against or tuple(path for corpus in train for path in (corpus.path, corpus.answers) if path is not None)
    if not prefixes:
        raise TaskError(
            "--contamination: the model's run names no data.train. Say where to look: --against PREFIX of a token store."
        )
    stores = [TokenStore(prefix) for prefix in prefixes]
    return [(store, codec_of_store(store, model.codec)) for store in stores]


def contaminated(results: Sequence[TaskResult], stores: Sequence[tuple[TokenStore, Tokenizer]]) -> list[TaskResult]:
    """Results with what token stores have of their items. Raises TokenStoreError."""
    texts = [text_to_look_for(result.task.keys, one) for result in results for one in result.task.questions]
    with bar("training data", sum(store.tokens for store, _ in stores)) as advance:
        pieces = (piece for store, codec in stores for piece in texts_of_store(store, codec, advance))
        found = iter(overlaps(texts, pieces))
    return [replace(result, overlaps=tuple(next(found) for _ in result.task.questions)) for result in results]


def _about(model: Opened, options: TaskOptions) -> dict[str, Any]:
    """The facts that make results repeatable: the model, how it was asked, and with what."""
    return {
        "model": {
            "source": str(model.source),
            "identity": _identity(model.source),
            "step": _step(model.source),
            "dtype": options.dtype,
            **model_facts(model.engine, model.codec, model.ctx),
        },
        "asked": {
            "num_fewshot": options.num_fewshot,
            "seed": options.seed,
            "limit": options.limit,
            "chat": options.chat,
            "chat_template": options.chat_template,
            "long": "refuse" if options.refuse_long else "cut",
            "batch": options.at_once,
        },
        "versions": versions(),
    }


_ENDS = 1 << 20
"""Bytes of the beginning and of the end of each weights' file that are hashed."""


def _identity(source: Path) -> str:
    """A hash of weights: of a checkpoint that of its manifest, which has one of each file; else of names, sizes and ends of files."""
    if not is_hf(source):
        return str(read_manifest(source).checksum)
    digest = hashlib.sha256()
    for path in sorted(source.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()


def _step(source: Path) -> int:
    """The step of a checkpoint; 0 for a Hugging Face directory."""
    return 0 if is_hf(source) else read_manifest(source).step


def _write(found: Findings, options: TaskOptions) -> None:
    """Write the files that were asked for."""
    if options.json is not None:
        write_json(options.json, document(found.results, found.about))
    if options.png is not None:
        _draw({found.about["model"]["source"]: document(found.results, found.about)["tasks"]}, options.png)
    if options.items is not None:
        write_items(options.items, found.results)
    if options.tensorboard is not None:
        writer = TensorBoard(options.tensorboard, 1, 1, restart=False)
        for result in found.results:
            scalars = {f"eval/{result.task.name}/{name}": of.value for name, of in result.estimates.metrics.items()}
            writer.scalars(found.step, scalars)
        writer.close()


def _draw(models: dict[str, Any], png: Path) -> None:
    """Write a picture of models' scores. Raises OSError."""
    from megatrain.evaluation.score_picture import draw_scores  # noqa: PLC0415  (0.5 s of matplotlib, which few want)

    if lost := draw_scores(models, png):
        note(f"megatrain: {png} has not {lost} of the scores, for which it has no room")
