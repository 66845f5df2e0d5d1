"""`megatrain eval --harness`: tasks of lm-evaluation-harness (extra [harness]) on a checkpoint or a Hugging Face directory.

Nothing is fetched unless `--hub` says so: tasks are the YAML files of `--include-path` with their data beside them, or tasks of the
harness whose data lie in the cache of `datasets`. The harness' tables go to standard output.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatrain.evaluation.chat_format import chat_of
from megatrain.extras import need
from megatrain.files import whole
from megatrain.inference.engine import EngineSettings
from megatrain.inference.opening import Opened, TokenizerWish, opened

OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")


@dataclass(frozen=True)
class HarnessOptions:
    """The options of `megatrain eval --harness`."""

    tasks: tuple[str, ...]
    """Names or patterns of tasks, groups and tags."""
    include_path: Path | None = None
    """A folder of tasks; only these are known, unless `hub`."""
    hub: bool = False
    """Whether data sets may be fetched."""
    num_fewshot: int | None = None
    limit: int | None = None
    seed: int = 1234
    chat: bool = False
    system_instruction: str | None = None
    gen_kwargs: str | None = None
    """`temperature=0.8,top_p=0.9`: in place of what tasks say."""
    at_once: int | None = None
    """Requests at a time."""
    dtype: str = "float32"
    chat_template: str | None = None
    """A built-in chat template or a file; None: the model's own."""
    tokenizer: TokenizerWish = TokenizerWish()  # noqa: RUF009
    json: Path | None = None
    """File of the results."""
    items: Path | None = None
    """File of the items, a line of JSON each."""
    overrides: tuple[str, ...] = ()


def main(path: str, options: HarnessOptions) -> int:
    """Print the harness' tables and write its results. Returns 0. Raises ValueError or ImportError, with advice."""
    if not options.hub:  # before `datasets` is imported, which reads them then
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
    need("lm_eval", "`megatrain eval --harness`", "harness")
    settings = EngineSettings() if options.at_once is None else EngineSettings(most_running=options.at_once)
    dtype = getattr(torch, options.dtype)
    with opened(path, options.overrides, tokenizer=options.tokenizer, dtype=dtype, settings=settings) as model:
        if not model.is_first:
            os.environ["TQDM_DISABLE"] = "1"
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
        results = _evaluated(model, options)
        if model.is_first:
            _show(results, options)
    return 0


def _evaluated(model: Opened, options: HarnessOptions) -> Any:
    """The harness' results (collective); None on ranks that are not their node's first."""
    from lm_eval import simple_evaluate  # noqa: PLC0415  an extra

    from megatrain.evaluation.harness import MegatrainLM  # noqa: PLC0415  needs an extra

    manager = _manager(options)
    chat = chat_of(model, options.chat_template).chat if options.chat else None
    evaluate = functools.partial(
        simple_evaluate,
        model=MegatrainLM(model, chat, options.seed),
        tasks=_known(options, manager),
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        gen_kwargs=options.gen_kwargs,
        system_instruction=options.system_instruction,
        apply_chat_template=options.chat,
        log_samples=options.items is not None,
        bootstrap_iters=100000 if model.is_first else 0,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )
    try:
        return evaluate()
    except ConnectionError as error:
        whether = "" if options.hub else "; nothing is fetched without --hub"
        raise ValueError(
            f"{error}{whether}. Where the hub cannot be reached, save the set as .jsonl, and give it by --include-path (docs/harness.md)."
        ) from None


def _manager(options: HarnessOptions) -> Any:
    """The tasks that there are: those of a folder, or those that come with the harness, with `--hub` both."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415  an extra

    folder = options.include_path
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--include-path {folder} is no folder. Give the one that has the tasks' YAML files.")
    included = None if folder is None else str(folder)
    return TaskManager(include_path=included, include_defaults=folder is None or options.hub)


def _known(options: HarnessOptions, manager: Any) -> list[str]:
    """Tasks, groups and tags by name or pattern. Raises ValueError for one that is not there."""
    for name in options.tasks:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, 3) or sorted(manager.all_tasks)[:3]
            known = f"There are {len(manager.all_tasks)}, such as {', '.join(near)}." if near else "There are none."
            raise ValueError(f"--harness {name}: there is no such task. {known} --include-path DIR names a folder of others.")
    return list(manager.match_tasks(list(options.tasks)))


def _show(results: Any, options: HarnessOptions) -> None:
    """Print the tables and write the results."""
    from lm_eval.utils import handle_non_serializable  # noqa: PLC0415  an extra

    samples = results.pop("samples", {})
    for kind in ("results", "groups"):
        if results.get(kind):
            sys.stdout.write(table_of(results, kind) + "\n")
    counts = results["config"]["counts"]
    sys.stdout.write(", ".join(f"{counts.get(name, 0)} {name}" for name in ("requests", "truncated", "spanned")) + "\n")
    if options.json is not None:
        with whole(options.json, text=True) as file:
            json.dump(results, file, indent=1, default=handle_non_serializable, ensure_ascii=False)
    if options.items is not None:
        with whole(options.items, text=True) as file:
            for task, items in samples.items():
                for item in items:
                    line = {"task": task, **item}
                    file.write(json.dumps(line, default=handle_non_serializable, ensure_ascii=False) + "\n")


def table_of(results: Any, kind: str) -> str:
    """The harness' table of results or of groups, in Markdown. Its own needs a pytablewriter that cannot always be installed."""
    rows = [[kind.rstrip("s") if kind == "groups" else "task", "version", "filter", "n-shot", "metric", "", "value", "stderr"]]
    for name, found in results[kind].items():
        about = [str(found.get("alias", name)), str(results["versions"].get(name, "")), str(results["n-shot"].get(name, ""))]
        for key, value in sorted(found.items()):
            metric, comma, of = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                better = {True: "\u2191", False: "\u2193"}.get(results["higher_is_better"].get(name, {}).get(metric), "")
                numbers = [_number(value), _number(found.get(f"{metric}_stderr,{of}", ""))]
                rows.append([*about[:2], of, about[2], metric, better, *numbers])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
