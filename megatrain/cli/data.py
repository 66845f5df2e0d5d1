"""The arguments of `megatrain data`: tokenizer, tokenize, inspect, blend, filter, audit, agree."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.cli.arguments import index, positive, text
from megatrain.cli.label_agreement import add_data_agree
from megatrain.cli.ngram import add_data_filter, add_lines, key_of, size
from megatrain.cli.preparation import add_corpus
from megatrain.cli.survey_verb import add_data_audit

TOKENIZER_FILES = (".json", ".tiktoken", ".model")
AddVerb = Callable[..., argparse.ArgumentParser]


def add_data(verbs: Any, add_verb: AddVerb, add_config: Callable[..., None], parser_class: Any) -> None:
    """Add `data` and its stages to the verbs."""
    what = "text files to token store, one stage each"
    data = verbs.add_parser("data", help=what, description=what, example="megatrain data inspect data/train")
    stages = data.add_subparsers(metavar="STAGE", required=True, parser_class=parser_class)
    _add_data_tokenizer(stages, add_verb)
    _add_data_tokenize(stages, add_verb)
    _add_data_inspect(stages, add_verb)
    _add_data_blend(stages, add_verb, add_config)
    _add_data_fertility(stages, add_verb)
    add_data_filter(stages, add_verb)
    add_data_audit(stages, add_verb)
    add_corpus(stages, add_verb)
    add_data_agree(stages, add_verb)


def _data_tokenizer(arguments: argparse.Namespace) -> int:
    from megatrain.data.tokenizers.fitting import train_tokenizer

    train_tokenizer(
        arguments.input, arguments.vocab_size, arguments.output, key_of(arguments), arguments.kind, arguments.sample
    )
    return 0


def _data_tokenize(arguments: argparse.Namespace) -> int:
    from megatrain.data.boundaries import NONE
    from megatrain.data.prepare.tokenize import tokenize_files
    from megatrain.data.tokenizer import load_tokenizer

    report = tokenize_files(
        arguments.input,
        load_tokenizer(arguments.tokenizer, arguments.eod, arguments.bos),
        arguments.output,
        workers=arguments.workers,
        append_eod=arguments.append_eod or arguments.eod not in (None, NONE),
        key=key_of(arguments),
        engine=arguments.engine,
    )
    print(report)
    return 0


def _data_inspect(arguments: argparse.Namespace) -> int:
    from megatrain.data.describing import describe_document, describe_token
    from megatrain.data.store_record import describe, describe_tokenizer

    if arguments.token is not None:
        print(describe_token(arguments.prefix, arguments.token))
    elif arguments.document is not None:
        print(describe_document(arguments.prefix, arguments.document))
    elif arguments.prefix == "bytes" or (arguments.prefix.endswith(TOKENIZER_FILES) and Path(arguments.prefix).is_file()):
        print(describe_tokenizer(arguments.prefix))
    else:
        print(describe(arguments.prefix))
    return 0


def _data_blend(arguments: argparse.Namespace) -> int:
    from megatrain.verbs.data_blend import main as blend

    return blend(arguments.config, arguments.overrides)


def _data_fertility(arguments: argparse.Namespace) -> int:
    from megatrain.data.tokenizers.fertility import measure_fertility

    sources = {file: [file] for file in arguments.input} | {name: files for name, *files in arguments.source}
    print(measure_fertility(arguments.tokenizer, sources, key_of(arguments), arguments.sample))
    return 0


def _add_data_tokenizer(stages: Any, add_verb: AddVerb) -> None:
    example = "megatrain data tokenizer --input corpus.jsonl --vocab-size 8192 --output tokenizer.json"
    parser = add_verb(stages, "tokenizer", _data_tokenizer, "train a byte-level tokenizer, BPE or Unigram, on text", example)
    _add_input(parser)
    parser.add_argument("--vocab-size", type=positive, required=True, metavar="N", help="entries, special tokens included")
    parser.add_argument("--output", required=True, metavar="TOKENIZER.json", help="the file to write")
    parser.add_argument("--kind", choices=("bpe", "unigram"), default="bpe", help="what to train (default bpe)")
    sample = "train on a sample of at most so much text, always the same one, which is held in memory (default: all)"
    parser.add_argument("--sample", type=size, metavar="SIZE", help=sample)


def _add_data_tokenize(stages: Any, add_verb: AddVerb) -> None:
    example = (
        "megatrain data tokenize --input corpus.jsonl --tokenizer tokenizer.json --output data/train --workers 2 --append-eod"
    )
    parser = add_verb(stages, "tokenize", _data_tokenize, "write text as a token store (PREFIX.bin, PREFIX.idx)", example)
    _add_input(parser)
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="bytes|TOKENIZER",
        help="`bytes`, or a file of `tokenizers`, tiktoken or SentencePiece",
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="of the two files to write")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes; any number writes the same bytes")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    parser.add_argument(
        "--eod",
        type=text,
        metavar="TOKEN",
        help="end every document with this one: a name or an id (--append-eod: that of tokenizer_config.json, special_tokens_map.json "
        "or generation_config.json beside the tokenizer, or one with a known name)",
    )
    parser.add_argument(
        "--bos",
        type=text,
        metavar="TOKEN",
        help="begin every document with this one, or `none` (default: with what the tokenizer puts first, if anything)",
    )

    parser.add_argument(
        "--engine",
        choices=("auto", "gigatoken", "tokenizers"),
        default="auto",
        help="library that encodes; auto: gigatoken where it is installed and gives the same ids, of which a sample is compared",
    )


def _add_data_inspect(stages: Any, add_verb: AddVerb) -> None:
    example = "megatrain data inspect data/train"
    parser = add_verb(stages, "inspect", _data_inspect, "print what is in a token store, or a tokenizer", example)
    parser.add_argument("prefix", metavar="PREFIX|TOKENIZER", help="of a .bin/.idx pair; or a file of a tokenizer")
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--token", type=index, metavar="N", help="say which document, file and row the token at place N comes from"
    )
    one.add_argument(
        "--document", type=index, metavar="N", help="say which file and row document N comes from, and how it begins"
    )


def _add_data_blend(stages: Any, add_verb: AddVerb, add_config: Callable[..., None]) -> None:
    example = "megatrain data blend run.yaml train.steps=2000"
    what = "print how often a run will see each document, and the shares of its corpora on the way; starts nothing"
    add_config(add_verb(stages, "blend", _data_blend, what, example))


def _add_data_fertility(stages: Any, add_verb: AddVerb) -> None:
    example = "megatrain data fertility --tokenizer bpe.json unigram.json --source en en.jsonl --source zh zh.jsonl"
    what = "print tokens a word, bytes a token and the share of the vocabulary that is used, by source"
    parser = add_verb(stages, "fertility", _data_fertility, what, example)
    parser.add_argument("--tokenizer", nargs="+", required=True, metavar="TOKENIZER", help="`bytes`, or files; side by side")
    parser.add_argument("--input", nargs="+", default=[], metavar="FILE", help="texts, each a source of its own")
    parser.add_argument(
        "--source", nargs="+", action="append", default=[], metavar="NAME FILE", help="a source of several files"
    )
    parser.add_argument("--sample", type=size, metavar="SIZE", help="of each source at most so much text (default: all)")
    add_lines(parser)


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=".txt or .jsonl, plain or as .gz or .zst")
    add_lines(parser)
