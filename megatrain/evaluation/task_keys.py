"""The keys of a task's YAML file: those of lm-evaluation-harness where it has them, with the same meaning.

task: capitals_en                                # docs/evaluation.md has every key
output_type: multiple_choice
items: capitals_en.jsonl
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatrain.config.effects import given, where
from megatrain.config.keys import choices
from megatrain.config.knob import knob
from megatrain.config.load import load_keys
from megatrain.config.source import ConfigError, Tree

METRICS: dict[str, tuple[str, ...]] = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes", "acc_tokens", "acc_pmi"),
    "classification": ("accuracy", "macro_f1", "micro_f1", "weighted_f1", "kappa", "mcc", "alpha"),
    "cloze": ("acc", "perplexity"),
    "loglikelihood": ("acc", "perplexity"),
    "infilling": ("acc", "perplexity", "exact_match", "f1"),
    "generate_until": ("exact_match", "f1", "bleu", "chrf"),
    "loglikelihood_rolling": ("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity"),
}
"""Kind of task -> its metrics; the first is the one that curves and clean and dirty scores show."""
SHOWN = 5
"""Metrics of a kind that are reported where a task names none."""

ALIASES = {
    ("multiple_choice", "acc_mutual_info"): "acc_pmi",
    ("classification", "acc"): "accuracy",
    ("classification", "f1"): "macro_f1",
}
"""(kind, the harness' name of a metric) -> its name here."""

REFUSED = {
    "process_docs": "it runs Python of the harness. Write the items as they shall be asked, or use lm-evaluation-harness with the adapter",
    "process_results": "it runs Python of the harness. Use lm-evaluation-harness with the adapter",
    "dataset_name": "items are read from files here. docs/evaluation.md shows how to save a set of the hub as .jsonl",
    "filter_list": "answers are compared in SQuAD's normal form. Use lm-evaluation-harness with the adapter for filters",
    "repeats": "each item is asked once, and its sampling is a function of the seed",
    "should_decontaminate": "`megatrain eval --contamination` looks at every task",
    "use_prompt": "prompts are written in doc_to_text",
    "gen_prefix": "write it at the end of doc_to_text",
    "group": "a list of tasks is a folder: --tasks FOLDER",
    "doc_to_image": "models here read text",
    "doc_to_audio": "models here read text",
}
"""Keys of the harness that have no meaning here, and what to do."""

WRITTEN = where("output_type", "generate_until")
CHOSEN = where("output_type", "multiple_choice", "classification", "cloze", "loglikelihood")
WITH_SPLITS = given("dataset_kwargs.data_files")
NOT_ROLLING = where("output_type", *(kind for kind in METRICS if kind != "loglikelihood_rolling"))


@dataclass(frozen=True)
class DataFiles:
    """Where items are, as `datasets` of Hugging Face says it."""

    data_files: tuple[tuple[str, str], ...] | str | None = knob(
        None, "A .jsonl file of items, or a mapping of splits to such files; relative to the task's own file."
    )
    cache_dir: str | None = knob(None, "Of the harness: files are read as they are.", use="cache")


@dataclass(frozen=True)
class ShotChoice:
    """Which items are shown as examples."""

    sampler: Literal["default", "first_n"] = knob(
        "default",
        "`default`: examples are drawn for each item by the seed; `first_n`: the first of the file, for curated ones.",
    )


@dataclass(frozen=True)
class Writing:
    """How answers are written."""

    until: tuple[str, ...] | str = knob(
        ("\n\n",), "Texts that end an answer and are no part of it.", use=("\\n",), not_empty=True
    )
    max_gen_toks: int = knob(256, "Tokens of the longest answer.", above=0, at_most=1 << 20)
    do_sample: bool = knob(False, "Draw tokens; false: the most probable token each time.")
    temperature: float = knob(0.0, "Divides the logits; 0: the most probable token, as with do_sample false.", at_least=0)
    top_k: int | None = knob(None, "Draw among so many most probable tokens; null: all.", above=0, use=50)
    top_p: float | None = knob(
        None, "Draw among the fewest tokens that have this probability together; null: all.", above=0, at_most=1, use=0.9
    )

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.until,) if isinstance(self.until, str) else self.until

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken each time."""
        return not self.do_sample or self.temperature == 0


@dataclass(frozen=True)
class MetricChoice:
    """A metric that a task reports."""

    metric: str = knob("", "Its name.", not_empty=True, use="acc")
    aggregation: str = knob("", "Of the harness, whose files have it; each metric has one meaning here (docs/evaluation.md).")
    higher_is_better: bool = knob(True, "Of the harness, likewise.")


@dataclass(frozen=True)
class TaskKeys:
    """A task as its file has it."""

    task: str = knob("", "Its name; by default that of the file.")
    output_type: Literal[
        "multiple_choice", "classification", "cloze", "loglikelihood", "infilling", "generate_until", "loglikelihood_rolling"
    ] = knob("multiple_choice", "What is asked (docs/evaluation.md); `loglikelihood` is the harness' name of `cloze`.")
    items: str | None = knob(
        None, "The .jsonl file with an item a line; relative to the task's own file.", use="items.jsonl", path=True
    )
    dataset_path: str | None = knob(None, "The harness' word for files of JSON: `json`.", use="json")
    dataset_kwargs: DataFiles = field(default_factory=DataFiles)
    test_split: str | None = knob(None, "Which of data_files is asked; null: validation_split.", WITH_SPLITS, use="test")
    validation_split: str | None = knob(
        None, "Which of data_files is asked where there is no test_split.", WITH_SPLITS, use="validation"
    )
    training_split: str | None = knob(
        None, "Which of data_files has examples where there is no fewshot_split.", WITH_SPLITS, use="train"
    )
    fewshot_split: str | None = knob(None, "Which of data_files has the examples.", WITH_SPLITS, use="train")
    fewshot_items: str | None = knob(
        None,
        "The .jsonl file of examples; null: examples are other items of the task.",
        NOT_ROLLING,
        use="examples.jsonl",
        path=True,
    )
    fewshot_config: ShotChoice = field(default_factory=ShotChoice)
    num_fewshot: int = knob(0, "Examples before each item.", NOT_ROLLING, at_least=0, at_most=1000)
    description: str = knob("", "Text before everything, or the system's message of a chat.", NOT_ROLLING)
    doc_to_text: str = knob(
        "", "What is asked: the name of a field, or text with {{field}} in it (jinja2).", NOT_ROLLING, use="question"
    )
    doc_to_choice: tuple[str, ...] | str | None = knob(
        None, "The choices, or label words: a list, or the name of a field that has one.", CHOSEN, use="choices"
    )
    doc_to_target: tuple[int, ...] | str | int = knob(
        "",
        "The right answer: text, or with choices its place among them, counted from 0; a field, text or number.",
        use="answer",
    )
    target_delimiter: str | None = knob(
        None,
        "Between what is asked and the answer; null: a blank, and nothing before an answer that begins with Han or kana.",
        NOT_ROLLING,
        use=" ",
    )
    fewshot_delimiter: str = knob("\n\n", "After each example.", NOT_ROLLING)
    answered_by: Literal["likelihood", "generation"] = knob(
        "likelihood",
        "Classification: the most probable of the label words, or the one that the model writes.",
        where("output_type", "classification"),
    )
    generation_kwargs: Writing = field(default_factory=Writing)
    metric_list: tuple[MetricChoice, ...] = knob((), "Metrics that are reported; empty: the first five of this kind of task.")
    language: Literal["en", "zh"] | None = knob(
        None,
        "Of the right answers, which decides how BLEU cuts text; null: as they look.",
        WRITTEN,
        use="zh",
    )
    cluster: str | None = knob(
        None,
        "Field that items from one passage share; intervals of means are then wider, as such items are not independent.",
        use="passage",
    )
    doc_to_decontamination_query: str | None = knob(
        None, "The text that is looked for in the training data; null: question and right answer.", use="question"
    )
    task_alias: str | None = knob(None, "Of the harness: a note.", use="my task")
    tag: tuple[str, ...] | str | None = knob(None, "Of the harness: a note.", use="my_tasks")
    metadata: tuple[tuple[str, str | int | float], ...] = knob((), "Of the harness: notes, such as {version: 1.0}.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that are reported."""
        named = tuple(ALIASES.get((self.output_type, one.metric), one.metric) for one in self.metric_list)
        return named or METRICS[self.output_type][:SHOWN]


def read_keys(path: Path) -> tuple[TaskKeys, tuple[str, ...]]:
    """The keys of a task's file, and warnings about them. Raises ConfigError, with file and line."""
    keys, tree = load_keys(TaskKeys, path, "output_type: multiple_choice", REFUSED)
    _require(keys, tree, path)
    return keys, _warnings(keys, tree)


def _fail(tree: Tree, key: str, said: str) -> None:
    raise ConfigError(f"{tree.place((key,))}: {key} {said}")


def _require(keys: TaskKeys, tree: Tree, path: Path) -> None:
    """Raise ConfigError unless the keys together are a task."""
    if "output_type" not in tree.root:
        raise ConfigError(f"{path}: output_type is missing. Write one of {choices(METRICS)}.")
    if keys.dataset_path not in (None, "json"):
        _fail(
            tree,
            "dataset_path",
            f"is {keys.dataset_path}, and items are read from files here. Save that set as .jsonl (docs/evaluation.md has how), and write "
            "`items: FILE.jsonl` in place of dataset_path, dataset_kwargs and the splits.",
        )
    if (keys.items is None) == (keys.dataset_kwargs.data_files is None):
        both = (
            "both items and dataset_kwargs.data_files are" if keys.items else "neither items nor dataset_kwargs.data_files is"
        )
        raise ConfigError(f"{path}: {both} given. Write `items: FILE.jsonl`.")
    wanted = ["doc_to_target"] + ["doc_to_text"] * (keys.output_type != "loglikelihood_rolling")
    wanted += ["doc_to_choice"] * (keys.output_type in ("multiple_choice", "classification"))
    for key in wanted:
        if tree.root.get(key) in (None, "", []):
            raise ConfigError(f"{path}: {key} is missing, which output_type {keys.output_type} needs. {_EXAMPLES[key]}")
    known = METRICS[keys.output_type]
    for number, name in enumerate(keys.metrics if keys.metric_list else ()):
        if name not in known:
            place = tree.place(("metric_list", number))
            raise ConfigError(f"{place}: {keys.output_type} has no metric {name!r}. Use {choices(known)}.")


_EXAMPLES = {
    "doc_to_text": 'Write the name of a field, as `doc_to_text: question`, or text: "Question: {{question}}\\nAnswer:".',
    "doc_to_choice": "Write the name of a field, as `doc_to_choice: choices`, or a list: [no, yes].",
    "doc_to_target": "Write the name of a field, as `doc_to_target: answer`.",
}


def _warnings(keys: TaskKeys, tree: Tree) -> tuple[str, ...]:
    """Remarks on values that are allowed, but most likely slips."""
    place = tree.place(("generation_kwargs", "until"))
    return tuple(
        f"{place}: generation_kwargs.until has a backslash and a letter ({text!r}), not a line's end: YAML reads \\n so in double "
        'quotes alone. Write "\\n"'
        for text in keys.generation_kwargs.stops
        if "\\n" in text or "\\t" in text
    )
