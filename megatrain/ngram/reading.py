"""`megatrain.ngram.load`: a model from an ARPA file or from a compiled one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatrain.files import doing
from megatrain.ngram.arpa_in import read_arpa
from megatrain.ngram.binary import is_binary, open_binary
from megatrain.ngram.build import model_of
from megatrain.ngram.model import NgramModel
from megatrain.ngram.units import WORDS, spacing


def load(path: str | Path, units: str = WORDS) -> NgramModel:
    """The model of a file: `load(PATH).score(lines)`. Raises ArpaError, BinaryError, TokenizerError or OSError.

    units: the units that the model was fitted with (`units.py`).
    """
    path = Path(path)
    with doing("reading", path):
        model = open_binary(path) if is_binary(path) else model_of(read_arpa(path))
    return replace(model, space=spacing(units))
