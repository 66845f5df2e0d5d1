"""Imports of optional packages, each with the command that installs it."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any


def need(package: str, use: str, extra: str) -> ModuleType:
    """A package of an extra. Raises ImportError that says what it is for and how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(f"{use} needs {package.partition('.')[0]}: pip install 'megatrain[{extra}]'") from None


@functools.cache
def numba() -> Any:
    """The compiler of loops over text."""
    return need("numba", "the corpus pipeline", "data")
