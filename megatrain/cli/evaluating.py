"""The arguments of `megatrain eval`: held-out text, tasks, comparisons of two models, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatrain.cli.arguments import index, positive, seed, text
from megatrain.cli.harness_arguments import add_harness, run_harness, wrong_about_harness
from megatrain.cli.imports import imports

AddVerb = Callable[..., argparse.ArgumentParser]
_OVERRIDE = re.compile(r"[a-z_]+\.[\w.]+=")


def add_eval(verbs: Any, add_verb: AddVerb, checkpoint_help: str, wrong_use: Callable[[str], int]) -> None:
    """Add `eval` to the verbs. wrong_use: says what is wrong, and gives the exit code."""
    example = (
        "megatrain eval runs/demo/checkpoints data.valid='{web: data/web, code: data/code}'\n"
        "  megatrain eval runs/demo/checkpoints --tasks quiz_en,quiz_zh --num-fewshot 2 --json results.json\n"
        "  megatrain eval --compare before.json after.json"
    )
    what = "measure a model: loss, perplexity and bits per byte on held-out text, or its answers to tasks, with intervals"
    parser = add_verb(verbs, "eval", _eval, what, example)
    parser.add_argument("checkpoint", metavar="CKPT", nargs="?", help=f"{checkpoint_help}; with --tasks also a HF_DIR")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="other data, layout, train.micro_batch_size or train.eval_batches than the run's (default: all of data.valid); with --tasks "
        "the layout alone",
    )
    parser.add_argument(
        "--json", nargs="?", const=True, metavar="FILE", help="one JSON object a line; with --tasks: write results to FILE"
    )
    parser.set_defaults(wrong_use=wrong_use)
    _add_tasks(parser.add_argument_group("tasks (docs/evaluation.md)"))
    _add_model(parser.add_argument_group("the model that is asked tasks"))
    add_harness(parser.add_argument_group("tasks of lm-evaluation-harness (docs/harness.md)"))


def _add_tasks(tasks: Any) -> None:
    tasks.add_argument(
        "--tasks", nargs="+", action="extend", metavar="TASK", help="names of shipped tasks, .yaml files, or folders of them"
    )
    tasks.add_argument("--num-fewshot", type=index, metavar="N", help="examples before each item (default: as the task says)")
    tasks.add_argument("--limit", type=positive, metavar="N", help="only the first N items of each task")
    tasks.add_argument("--seed", type=seed, metavar="N", help="of examples and drawn answers (default 1234)")
    tasks.add_argument("--chat", action="store_true", help="ask as a chat, by the model's template; examples are turns")
    tasks.add_argument(
        "--chat-template", metavar="NAME|FILE", help="with --chat: this one, built in or a FILE.jinja (default: the model's)"
    )
    tasks.add_argument(
        "--long", choices=("cut", "refuse"), help="items longer than the model: cut from the left (default), or an error"
    )
    tasks.add_argument("--items", type=Path, metavar="FILE", help="write a line of JSON for each item there")
    tasks.add_argument("--tensorboard", type=Path, metavar="DIR", help="write metrics there, at the checkpoint's step")
    tasks.add_argument("--png", type=Path, metavar="FILE", help="draw the scores with their intervals; also with --compare")
    tasks.add_argument(
        "--contamination", action="store_true", help="look for the items in data.train of the model's run, by 13-grams"
    )
    tasks.add_argument("--against", action="append", metavar="PREFIX", help="look for them in this token store (repeatable)")
    tasks.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two files of results (--json), or two models with --tasks, item by item"
    )


def _add_model(model: Any) -> None:
    model.add_argument(
        "--batch", type=positive, metavar="N", help="requests at a time (default 256); the numbers stay the same"
    )
    model.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="of weights and activations (default float32)"
    )
    model.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's file or `bytes` (default: the model's)")
    model.add_argument(
        "--eod", type=text, metavar="TOKEN", help="ends a document; a name, an id or `none` (default: the model's)"
    )
    model.add_argument("--bos", type=text, metavar="TOKEN", help="begins a text; likewise (default: the model's)")


TASK_OPTIONS = (
    "num_fewshot", "limit", "seed", "chat", "chat_template", "long", "items", "tensorboard", "contamination", "against", "batch", "dtype",
    "tokenizer", "eod", "bos",
)  # fmt: skip
"""Options that mean nothing without --tasks."""


def settled(arguments: argparse.Namespace) -> str:
    """Give words that an option has taken back to the arguments that they are of; the error of what is then wrong, or "".

    `--json` may stand before an override or the checkpoint, and `--tasks` before an override.
    """
    words: Sequence[str] = arguments.tasks or []
    arguments.overrides = [*arguments.overrides, *filter(_is_override, words)]
    arguments.tasks = [name for word in words if not _is_override(word) for name in word.split(",") if name]
    if _is_override(arguments.json):
        arguments.overrides, arguments.json = [arguments.json, *arguments.overrides], True
    if _is_override(arguments.checkpoint):
        arguments.overrides, arguments.checkpoint = [arguments.checkpoint, *arguments.overrides], None
    asks = arguments.compare or arguments.tasks or arguments.harness
    if arguments.checkpoint is None and isinstance(arguments.json, str) and not asks:
        arguments.checkpoint, arguments.json = arguments.json, True
    return wrong_about_harness(arguments) or _wrong(arguments)


def _is_override(word: object) -> bool:
    """Whether a word of the command line is a `section.key=value`."""
    return isinstance(word, str) and _OVERRIDE.match(word) is not None


def _wrong(arguments: argparse.Namespace) -> str:
    """The error of arguments that do not go together; "" if they do."""
    given = [name for name in TASK_OPTIONS if getattr(arguments, name) not in (None, False)]
    path, tasks, json, two = arguments.checkpoint, arguments.tasks or arguments.harness, arguments.json, arguments.compare
    errors = [
        (two and path is not None, f"--compare names both models, so {path} means nothing. Leave it out."),
        (
            not two and path is None,
            "the following arguments are required: CKPT (before --tasks, which takes all words behind it)",
        ),
        (
            two and (json or arguments.items or arguments.tensorboard),
            "--compare writes no file but --png: evaluate each model with --json.",
        ),
        (tasks and json is True, "--json: with --tasks say where results go: --json FILE."),
        (
            not tasks and isinstance(json, str),
            f"--json {json}: a file of results is written with --tasks. Without tasks --json prints.",
        ),
        (arguments.chat_template and not arguments.chat, "--chat-template is the way of a chat. Give --chat, too."),
        (arguments.png and not tasks and not two, "--png draws the scores of tasks. Name some: --tasks NAME."),
        (given and not tasks, f"--{''.join(given[:1]).replace('_', '-')} is about tasks. Name some: --tasks NAME."),
    ]
    return next((said for wrong, said in errors if wrong), "")


def _eval(arguments: argparse.Namespace) -> int:
    if wrong := settled(arguments):
        return int(arguments.wrong_use(wrong))
    if arguments.harness:
        return run_harness(arguments)
    if not arguments.tasks and not arguments.compare:
        with imports():
            from megatrain.verbs.eval import main as evaluate

        return evaluate(arguments.checkpoint, arguments.overrides, bool(arguments.json))
    with imports():
        from megatrain.inference.opening import TokenizerWish
        from megatrain.verbs.eval_tasks import TaskOptions, compare, main

    options = TaskOptions(
        tuple(arguments.tasks),
        arguments.num_fewshot,
        1234 if arguments.seed is None else arguments.seed,
        arguments.limit,
        arguments.chat,
        arguments.chat_template,
        arguments.long == "refuse",
        arguments.batch,
        arguments.dtype or "float32",
        TokenizerWish(arguments.tokenizer, arguments.eod, arguments.bos),
        arguments.contamination,
        tuple(arguments.against or ()),
        None if arguments.json is None else Path(arguments.json),
        arguments.items,
        arguments.tensorboard,
        tuple(arguments.overrides),
        arguments.png,
    )
    if arguments.compare:
        first, second = arguments.compare
        return compare(first, second, options)
    return main(arguments.checkpoint, options)
