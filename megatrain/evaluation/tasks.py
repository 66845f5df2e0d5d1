"""Tasks by name: one of the shipped ones, a YAML file, or a folder of them, read whole and checked before a model is opened."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatrain.config.source import ConfigError
from megatrain.evaluation.items import read_items
from megatrain.evaluation.questions import Question, questions_of
from megatrain.evaluation.task_keys import TaskKeys, read_keys

SHIPPED = Path(__file__).parent / "shipped"
"""The folder of the tasks that come with megatrain."""
_NOTES = ("task_alias", "tag", "metadata", "metric_list")
"""Keys that change nothing of what is asked."""


@dataclass(frozen=True)
class EvalTask:
    """A task with its items."""

    name: str
    keys: TaskKeys
    path: Path
    questions: tuple[Question, ...]
    examples: tuple[Question, ...]
    """Where shots are taken from: the items of a file of their own, or those that are asked."""
    warnings: tuple[str, ...] = ()
    left_out: tuple[Question, ...] = ()
    """The items of its file behind the first ones, where only those are asked."""

    @cached_property
    def identity(self) -> str:
        """A hash of all that decides what is asked: keys, items and examples; neither where they lie nor how many are asked."""
        keys = {key: value for key, value in dataclasses.asdict(self.keys).items() if key not in (*_NOTES, *_PLACES)}
        items = [[one.item.identity for one in part] for part in ((*self.questions, *self.left_out), self.examples)]
        return hashlib.sha256(json.dumps([keys, items], sort_keys=True, ensure_ascii=False).encode()).hexdigest()


_PLACES = ("task", "items", "fewshot_items", "dataset_path", "dataset_kwargs")


def shipped_names() -> list[str]:
    """The names of the tasks that come with megatrain."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_tasks(names: Sequence[str], limit: int | None = None, key: str = "--tasks") -> tuple[EvalTask, ...]:
    """The tasks of names, files and folders, in order. limit: of each only the first items; key: where the names are given.

    Raises ConfigError and TaskError, with file and line; ImportError where a template needs jinja2.
    """
    tasks = tuple(load_task(path, limit) for name in names for path in _files(name, key))
    by_name: dict[str, Path] = {}
    for task in tasks:
        if task.name in by_name:
            raise ConfigError(
                f"two tasks have the name {task.name}: {by_name[task.name]} and {task.path}. Give one another name (its key `task`)."
            )
        by_name[task.name] = task.path
    return tasks


def load_task(path: Path, limit: int | None = None) -> EvalTask:
    """The task of a YAML file."""
    keys, warnings = read_keys(path)
    here = path.parent
    asked, examples = _item_files(keys, path)
    questions = questions_of(keys, read_items(here / asked))
    shown = questions if examples is None else questions_of(keys, read_items(here / examples))
    left_out = () if limit is None else questions[limit:]
    return EvalTask(keys.task or path.stem, keys, path, questions[:limit], shown, warnings, left_out)


def _files(name: str, key: str) -> list[Path]:
    """The files that a name means."""
    path = Path(name)
    if path.is_dir():
        found = sorted(path.glob("*.yaml"))
        if not found:
            raise ConfigError(f"{key} {name}: the folder has no .yaml file.")
        return found
    if path.suffix in (".yaml", ".yml") or "/" in name:
        return [path]
    shipped = SHIPPED / f"{name}.yaml"
    if shipped.is_file():
        return [shipped]
    names = shipped_names()
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    raise ConfigError(
        f"{key} {name}: no task has this name.{f' Did you mean {near[0]}?' if near else ''} Give the path of a .yaml file, a folder of "
        f"them, or one of {', '.join(names)}."
    )


def _item_files(keys: TaskKeys, path: Path) -> tuple[str, str | None]:
    """The files of the items that are asked, and of the examples (None: the same items)."""
    files = keys.dataset_kwargs.data_files
    if keys.items is not None:
        return keys.items, keys.fewshot_items
    if isinstance(files, str) or files is None:
        return str(files), keys.fewshot_items
    splits = dict(files)
    asked = keys.test_split or keys.validation_split or (next(iter(splits)) if len(splits) == 1 else None)
    shown = keys.fewshot_split or keys.training_split
    for key, split in (("test_split", asked), ("fewshot_split", shown)):
        if split is not None and split not in splits:
            raise ConfigError(f"{path}: {key} is {split}, and dataset_kwargs.data_files has {', '.join(splits)}.")
    if asked is None:
        raise ConfigError(f"{path}: dataset_kwargs.data_files has {', '.join(splits)}. Say which is asked: `test_split: NAME`.")
    return splits[asked], keys.fewshot_items or (splits[shown] if shown is not None and shown != asked else None)
