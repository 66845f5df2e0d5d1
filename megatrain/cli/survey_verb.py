"""The arguments of `megatrain data audit`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.cli.arguments import seed, text

AddVerb = Callable[..., argparse.ArgumentParser]


def add_data_audit(stages: Any, add_verb: AddVerb) -> None:
    """Add `audit` to the stages of `data`."""
    example = "megatrain data audit crawl/ --output audit"
    parser = add_verb(stages, "audit", _audit, "report on text files or token stores as they are", example)
    parser.add_argument("inputs", nargs="+", metavar="FILE|FOLDER|PREFIX", help="text, .jsonl, folders of them, token stores")
    parser.add_argument("--output", type=Path, default=Path("audit"), metavar="FOLDER", help="of REPORT.md (default audit)")
    parser.add_argument("--key", type=text, default="text", metavar="KEY", help="field of a line of JSON that holds the text")
    parser.add_argument(
        "--tokenizer", type=text, metavar="bytes|TOKENIZER.json", help="of token stores that do not know theirs"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of examples and sheet (default 0)")
    parser.add_argument("--sheet", type=int, default=100, metavar="N", help="documents to read (default 100)")


def _audit(arguments: argparse.Namespace) -> int:
    from megatrain.corpus.survey import SurveyOptions, survey
    from megatrain.stderr import note

    options = SurveyOptions(arguments.key, arguments.tokenizer, arguments.seed, max(0, arguments.sheet))
    for alarm in survey(arguments.inputs, arguments.output, options):
        note(f"look at this: {alarm}")
    print(f"{arguments.output / 'REPORT.md'}, with removed.md, sheet.md and pictures beside it")
    return 0
