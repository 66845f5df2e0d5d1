"""Megatron-style training of large language models, written to be read.

    run = megatrain.build("config.yaml")       # or a Config, or a plain tree
    megatrain.train_step(run)                  # one update at a time, or
    megatrain.train(run)                       # the whole loop
    model = megatrain.load("runs/demo")        # a plain module from a checkpoint or a Hugging Face directory

The names are imported when they are first used, so that `import megatrain` is cheap. Import it before torch: it chooses how the threads of
a process wait for each other (`runtime/waiting.py`), which OpenMP reads when torch is loaded.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from megatrain.runtime.waiting import wait_asleep

__version__ = "0.1.0"
__all__ = ["build", "load", "train", "train_step"]

if TYPE_CHECKING:
    from megatrain.inference.plain import load
    from megatrain.program import build, train
    from megatrain.training import train_step

_HOMES = {
    "build": "megatrain.program",
    "load": "megatrain.inference.plain",
    "train": "megatrain.program",
    "train_step": "megatrain.training",
}

wait_asleep(os.environ)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megatrain' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415  (only when a public name is used)

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
