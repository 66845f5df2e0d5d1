"""Versions of the packages that a process computes with, and a hash of each source file of megatrain.

Ranks with other ones train without any error, on gradients that are a mixture; so all compare these before they begin, and a
checkpoint keeps them, so that a run that goes on with others says so.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import xxhash

from megatrain import kernels

ROOTS = {"megatrain": Path(__file__).parents[1], "megatrain/kernels": Path(kernels.__file__).parent}
"""Folders of source files, and what they are called here."""
OPTIONAL = ("triton", "numba")
"""Packages whose compilers make kernels, where they are installed."""


def versions() -> dict[str, str]:
    """Package -> version."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "megatrain": str(vars(sys.modules["megatrain"])["__version__"]),  # an import of it would lead to every room
    }
    for name in OPTIONAL:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def sources() -> dict[str, str]:
    """Source file of megatrain, its kernels included -> hash of its content. Raises OSError. Some 300 files take 10 ms."""
    paths = {f"{name}/{path.relative_to(root).as_posix()}": path for name, root in ROOTS.items() for path in root.rglob("*.py")}
    return {name: xxhash.xxh3_64_hexdigest(path.read_bytes()) for name, path in sorted(paths.items())}


def program(files: dict[str, str]) -> dict[str, str]:
    """The versions, and under `code` one hash of all source files: a checkpoint keeps them."""
    return {**versions(), "code": xxhash.xxh3_64_hexdigest(repr(sorted(files.items())).encode())}


def described(files: dict[str, str]) -> str:
    """Versions and source files, a line each: what ranks compare."""
    return "\n".join(f"{name} {value}" for name, value in (versions() | files).items())
