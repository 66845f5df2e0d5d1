"""Public helpers to test own layers under any layout: `simulate` (threads), `spawn` (gloo processes), `agree` (comparison)."""

from megatrain.testing.failure import RankFailed, RankTraceback
from megatrain.testing.simulate import simulate
from megatrain.testing.spawn import spawn

__all__ = ["RankFailed", "RankTraceback", "simulate", "spawn"]
