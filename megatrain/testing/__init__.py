"""Public helpers to test own layers under any layout: `simulate` (threads), `spawn` (gloo processes), `agree` (comparison)."""

from megatrain.testing.simulate import simulate

__all__ = ["simulate"]
