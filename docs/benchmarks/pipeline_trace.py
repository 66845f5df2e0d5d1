"""The executor against the simulator: every schedule on 4 gloo processes whose layers sleep, drawn below its simulation.

    python docs/benchmarks/pipeline_trace.py --output docs/pipeline_trace.png

Prints the makespan of each schedule, in units of one forward, as measured and as simulated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatrain.parallel.schedules import Schedule
from megatrain.parallel.simulator import simulate
from megatrain.plan.picture import draw_timeline
from megatrain.testing.measured_timeline import measured_timeline

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb_h1", 1), ("zb_v", 2)]


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--unit", type=float, default=0.05, help="seconds of a forward")
    parser.add_argument("--output", type=Path, help="PNG")
    args = parser.parse_args()
    rows = []
    for name, chunks in SCHEDULES:
        schedule = Schedule(name, args.stages, chunks, args.micro_batches)
        paper, real = simulate(schedule), measured_timeline(schedule, args.unit)
        rows += [(f"{name}: simulated, {paper.makespan:.0f} units", paper), (f"measured, {real.makespan:.1f} units", real)]
        ratio = round(real.makespan / paper.makespan, 3)
        print(json.dumps({"schedule": name, "simulated": paper.makespan, "measured": round(real.makespan, 2), "ratio": ratio}))
    if args.output is not None:
        draw_timeline(rows, args.output)


if __name__ == "__main__":
    main()
