"""The arguments of the verbs on directories of weights: import, export, checkpoint inspect / verify / convert."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.cli.arguments import finite
from megatrain.cli.imports import imports
from megatrain.cli.ngram import WrongUseError

AddVerb = Callable[..., argparse.ArgumentParser]


def add_exchange(verbs: Any, add_verb: AddVerb, parser_class: Any, checkpoint_help: str) -> None:
    """Add `import`, `export` and `checkpoint` to the verbs."""
    what = "make a checkpoint of a Hugging Face directory (training may start from that as it is: model.init_from)"
    parser = add_verb(verbs, "import", _import, what, "megatrain import ~/models/qwen3-0.6b runs/qwen3")
    parser.add_argument("source", metavar="HF_DIR", type=Path, help="it holds config.json and safetensors files")
    parser.add_argument("out", metavar="OUT", type=Path, help="run directory; the checkpoint is OUT/checkpoints/step_00000000")
    what = "make a Hugging Face directory of a checkpoint"
    parser = add_verb(verbs, "export", _export, what, "megatrain export runs/demo/checkpoints ~/models/demo --dtype bfloat16")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help=checkpoint_help)
    parser.add_argument("out", metavar="HF_DIR", type=Path, nargs="?", help="a directory that is empty or not there yet")
    parser.add_argument("--like", metavar="DIR", type=Path, help="take config.json and tokenizer files from there")
    _add_dtype(parser)
    check = parser.add_argument_group("another server (vLLM, SGLang ...) that has the exported model; nothing is written")
    check.add_argument(
        "--serve-check", metavar="URL", help="send it 20 prompts, and compare tokens and log-probabilities with our own"
    )
    check.add_argument("--serve-model", metavar="NAME", help="the model's name there (default: the first that it lists)")
    check.add_argument("--serve-key", metavar="KEY", help="its API key (default: $MEGATRAIN_API_KEY)")
    check.add_argument(
        "--serve-tolerance",
        type=finite,
        default=0.2,
        metavar="NATS",
        help="made by rounding (default 0.2; float32: 0.001)",
    )
    what = "what is in a checkpoint, is it whole"
    checkpoint = verbs.add_parser("checkpoint", help=what, description=what, example="megatrain checkpoint verify runs/demo")
    stages = checkpoint.add_subparsers(metavar="WHAT", required=True, parser_class=parser_class)
    inspect = add_verb(stages, "inspect", _checkpoint_inspect, "print what is in it", "megatrain checkpoint inspect runs/demo")
    inspect.add_argument("--json", action="store_true", help="as one JSON object")
    verify = add_verb(stages, "verify", _checkpoint_verify, "check every byte", "megatrain checkpoint verify runs/demo")
    what, example = (
        "write it again, one file a kind",
        "megatrain checkpoint convert runs/demo out --weights-only --dtype bfloat16",
    )
    convert = add_verb(stages, "convert", _checkpoint_convert, what, example)
    for stage in (inspect, verify, convert):
        stage.add_argument("checkpoint", metavar="CKPT", type=Path, help=checkpoint_help)
    convert.add_argument("out", metavar="OUT", type=Path, help="directory of checkpoints to write it in")
    convert.add_argument("--weights-only", action="store_true", help="leave the optimizer's states out")
    _add_dtype(convert)


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    names = ("float32", "bfloat16", "float16", "float64")
    parser.add_argument("--dtype", choices=names, help="of the weights (default: as they are stored)")


def _import(arguments: argparse.Namespace) -> int:
    with imports():
        from megatrain.verbs.exchange import import_hf

    return import_hf(arguments.source, arguments.out)


def _export(arguments: argparse.Namespace) -> int:
    if (arguments.serve_check is None) == (arguments.out is None):
        raise WrongUseError("give HF_DIR to write it, or --serve-check URL to compare a server that has it: one of them.")
    if arguments.serve_check is not None:
        return _serve_check(arguments)
    with imports():
        from megatrain.verbs.exchange import export_hf

    return export_hf(arguments.checkpoint, arguments.out, arguments.like, arguments.dtype)


def _serve_check(arguments: argparse.Namespace) -> int:
    with imports():
        from megatrain.serving.hand_over import OtherServer
        from megatrain.verbs.serve_check import CheckOptions
        from megatrain.verbs.serve_check import main as check

    key = arguments.serve_key or os.environ.get("MEGATRAIN_API_KEY")
    server = OtherServer(arguments.serve_check, key, arguments.serve_model)
    return check(CheckOptions(arguments.checkpoint, server, arguments.serve_tolerance))


def _checkpoint_inspect(arguments: argparse.Namespace) -> int:
    with imports():
        from megatrain.verbs.exchange import inspect

    return inspect(arguments.checkpoint, arguments.json)


def _checkpoint_verify(arguments: argparse.Namespace) -> int:
    with imports():
        from megatrain.verbs.exchange import verify_all

    return verify_all(arguments.checkpoint)


def _checkpoint_convert(arguments: argparse.Namespace) -> int:
    with imports():
        from megatrain.verbs.exchange import convert

    return convert(arguments.checkpoint, arguments.out, arguments.weights_only, arguments.dtype)
