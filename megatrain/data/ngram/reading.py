"""`megatrain.data.ngram.load`: a model from an ARPA file or from a compiled one."""

from __future__ import annotations

from pathlib import Path

from megatrain.data.ngram.arpa_in import read_arpa
from megatrain.data.ngram.binary import is_binary, map_binary
from megatrain.data.ngram.build import model_of
from megatrain.data.ngram.model import Model


def load(path: str | Path) -> Model:
    """The model of a file: `load(PATH).score(lines)`. Raises ArpaError, BinaryError or OSError."""
    path = Path(path)
    return map_binary(path) if is_binary(path) else model_of(read_arpa(path))
