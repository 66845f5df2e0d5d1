"""Imports of optional packages, each with the command that installs it."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any


class MissingPackageError(ImportError):
    """A package that is not installed; it says what the package is for and how to install it."""


def need(package: str, use: str, extra: str) -> ModuleType:
    """A package of an extra. Raises MissingPackageError."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingPackageError(f"{use} needs {package.partition('.')[0]}: pip install 'megatrain[{extra}]'") from None


@functools.cache
def numba() -> Any:
    """The compiler of loops over text."""
    return need("numba", "the corpus pipeline", "data")
