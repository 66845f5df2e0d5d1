"""Public helpers to test your own layers under any layout: `simulate` (threads), `spawn` (gloo processes), `agree` (comparison).

`docs/testing.md` shows how; `megatrain.testing.trace` trains a few steps and records the `Trace` that `agree` compares.
"""

from megatrain.testing.agree import Disagreement, Trace, agree, agree_in_bf16
from megatrain.testing.failure import RankFailed, RankTraceback
from megatrain.testing.simulate import simulate
from megatrain.testing.spawn import spawn

__all__ = ["Disagreement", "RankFailed", "RankTraceback", "Trace", "agree", "agree_in_bf16", "simulate", "spawn"]
