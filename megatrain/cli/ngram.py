"""The arguments of `megatrain ngram fit / compile / score`."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.cli.preparation import add_run_options, run_prepare

AddVerb = Callable[..., argparse.ArgumentParser]


class WrongUseError(ValueError):
    """Arguments that do not go together."""

    exit_code = 2


def add_ngram(verbs: Any, add_verb: AddVerb, parser_class: Any) -> None:
    """Add `ngram` and its stages to the verbs."""
    what = "Kneser-Ney n-gram models: from text to perplexity, one stage each"
    example = "megatrain ngram fit --order 5 --input corpus.txt --arpa model.arpa"
    stages = verbs.add_parser("ngram", help=what, description=what, example=example).add_subparsers(
        metavar="STAGE", required=True, parser_class=parser_class
    )
    _add_fit(stages, add_verb)
    _add_compile(stages, add_verb)
    _add_score(stages, add_verb)


def _add_fit(stages: Any, add_verb: AddVerb) -> None:
    example = "megatrain ngram fit --order 5 --input corpus.txt --arpa model.arpa.gz --prune 0 0 1 --memory 2G"
    parser = add_verb(stages, "fit", _fit, "make a model of text, a sentence a line, and write it as an ARPA file", example)
    parser.add_argument("--order", type=int, required=True, metavar="N", help="words of the longest n-grams, 1 to 10")
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="TEXT", help="text files, words between blanks")
    parser.add_argument("--arpa", type=Path, required=True, metavar="OUT.arpa[.gz]", help="the file to write")
    parser.add_argument(
        "--prune",
        type=int,
        nargs="+",
        default=[],
        metavar="T",
        help="leave out n-grams that occur T times or less, an order each",
    )
    parser.add_argument(
        "--discount-fallback", type=float, nargs="*", metavar="D", help="discounts where counts give none (default 0.5 1 1.5)"
    )
    parser.add_argument(
        "--interpolate-unigrams",
        type=int,
        choices=(0, 1),
        default=1,
        metavar="0|1",
        help="spread mass over all words (default 1)",
    )
    _add_units(parser)
    what = "read the words <s>, </s> and <unk> of the text as blanks (as lmplz's --skip_symbols)"
    parser.add_argument("--skip-symbols", "--skip_symbols", action="store_true", help=what)
    parser.add_argument("--vocab-pad", type=int, default=0, metavar="N", help="spread it over at least N words")
    parser.add_argument("--memory", type=size, default=1 << 30, metavar="2G", help="of all processes (default 1G)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: as many as cores)")
    parser.add_argument(
        "--temporary", type=Path, metavar="DIR", help="where intermediate files lie (default: beside the output)"
    )


def _add_compile(stages: Any, add_verb: AddVerb) -> None:
    parser = add_verb(
        stages,
        "compile",
        _compile,
        "turn an ARPA file into one that loads at once",
        "megatrain ngram compile model.arpa model.bin",
    )
    parser.add_argument("arpa", type=Path, metavar="M.arpa", help="ARPA file of any tool, perhaps .gz, .xz, .bz2 or .zst")
    parser.add_argument("binary", type=Path, metavar="M.bin", help="the file to write")
    parser.add_argument("--quantize", type=int, default=0, metavar="BITS", help="2 to 16 bits a number (default: float32)")


def _add_score(stages: Any, add_verb: AddVerb) -> None:
    example = "megatrain ngram score --model model.bin --input corpus.txt"
    parser = add_verb(stages, "score", _score, "print a line of JSON for each line of text, then one of them all", example)
    parser.add_argument("--model", type=Path, required=True, metavar="M.arpa|M.bin", help="the model")
    parser.add_argument("--input", type=Path, required=True, metavar="TEXT", help="text file, a sentence a line")
    _add_units(parser)
    parser.add_argument("--no-sentences", action="store_true", help="lines are pieces of text: no <s> before, no </s> behind")
    parser.add_argument("--summary", action="store_true", help="the last line alone")


def _add_units(parser: argparse.ArgumentParser) -> None:
    what = "what a model is of: `words` between blanks (default), `characters`, `bytes`, or a TOKENIZER.json"
    parser.add_argument("--units", default="words", metavar="UNITS", help=what)


def add_data_filter(stages: Any, add_verb: AddVerb) -> None:
    """Add `filter` to the stages of `data`."""
    example = (
        "megatrain data filter --ngram wiki.bin --keep head,middle --input crawl.jsonl --output good.jsonl\n"
        "  megatrain data filter launch/configs/prepare_en_zh.yaml output.dir=judged"
    )
    what = "keep documents that an n-gram model finds usual (CCNet); or, of a CONFIG.yaml, read, clean and judge its sources"
    parser = add_verb(stages, "filter", _filter, what, example)
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="sources and rules, as of `data prepare`")
    add_run_options(parser)
    parser.add_argument("--input", nargs="+", metavar="FILE", help=".jsonl or text files, perhaps .gz or .zst")
    add_lines(parser)
    parser.add_argument("--output", metavar="OUT.jsonl", help="a line a document that is kept, with its perplexity")
    parser.add_argument("--ngram", type=Path, metavar="M.arpa|M.bin", help="the model")
    parser.add_argument("--keep", metavar="BUCKETS", help="head, middle, tail, joined by commas")
    _add_units(parser)
    parser.add_argument(
        "--percentiles",
        type=float,
        nargs=2,
        default=(30.0, 60.0),
        metavar="P",
        help="where middle and tail begin (default 30 60)",
    )
    parser.add_argument("--cutoffs", type=float, nargs=2, metavar="PPL", help="perplexities where they begin, instead")


def add_lines(parser: argparse.ArgumentParser) -> None:
    """Add how the lines of a .jsonl are read."""
    what = "field of a .jsonl line that holds the text (default text)"
    parser.add_argument("--key", default="text", metavar="KEY", help=what)
    limit = "longest line of a .jsonl, and document of a compressed text that must be in memory (default 32M)"
    parser.add_argument("--max-line", type=size, metavar="SIZE", help=limit)


def key_of(arguments: argparse.Namespace) -> Any:
    """The key of the text, with how long a line may be where that is given."""
    from megatrain.data.prepare.read import Lines

    return arguments.key if arguments.max_line is None else Lines(arguments.key, arguments.max_line)


def size(text: str) -> int:
    """Number of bytes from text such as `512M`, `2G` or a plain number. Raises ArgumentTypeError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size. Use for example 512M or 2G")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def _fit(arguments: argparse.Namespace) -> int:
    from megatrain.ngram.discounts import parse_fallback
    from megatrain.ngram.fit import Settings, fit

    settings = Settings(
        arguments.order,
        tuple(arguments.prune),
        parse_fallback(arguments.discount_fallback),
        bool(arguments.interpolate_unigrams),
        arguments.vocab_pad,
        arguments.memory,
        arguments.workers or os.cpu_count() or 1,
        arguments.units,
        arguments.skip_symbols,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that intermediate files are removed
    made = fit(arguments.input, arguments.arpa, settings, arguments.temporary)
    print(f"{arguments.arpa}: {made.tokens:,} tokens, {made.types:,} types")
    for order, (count, discounts) in enumerate(zip(made.counts, made.discounts, strict=True), 1):
        given = " (given: the text has none)" if discounts.fallback else ""
        print(f"  {order}-grams: {count:,}, discounts {' '.join(f'{d:.6g}' for d in discounts.values)}{given}")
    return 0


def _compile(arguments: argparse.Namespace) -> int:
    from megatrain.ngram.arpa_in import read_arpa
    from megatrain.ngram.binary import write_binary
    from megatrain.ngram.build import model_of

    write_binary(model_of(read_arpa(arguments.arpa)), arguments.binary, arguments.quantize)
    print(f"{arguments.binary}: {arguments.binary.stat().st_size:,} bytes")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from megatrain.ngram.reading import load
    from megatrain.ngram.report import report

    for line in report(load(arguments.model, arguments.units), arguments.input, not arguments.no_sentences, arguments.summary):
        sys.stdout.write(line)
    return 0


def _filter(arguments: argparse.Namespace) -> int:
    needed = ("input", "output", "ngram", "keep")
    given = [f"--{name}" for name in needed if getattr(arguments, name) is not None]
    if arguments.config is not None:
        if given:
            raise WrongUseError(
                f"data filter takes a CONFIG.yaml ({arguments.config}) or {given[0]}, not both: leave one of them out."
            )
        return run_prepare("filter", arguments)
    if arguments.worker or arguments.on or arguments.dry_run:
        option = "--worker" if arguments.worker else "--dry-run" if arguments.dry_run else f"--on {arguments.on}"
        raise WrongUseError(f"data filter {option} needs a CONFIG.yaml: megatrain data filter prepare.yaml {option}")
    if missing := [f"--{name}" for name in needed if f"--{name}" not in given]:
        raise WrongUseError(f"data filter without a CONFIG.yaml needs {', '.join(missing)}. See megatrain data filter --help.")
    from megatrain.ngram.buckets import Cutoffs, chosen
    from megatrain.ngram.filter import filter_files
    from megatrain.ngram.reading import load

    cutoffs = None if arguments.cutoffs is None else Cutoffs(*arguments.cutoffs)
    keep = chosen([name.strip() for name in arguments.keep.split(",")])
    model = load(arguments.ngram, arguments.units)
    print(
        filter_files(arguments.input, model, arguments.output, keep, tuple(arguments.percentiles), cutoffs, key_of(arguments))
    )
    return 0
