"""How OpenMP's threads wait for each other: they spin for some microseconds, then sleep. Imports only the standard library.

PyTorch computes on the CPU with OpenMP. When its threads wait for each other, some hundred times a step, they spin for milliseconds
before they sleep. On cores that others use too, a thread spins while the thread that it waits for has no core to run on: steps take
eight times as long. If they slept at once, a thread would have to be woken four thousand times a step, which on idle cores costs a
tenth of it. So they spin for some ten microseconds, as long as the others take on idle cores, and then sleep (figures:
docs/benchmarks.md). OpenMP reads its policy once, when torch is loaded, so `import megatrain` sets it, for this process and those that
it starts.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping, MutableMapping

POLICY = "OMP_WAIT_POLICY"
CHOICES = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which users choose: OpenMP's own, GNU's, LLVM's and Intel's."""
CHOSEN = {POLICY: "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""Values set where the user has chosen none: GNU's OpenMP reads how often to spin before it sleeps, the others the policy."""


def wait_asleep(env: MutableMapping[str, str], loaded: Container[str] = sys.modules) -> None:
    """Set the policy, unless the user has chosen one or torch is already loaded, when it would be too late."""
    if "torch" not in loaded and not has_policy(env):
        env.update(CHOSEN)


def has_policy(env: Mapping[str, str]) -> bool:
    """Whether the user has chosen how threads wait."""
    return any(env.get(name) for name in CHOICES)
