"""Token ids of several texts, as tokenizers give them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class EncodedTexts(NamedTuple):
    """Token ids of several texts."""

    ids: npt.NDArray[np.integer]
    """[sum of lengths] ids of all texts, one text behind the other."""
    lengths: npt.NDArray[np.int64]
    """[texts] number of ids of each text."""
