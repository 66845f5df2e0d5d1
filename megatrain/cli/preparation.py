"""The arguments of `megatrain data prepare`, and of the verbs that end at one of its stages."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

AddVerb = Callable[..., argparse.ArgumentParser]
VERBS = {
    "prepare": "from raw text to token stores: read, clean, judge, de-duplicate, report, tokenize",
    "read": "read raw files as documents, and report on them",
    "clean": "read and clean documents, and report on them",
    "dedup": "read, clean, judge and de-duplicate documents, and report on them",
}
"""The verbs, each with its help; `filter` is beside them (cli/ngram.py)."""


def add_corpus(stages: Any, add_verb: AddVerb) -> None:
    """Add the verbs to the stages of `data`."""
    for verb, what in VERBS.items():
        parser = add_verb(
            stages, verb, _prepare, what, f"megatrain data {verb} launch/configs/prepare_en_zh.yaml output.dir=prepared"
        )
        parser.set_defaults(verb=verb)
        parser.add_argument("config", metavar="CONFIG.yaml", help="sources, rules and output; every key is in docs/prepare.md")
        add_run_options(parser)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all of these verbs have."""
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="values that replace those of the file")
    parser.add_argument("--on", choices=("local", "slurm", "ray"), help="where workers run: as run.on=...")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what each rule would remove of a sample; nothing is written"
    )
    parser.add_argument(
        "--worker",
        action="store_true",
        help="be one worker among others that share the output folder (job arrays, other machines)",
    )


def run_prepare(verb: Any, arguments: argparse.Namespace) -> int:
    """Do what a verb means by its arguments."""
    from megatrain.corpus.conduct import prepare, work
    from megatrain.corpus.preview import preview

    overrides = [*arguments.overrides, *([f"run.on={arguments.on}"] if arguments.on else [])]
    run = preview if arguments.dry_run else work if arguments.worker else partial(prepare, arguments.main)
    if said := run(verb, arguments.config, overrides):
        print(said)
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    return run_prepare(arguments.verb, arguments)
