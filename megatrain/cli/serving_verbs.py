"""The arguments of the verbs that serve a model and look back on it: serve, serve-report."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.cli.arguments import index, positive, text
from megatrain.cli.imports import imports
from megatrain.cli.ngram import WrongUseError
from megatrain.extras import need

AddVerb = Callable[..., argparse.ArgumentParser]
LOCAL = ("127.0.0.1", "::1", "localhost")
KEY = "MEGATRAIN_API_KEY"


def add_serving(verbs: Any, add_verb: AddVerb, checkpoint_help: str) -> None:
    """Add `serve` and `serve-report` to the verbs."""
    _add_serve(verbs, add_verb, checkpoint_help)
    what = "compare what was asked and answered with an evaluation set: a table, and a picture"
    parser = add_verb(
        verbs, "serve-report", _report, what, "megatrain serve-report traffic.jsonl --against tasks/questions.jsonl"
    )
    parser.add_argument(
        "log", metavar="LOG", type=Path, help="the file of `megatrain serve --log`; its older parts LOG.1 ... are read too"
    )
    parser.add_argument(
        "--against",
        required=True,
        type=Path,
        metavar="FILE",
        help="items of an evaluation (.jsonl), what `megatrain eval --output` wrote (.json), or another log",
    )
    parser.add_argument(
        "--feedback", type=Path, metavar="FILE", help="thumbs (default: feedback.jsonl beside the log, if it is there)"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="the picture (default: beside the log)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")


def _add_serve(verbs: Any, add_verb: AddVerb, checkpoint_help: str) -> None:
    example = "megatrain serve runs/demo/checkpoints --port 8000     # then open http://127.0.0.1:8000"
    parser = add_verb(verbs, "serve", _serve, "serve a model over HTTP: OpenAI's API and a page to chat", example)
    parser.add_argument("checkpoint", metavar="CKPT|HF_DIR", help=f"{checkpoint_help}, or a Hugging Face directory")
    parser.add_argument(
        "overrides", metavar="parallel.key=value", nargs="*", help="the layout, under torchrun (default: one process)"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's file or `bytes` (default: the model's)")
    parser.add_argument("--eod", type=text, metavar="TOKEN", help="ends a text; a name, an id or `none` (default: the model's)")
    parser.add_argument("--bos", type=text, metavar="TOKEN", help="goes before a prompt; likewise (default: the model's)")
    parser.add_argument("--chat-template", metavar="NAME|FILE", help="chat template (default: the model's own)")
    parser.add_argument(
        "--name", type=text, help="by which clients ask for the model (default: the name of the run or the directory)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations (default float32)"
    )
    _add_limits(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    who = parser.add_argument_group("who may ask")
    who.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default 127.0.0.1; others need --api-key)",
    )
    who.add_argument("--port", type=_port, default=8000, metavar="N", help="0: any that is free (default 8000)")
    who.add_argument(
        "--api-key",
        type=text,
        metavar="KEY",
        help=f"asked of all but /health (default: ${KEY}, which `ps` does not show)",
    )
    who.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which it is reached, as a proxy's; may be repeated",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--most-running", type=positive, default=256, metavar="N", help="texts written at a time (default 256)")
    limits.add_argument(
        "--queue", type=index, default=256, metavar="N", help="texts that may wait; beyond, status 429 (default 256)"
    )
    limits.add_argument(
        "--cache-tokens", type=positive, metavar="N", help="tokens whose keys and values are kept (default: by memory)"
    )
    limits.add_argument(
        "--step-tokens", type=positive, metavar="N", help="tokens that a step reads (default 512 on a CPU, 8192 on a GPU)"
    )
    limits.add_argument("--no-prefix-cache", action="store_true", help="compute prefixes that were seen before anew")
    limits.add_argument("--body-bytes", type=positive, default=8 << 20, metavar="N", help="of a request (default 8388608)")
    limits.add_argument(
        "--request-seconds", type=positive, default=600, metavar="S", help="that a request may take (default 600)"
    )
    limits.add_argument("--connections", type=positive, default=1024, metavar="N", help="at a time (default 1024)")
    limits.add_argument(
        "--grace", type=index, default=20, metavar="S", help="seconds to finish open answers after a signal (default 20)"
    )
    records = parser.add_argument_group("records")
    records.add_argument(
        "--log", type=Path, metavar="FILE", help="write requests and answers there, personal data masked (default: none)"
    )
    records.add_argument(
        "--log-bytes", type=positive, default=64 << 20, metavar="N", help="at which a log is put aside (default 67108864)"
    )
    records.add_argument("--log-files", type=index, default=9, metavar="N", help="older logs that are kept (default 9)")
    records.add_argument(
        "--feedback",
        default="feedback.jsonl",
        metavar="FILE",
        help="thumbs; `none`: no thumbs (default feedback.jsonl)",
    )


def _port(given: str) -> int:
    number = index(given)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{given} is no port: use 0 to 65535")
    return number


def _serve(arguments: argparse.Namespace) -> int:
    key = arguments.api_key or os.environ.get(KEY) or None
    if arguments.host not in LOCAL and key is None:
        raise WrongUseError(
            f"--host {arguments.host} lets other machines in, and whoever reaches it could use the model. Give --api-key KEY (or ${KEY}), "
            "or leave --host out."
        )
    for package in ("starlette", "uvicorn", "orjson", "prometheus_client"):
        need(package, "megatrain serve", "serve")
    with imports():
        import torch

        from megatrain.inference.engine import EngineSettings
        from megatrain.inference.opening import TokenizerWish
        from megatrain.serving.serving_limits import ServingLimits, names_of_machine
        from megatrain.verbs.serve import ServeOptions
        from megatrain.verbs.serve import main as serve

    hosts = frozenset(name.lower() for name in arguments.allow_host)
    if arguments.host not in LOCAL:
        hosts |= names_of_machine()
    limits = ServingLimits(
        key=key,
        hosts=hosts,
        body_bytes=arguments.body_bytes,
        most_running=arguments.most_running,
        queue=arguments.queue,
        request_seconds=float(arguments.request_seconds),
        connections=arguments.connections,
    )
    settings = EngineSettings(
        step_tokens=arguments.step_tokens,
        most_running=arguments.most_running,
        cache_tokens=arguments.cache_tokens,
        prefix_cache=not arguments.no_prefix_cache,
    )
    return serve(
        ServeOptions(
            checkpoint=arguments.checkpoint,
            overrides=arguments.overrides,
            host=arguments.host,
            port=arguments.port,
            name=arguments.name,
            template=arguments.chat_template,
            tokenizer=TokenizerWish(arguments.tokenizer, arguments.eod, arguments.bos),
            dtype=getattr(torch, arguments.dtype),
            settings=settings,
            limits=limits,
            grace=float(arguments.grace),
            log=arguments.log,
            log_bytes=arguments.log_bytes,
            log_files=arguments.log_files,
            feedback=None if arguments.feedback == "none" else Path(arguments.feedback),
        )
    )


def _report(arguments: argparse.Namespace) -> int:
    with imports():
        from megatrain.verbs.serve_report import main as report

    return report(arguments.log, arguments.against, arguments.feedback, arguments.png, arguments.json)
