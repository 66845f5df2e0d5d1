"""What it costs when threads that wait for each other spin, as OpenMP's do unless told otherwise, or sleep: on idle and on shared cores.

    python docs/benchmarks/waiting.py CONFIG [--neighbours N]

`megatrain bench` of a config in interleaved pairs, one process with a thread a core, beside N processes that keep a core busy each. One
JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

POLICIES = {"spin": {"GOMP_SPINCOUNT": "300000"}, "sleep": {"OMP_WAIT_POLICY": "PASSIVE"}}
"""GNU's OpenMP spins that often where nothing is set."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--neighbours", type=int, default=0, metavar="N")
    parser.add_argument("--pairs", type=int, default=5, metavar="N")
    parser.add_argument("--steps", type=int, default=5, metavar="N")
    options = parser.parse_intermixed_args()
    load = os.getloadavg()[0]
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.neighbours)]
    try:
        seen = [{name: tokens_per_second(options, policy) for name, policy in POLICIES.items()} for _ in range(options.pairs)]
    finally:
        for neighbour in neighbours:
            neighbour.kill()
    ratios = [pair["sleep"] / pair["spin"] for pair in seen]
    row = {name: round(statistics.median(pair[name] for pair in seen)) for name in POLICIES}
    row |= {"ratio": round(statistics.median(ratios), 2), "from": round(min(ratios), 2), "to": round(max(ratios), 2)}
    print(json.dumps({**row, "neighbours": options.neighbours, "load_before": round(load, 1), "cores": os.cpu_count()}))


def tokens_per_second(options: argparse.Namespace, policy: dict[str, str]) -> float:
    """What one run of `megatrain bench` prints."""
    chosen = ("OMP_", "GOMP_", "KMP_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(chosen)}
    words = ["bench", options.config, *options.overrides, "--steps", str(options.steps), "--warmup", "2"]
    done = subprocess.run([sys.executable, "-m", "megatrain", *words], env={**env, **policy}, stdout=-1, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["tokens_per_second"])


if __name__ == "__main__":
    main()
