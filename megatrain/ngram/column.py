"""A column of numbers in a file: written by appending, read in slices, so that only the slice at work is in memory.

Files are read, not mapped: mapped pages count as memory of the process, and `ngram` promises a limit on its memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.files import doing

Array = npt.NDArray[Any]


class Column:
    """Numbers of one dtype in a file of their own."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path, self.dtype = Path(path), np.dtype(dtype)

    def __len__(self) -> int:
        return self.path.stat().st_size // self.dtype.itemsize if self.path.exists() else 0

    def append(self, values: Array) -> None:
        """Append values."""
        with doing("writing", self.path), self.path.open("ab") as file:
            file.write(np.ascontiguousarray(values, self.dtype).data)

    def read(self, first: int = 0, end: int | None = None) -> Array:
        """Values first .. end - 1."""
        end = len(self) if end is None else end
        if end <= first:
            return np.zeros(0, self.dtype)
        return np.fromfile(self.path, self.dtype, end - first, offset=first * self.dtype.itemsize)

    def change(self, first: int, end: int, where: npt.NDArray[np.bool_], values: Array) -> None:
        """Set those of the values first .. end - 1 for which `where` is true; values beyond the file's end start as 0."""
        missing = end - len(self)
        if missing > 0:
            self.append(np.zeros(missing, self.dtype))
        held = self.read(first, end)
        held[where] = values
        with doing("writing", self.path), self.path.open("r+b") as file:
            file.seek(first * self.dtype.itemsize)
            file.write(held.data)
