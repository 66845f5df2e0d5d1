"""A column of numbers in a file: appended to, and read again a slice at a time, so that memory holds what is worked on and no more.

Files are read, not mapped: mapped pages count as memory of the process, and this room promises how much it takes.
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
        """Put values behind the others."""
        with doing("writing", self.path), self.path.open("ab") as file:
            file.write(np.ascontiguousarray(values, self.dtype).data)

    def read(self, first: int = 0, end: int | None = None) -> Array:
        """Values first .. end - 1."""
        end = len(self) if end is None else end
        if end <= first:
            return np.zeros(0, self.dtype)
        return np.fromfile(self.path, self.dtype, end - first, offset=first * self.dtype.itemsize)

    def change(self, first: int, end: int, where: npt.NDArray[np.bool_], values: Array) -> None:
        """Set those of the values first .. end - 1 for which `where` holds; what is not there yet is 0."""
        missing = end - len(self)
        if missing > 0:
            self.append(np.zeros(missing, self.dtype))
        held = self.read(first, end)
        held[where] = values
        with doing("writing", self.path), self.path.open("r+b") as file:
            file.seek(first * self.dtype.itemsize)
            file.write(held.data)
