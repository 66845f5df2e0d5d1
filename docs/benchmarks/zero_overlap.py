"""What overlap hides: steps of two gloo processes with parallel.overlap on and off, on this machine's speed and on a slow network.

    python docs/benchmarks/zero_overlap.py

For each ZeRO stage and delay (of every call on the data axis): the step, the time in which a rank did nothing but start or wait for a
reduction or a gather, and when the first reduction began as a share of the last backward. Interleaved rounds, medians; one JSON line each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace

from megatrain.config.schema import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megatrain.testing import spawn
from megatrain.testing.overlap import measured_overlap

CONFIG = Config(
    model=ModelConfig(num_layers=8, hidden_size=256, num_attention_heads=4, seq_length=256, vocab_size=4096),
    parallel=ParallelConfig(bucket_size=800_000),
    optim=OptimConfig(),
    train=TrainConfig(steps=100, global_batch_size=16, micro_batch_size=4, precision="fp32"),
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of a round")
    parser.add_argument("--hidden", type=int, default=256, help="the model's width")
    args = parser.parse_args()
    model = replace(CONFIG.model, hidden_size=args.hidden)
    for delay in (0.0, 0.02):
        for stage in (0, 1, 2, 3):
            seen = {True: [], False: []}
            for _ in range(args.rounds):
                for overlap, rounds in seen.items():
                    config = replace(CONFIG, model=model, parallel=replace(CONFIG.parallel, zero_stage=stage, overlap=overlap))
                    rounds.append(spawn(2, measured_overlap, config, args.steps, delay)[0])
            row = {"zero_stage": stage, "delay_ms": 1000 * delay}
            for overlap, rounds in seen.items():
                name = "overlap" if overlap else "one after the other"
                row[name] = {
                    "step_ms": round(1000 * statistics.median(r.step_seconds for r in rounds), 1),
                    "exposed_ms": round(1000 * statistics.median(r.exposed_seconds for r in rounds), 1),
                    "first_reduction": round(statistics.median(r.first_reduction for r in rounds), 2),
                }
            row["ratio"] = round(row["one after the other"]["step_ms"] / row["overlap"]["step_ms"], 3)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
