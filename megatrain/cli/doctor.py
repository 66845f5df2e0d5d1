"""The arguments of `megatrain doctor`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from megatrain.cli.arguments import positive
from megatrain.cli.imports import imports


def add_doctor(verbs: Any, add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `doctor` to the verbs."""
    example = (
        "megatrain doctor\n"
        "  torchrun --nproc-per-node 8 -m megatrain doctor run.yaml checkpoint.dir=/shared/run\n"
        "  srun --ntasks-per-node 8 megatrain doctor run.yaml --json"
    )
    what = "would a job run here, and how fast is each rank? Alone, or on all ranks through their launcher"
    parser = add_verb(verbs, "doctor", _doctor, what, example)
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="the job; its checkpoint.dir is looked at")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="values that replace those of the file")
    parser.add_argument(
        "--port", type=_port, metavar="N", help="must be free on rank 0's node (default: where the ranks will meet)"
    )
    parser.add_argument("--wait", type=positive, default=60, metavar="SECONDS", help="for ranks that do not come (default 60)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _doctor(arguments: argparse.Namespace) -> int:
    # Before torch is imported: C++ stacks logged by its store would bury the one line that matters.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with imports():
        from megatrain.doctor.examine import main as doctor

    if arguments.config is not None and "=" in arguments.config:
        raise ValueError(f"{arguments.config}: an override needs a CONFIG.yaml before it")
    return doctor(arguments.config, arguments.overrides, arguments.json, arguments.port, arguments.wait)


def _port(text: str) -> int:
    """A number from 1 to 65535."""
    number = positive(text)
    if number >= 1 << 16:
        raise argparse.ArgumentTypeError(f"{number} is no port: they end at 65535")
    return number
