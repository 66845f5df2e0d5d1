"""The arguments of `megatrain data agree`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.cli.arguments import text

AddVerb = Callable[..., argparse.ArgumentParser]


def add_data_agree(stages: Any, add_verb: AddVerb) -> None:
    """Add `agree` to the stages of `data`."""
    example = "megatrain data agree ann.jsonl bob.jsonl --output disagreements.jsonl"
    what = "say how far raters of the same items agree (kappa, alpha)"
    parser = add_verb(stages, "agree", _agree, what, example)
    parser.add_argument(
        "labels",
        nargs="+",
        metavar="LABELS",
        help=".jsonl, .csv or .tsv: a row a label (item, rater, label), a column a rater, or a file a rater (item, label)",
    )
    for name, meaning in (("item", "names the item"), ("rater", "says who gave the label"), ("label", "holds the label")):
        parser.add_argument(f"--{name}", type=text, default=name, metavar="COLUMN", help=f"that {meaning} (default {name})")
    parser.add_argument(
        "--raters", type=_names, default=(), metavar="A,B", help="columns of a rater each (default: all label_*)"
    )
    parser.add_argument(
        "--level",
        choices=("nominal", "ordinal", "interval"),
        default="nominal",
        help="what labels are to alpha: names, an order, or numbers with distances (default nominal)",
    )
    parser.add_argument("--order", type=_names, default=(), metavar="LOW,HIGH", help="labels of an order that are no numbers")
    parser.add_argument("--output", type=Path, metavar="OUT.jsonl", help="write the items on which raters differ")
    parser.add_argument("--majority", type=Path, metavar="OUT.jsonl", help="write the majority's label of every item")


def _names(given: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text(given).split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{given!r} has an empty name. Use for example ann,bob")
    return names


def _agree(arguments: argparse.Namespace) -> int:
    from megatrain.corpus.report.labelled import Columns, read_labels
    from megatrain.corpus.report.verdict import disagreement_lines, majority_lines, verdict
    from megatrain.files import whole

    names = arguments.item, arguments.rater, arguments.label, arguments.raters
    given = read_labels(arguments.labels, Columns(*names, arguments.level, arguments.order))
    print(verdict(given, arguments.level))
    for path, lines in ((arguments.output, disagreement_lines), (arguments.majority, majority_lines)):
        if path is not None:
            with whole(path, text=True) as file:
                file.write(lines(given))
    return 0
