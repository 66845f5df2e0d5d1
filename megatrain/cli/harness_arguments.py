"""The arguments of `megatrain eval --harness`: tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatrain.cli.arguments import text
from megatrain.cli.imports import imports

_OF_HARNESS = ("include_path", "hub", "gen_kwargs", "system_instruction")
_OF_TASKS = ("long", "tensorboard", "contamination", "against", "compare")


def add_harness(harness: Any) -> None:
    """Add its options to a group of those of `eval`."""
    harness.add_argument(
        "--harness",
        metavar="TASKS",
        help="names or patterns of its tasks, groups and tags, separated by commas; nothing is fetched",
    )
    harness.add_argument(
        "--include-path", type=Path, metavar="DIR", help="a folder of its YAML files; only these tasks are known"
    )
    harness.add_argument(
        "--hub", action="store_true", help="fetch data sets, and know its own tasks beside those of --include-path"
    )
    harness.add_argument(
        "--gen-kwargs", metavar="K=V,...", help="in place of a task's generation_kwargs: temperature=0.8,top_p=0.9"
    )
    harness.add_argument("--system-instruction", type=text, metavar="TEXT", help="put before each prompt")


def wrong_about_harness(arguments: argparse.Namespace) -> str:
    """The error of its options and others that do not go together; "" if they do."""
    given = [
        name for name in (_OF_TASKS if arguments.harness else _OF_HARNESS) if getattr(arguments, name) not in (None, False)
    ]
    if arguments.harness and arguments.tasks:
        return "--harness and --tasks are two evaluations. Leave one of them out."
    if given and arguments.harness:
        return f"--{given[0]} is about --tasks. Leave it out, or --harness."
    if given:
        return f"--{given[0].replace('_', '-')} is about tasks of lm-evaluation-harness. Name some: --harness TASKS."
    return ""


def run_harness(arguments: argparse.Namespace) -> int:
    """Run the tasks."""
    with imports():
        from megatrain.inference.opening import TokenizerWish
        from megatrain.verbs.eval_harness import HarnessOptions, main

    options = HarnessOptions(
        tasks=tuple(name for name in arguments.harness.split(",") if name),
        include_path=arguments.include_path,
        hub=arguments.hub,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        seed=1234 if arguments.seed is None else arguments.seed,
        chat=arguments.chat,
        chat_template=arguments.chat_template,
        system_instruction=arguments.system_instruction,
        gen_kwargs=arguments.gen_kwargs,
        at_once=arguments.batch,
        dtype=arguments.dtype or "float32",
        tokenizer=TokenizerWish(arguments.tokenizer, arguments.eod, arguments.bos),
        json=None if arguments.json is None else Path(arguments.json),
        items=arguments.items,
        overrides=tuple(arguments.overrides),
    )
    return main(arguments.checkpoint, options)
