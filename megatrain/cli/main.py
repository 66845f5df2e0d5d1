"""`megatrain VERB ...`: a small function for each verb, which imports its modules only when it runs.

Exit codes: 0 done; 1 a failure, with one clear message on stderr (or, for a fault of megatrain itself, a traceback); 2 wrong use; 75
stopped early with a checkpoint saved: a scheduler should start the run again; 76 training went wrong, and a person should look before it is
started again (`exit_code` of the error); 130 interrupted from the keyboard.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import megatrain
from megatrain.cli.arguments import positive
from megatrain.cli.data import add_data
from megatrain.cli.doctor import add_doctor
from megatrain.cli.evaluating import add_eval
from megatrain.cli.generation import add_generate
from megatrain.cli.imports import imports
from megatrain.cli.ngram import add_ngram
from megatrain.cli.serving_verbs import add_serving
from megatrain.cli.train import add_train
from megatrain.cli.weights import add_exchange
from megatrain.files import lost_output, one_line, shown

_CHECKPOINT = "a checkpoint, or the directory of a run's checkpoints (the newest)"
DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130

LATER = {
    "find-lr": "a learning rate to start from",
    "quantize": "INT8 and INT4 weights",
    "prune": "sparse weights",
}
"""Verbs of a later release, refused until then, with what they do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. An unexpected error is raised, for its traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # as stderr does: a character that the terminal cannot show is escaped
    if later := _later_verb(words):
        message = f"error: `megatrain {later}` ({LATER[later]}) is not in this release. `megatrain --help` lists what is."
        return _complain(message, WRONG_USE)
    try:
        arguments = _parse(words)
    except SystemExit as stop:  # argparse has printed the help, the version or what is wrong
        return stop.code if isinstance(stop.code, int) else WRONG_USE
    if argv is None:
        faulthandler.enable()  # SIGBUS (a mapped file was cut, a disk fails) and SIGSEGV are told with all stacks
    if argv is None and words[:1] in (["train"], ["bench"]):
        _begin_program(words[0])
    arguments.ends_process, arguments.main = argv is None, main  # verbs that start others of their kind
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except ModuleNotFoundError as error:
        package = (error.name or "megatrain").partition(".")[0]
        if arguments.traceback or package == "megatrain":
            raise
        return _complain(f"error: {package}, which this needs, is not installed: pip install {package}", FAILED)
    except Exception as error:
        if arguments.traceback or not _expected(error):
            raise
        said = lost_output(error) or str(error)
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, TimeoutError):  # that has stacks
            said = one_line(said)
        return _complain(f"error: {said}", getattr(error, "exit_code", FAILED))


def _parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a verb; overrides may stand between and after options. Raises SystemExit on wrong use."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if rest and (overrides != rest or not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += overrides
    return arguments


def _begin_program(verb: str) -> None:
    """Actions of a whole process before torch is imported and memory is taken: hold signals, choose the allocator."""
    from megatrain.lifecycle.stop import hold_signals
    from megatrain.runtime.allocator import restart_with_better_allocator

    if verb == "train":
        hold_signals()
    restart_with_better_allocator()


def _expected(error: Exception) -> bool:
    """Whether an error is meant for the user and needs no traceback.

    These are the error classes of megatrain's modules (ConfigError, TransportError ...), errors of the operating system, and a ValueError
    that megatrain's own code raised. A ValueError from within a library is a fault of megatrain.
    """
    if isinstance(error, OSError) or _of_megatrain(type(error).__module__):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    return isinstance(error, ValueError) and bool(frames) and _of_megatrain(frames[-1][0].f_globals.get("__name__", ""))


def _of_megatrain(module: str) -> bool:
    return module.partition(".")[0] == "megatrain"


def _complain(message: str, code: int) -> int:
    _say(f"megatrain: {message}")
    return code


def _say(text: str) -> None:
    """Print on stderr; under the launch scripts leave it to them, which print it once for all ranks."""
    from megatrain.lifecycle.stop import leave_error
    from megatrain.stderr import note

    text = shown(text)
    if not leave_error(text, os.environ):
        note(text)


def _later_verb(words: list[str]) -> str | None:
    """The verb of LATER that a command line begins with; None if it begins with another."""
    return next((verb for verb in LATER if words[: verb.count(" ") + 1] == verb.split()), None)


# --- verbs --------------------------------------------------------------------------------------------------------------------


def _plan(arguments: argparse.Namespace) -> int:
    with imports():
        from megatrain.verbs.plan import main as plan

    png = None if arguments.timeline is None else Path(arguments.timeline)
    return plan(arguments.config, arguments.overrides, arguments.devices, png)


def _verify(arguments: argparse.Namespace) -> int:
    with imports():
        from megatrain.verbs.verify import VerifyOptions
        from megatrain.verbs.verify import main as verify

    report = None if arguments.json is None else Path(arguments.json)
    switches = arguments.processes, arguments.shrink, arguments.resume
    options = VerifyOptions(arguments.layouts, arguments.steps, arguments.precision, *switches, report)
    return verify(arguments.config, arguments.overrides, options)


def _bench(arguments: argparse.Namespace) -> int:
    with imports():
        from megatrain.verbs.bench import main as bench

    return bench(arguments.config, arguments.overrides, arguments.steps, arguments.warmup, arguments.profile)


# --- arguments ----------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser without abbreviated options, with examples in its help, whose errors begin with `megatrain: error:`."""

    def __init__(self, *, example: str, notes: str = "", **settings: Any) -> None:
        epilog = f"{notes}example:\n  {example}"
        super().__init__(epilog=epilog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Print the error and the usage of the verb; exit 2."""
        _say(f"{self.format_usage()}megatrain: error: {message}")
        self.exit(WRONG_USE)


_Verbs = Any
"""Type of the result of `add_subparsers`, for which argparse has no public name."""


def _parser() -> _Parser:
    """The parser of the whole command line."""
    later = "\n".join(f"  {verb:14} {what}" for verb, what in LATER.items())
    parser = _Parser(
        prog="megatrain",
        description=megatrain.__doc__,
        notes=f"not in this release (refused until they are):\n{later}\n\n",
        example="megatrain train launch/configs/gpt_tiny.yaml data.train=PREFIX",
    )
    parser.add_argument("--version", action="version", version=f"megatrain {megatrain.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)
    add_train(verbs, _add_verb, _add_config)
    add_generate(verbs, _add_verb, _CHECKPOINT, lambda said: _complain(f"error: {said}", WRONG_USE))
    _add_plan(verbs)
    _add_verify(verbs)
    _add_bench(verbs)
    add_eval(verbs, _add_verb, _CHECKPOINT, lambda said: _complain(f"error: {said}", WRONG_USE))
    add_serving(verbs, _add_verb, _CHECKPOINT)
    add_exchange(verbs, _add_verb, _Parser, _CHECKPOINT)
    add_ngram(verbs, _add_verb, _Parser)
    add_doctor(verbs, _add_verb)
    add_data(verbs, _add_verb, _add_config, _Parser)
    return parser


def _add_verb(
    verbs: _Verbs, name: str, run: Callable[[argparse.Namespace], int], what: str, example: str
) -> argparse.ArgumentParser:
    """Add a verb; returns its parser, whose namespace carries `run`."""
    parser = verbs.add_parser(name, help=what, description=what, example=example)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from, not only what it says")
    parser.set_defaults(run=run)
    return parser


def _add_config(parser: argparse.ArgumentParser, what: str = "the run; every key is in docs/config.md") -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help=what)
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="values that replace those of the file")


def _add_plan(verbs: _Verbs) -> None:
    example = "megatrain plan launch/configs/gpt_pipeline.yaml --timeline timeline.png parallel.schedule=zb_h1"
    what = "what a step of a run will look like: its pipeline's timeline and idle shares; starts nothing"
    parser = _add_verb(verbs, "plan", _plan, what, example)
    _add_config(parser)
    parser.add_argument("--devices", type=positive, metavar="N", help="how many there are (default: those of one replica)")
    parser.add_argument("--timeline", metavar="PNG", help="draw the timeline there")


def _add_verify(verbs: _Verbs) -> None:
    example = (
        "megatrain verify launch/configs/gpt_tiny.yaml --layouts all --shrink\n"
        "  megatrain verify run.yaml --layouts tp2-sp,pp2-zb_h1-dp2-zero3 --steps 5 --json report.json"
    )
    what = "train a few steps under many layouts and compare every number with those of one process"
    parser = _add_verb(verbs, "verify", _verify, what, example)
    _add_config(parser, "the run; tokens are random, only the vocabulary's size is read")
    parser.add_argument(
        "--layouts", default="all", metavar="all|LIST", help="every legal one on 1, 2, 4 and 8 ranks, or names joined by commas"
    )
    parser.add_argument("--steps", type=positive, default=5, metavar="K", help="steps of each layout (default 5)")
    parser.add_argument(
        "--precision", choices=("fp64", "fp32", "bf16"), default="fp64", help="fp64 finds faults, the others show their noise"
    )
    parser.add_argument("--processes", action="store_true", help="run every layout on gloo processes, not on simulated ranks")
    parser.add_argument("--shrink", action="store_true", help="verify a small model of the same structure")
    parser.add_argument(
        "--resume", action="store_true", help="save and resume every run half-way, also from and to one process"
    )
    parser.add_argument("--json", metavar="OUT", help="write every row there")


def _add_bench(verbs: _Verbs) -> None:
    example = (
        "megatrain bench launch/configs/gpt_30m.yaml\n"
        "  torchrun --nproc-per-node 2 -m megatrain bench run.yaml parallel.tensor_parallel_size=2 --profile trace.json"
    )
    what = "train on random tokens and print tokens per second, MFU, memory and phases as one line of JSON"
    parser = _add_verb(verbs, "bench", _bench, what, example)
    _add_config(parser, "the run; no data is needed, but model.vocab_size or a tokenizer")
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="steps to time (default 10)")
    parser.add_argument("--warmup", type=positive, default=3, metavar="N", help="steps before (default 3)")
    parser.add_argument("--profile", metavar="JSON", help="write a Chrome trace of two more steps there")
