"""How the threads of one process wait for each other: for a moment busily, then asleep. Imports only the standard library.

PyTorch computes on the CPU with OpenMP, whose threads spin for milliseconds before they sleep when they wait for each other, some
hundred times a step. On cores that others use too, a thread spins while the one that it waits for has no core to run on: steps take
eight times as long. Where they sleep at once, a thread must be woken four thousand times a step, which on idle cores costs a tenth of it.
So they look for some ten microseconds, as long as the others take on idle cores, and sleep then (figures: docs/benchmarks.md). OpenMP
reads its policy when torch is loaded, and never again: so it is set by `import megatrain`, for this process and those that it starts.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping, MutableMapping

POLICY = "OMP_WAIT_POLICY"
CHOICES = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which users choose: of the standard, of GNU's runtime, of LLVM's and Intel's."""
CHOSEN = {POLICY: "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""GNU's runtime takes the number of looks, others the policy: to sleep."""


def wait_asleep(env: MutableMapping[str, str], loaded: Container[str] = sys.modules) -> None:
    """Set the policy, unless the user has chosen one or torch is among the modules that are loaded: then it is too late."""
    if "torch" not in loaded and not has_policy(env):
        env.update(CHOSEN)


def has_policy(env: Mapping[str, str]) -> bool:
    """Whether somebody has chosen how threads wait."""
    return any(env.get(name) for name in CHOICES)
