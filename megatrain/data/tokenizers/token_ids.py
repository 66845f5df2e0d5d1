"""Token ids of several texts, as tokenizers give them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class EncodedTexts(NamedTuple):
    """Token ids of several texts."""

    ids: npt.NDArray[np.integer]
    """[sum of lengths], back to back."""
    lengths: npt.NDArray[np.int64]
    """[texts]"""
