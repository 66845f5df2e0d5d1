"""Everything one GPU is asked in ten minutes, one item after the other, each with its own limit; `launch/gpu_checks.sh` starts it.

    bash launch/gpu_checks.sh FOLDER              # 9 minutes at most, on a GPU
    bash launch/gpu_checks.sh --smoke FOLDER      # every item with tiny shapes on a CPU: only that it runs

FOLDER/report.json and FOLDER/report.md are rewritten after every part, so a cut run loses one. An item may use what those before it have
left of their time. Its parts run in processes of their own, and what they say is kept: none that fails, hangs or crashes ends the
others. MFU is of 989.4 TFLOP/s and counts causal attention at half, for both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decode_bench
import gpu_kernels
import gpu_models
import gpu_ranks
import gpu_report
import gpu_speeds
import gpu_tests
import psutil
import torch
import torch._dynamo  # which each process that compiles would import anew
from gpu_models import Shape
from isolated import Isolated, Note, Outcome, isolated

ROOT = Path(__file__).parents[2]
LEAST = 6.0
"""Seconds without which a part is not begun."""
LIMITS = {
    "1 speeds": 30,
    "2 tests": 100,
    "3 one step": 35,
    "4 124m": 85,
    "5 8b shape": 105,
    "6 1.3b": 85,
    "7 ranks": 40,
    "8 kernels": 30,
    "9 decoding": 70,
}
"""Seconds of each item, in their order; SECONDS in all."""
SECONDS = sum(LIMITS.values())
H100 = 84_900_000_000
"""Bytes of memory, where the first item did not tell."""


class Checks:
    """A run: what there is, and the report so far."""

    def __init__(self, folder: Path, smoke: bool, limits: dict[str, float]) -> None:
        self.folder, self.smoke, self.limits = folder, smoke, limits
        self.began = time.monotonic() - (time.time() - psutil.Process().create_time())
        self.report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "seconds": 0.0, "items": {}, "models": {}}
        self.item, self.ends = "", 0.0

    def memory(self) -> int:
        """Bytes of the device, which this process must not ask itself: its children could not use CUDA then."""
        parts = self.report["items"].get("1 speeds", {}).get("parts", {})
        return ((parts.get("speeds") or {}).get("result") or {}).get("versions", {}).get("memory", H100)

    def write(self) -> None:
        """Both files, whole or not at all."""
        self.report["seconds"] = time.monotonic() - self.began
        for name, text in (("report.json", json.dumps(self.report, indent=1)), ("report.md", gpu_report.markdown(self.report))):
            partial = self.folder / f"{name}.part"
            partial.write_text(text)
            partial.replace(self.folder / name)

    def run(self, name: str, item: Callable[[Checks], None]) -> None:
        """One item, which ends when its time and all that was left before it is used up."""
        began = time.monotonic()
        self.item = name
        self.ends = self.began + sum(limit for key, limit in self.limits.items() if key <= name)
        row = self.report["items"][name] = {"state": "cut", "seconds": 0.0, "parts": {}}
        try:
            item(self)
            row["state"] = "failed" if any(part["problem"] for part in row["parts"].values()) else "done"
        except Exception as error:
            row["state"] = f"failed: {type(error).__name__}: {error}"[:300]
        row["seconds"] = time.monotonic() - began
        self.write()
        print(f"{name}: {row['state']}, {row['seconds']:.0f} s of {self.limits[name]:.0f}", flush=True)

    def part(self, name: str, share: float, function: Callable[..., None], *args: Any) -> Outcome:
        """A process that may use so much of what its item has left; at its end the report has what it noted, or why it did not end."""
        left = self.ends - time.monotonic()
        if left < LEAST:
            outcome = Outcome(0.0, None, "left out: the time of its item is used up", "")
        else:
            outcome = isolated(self.folder / re.sub(r"\W+", "_", name), left * share, function, *args)
        self.report["items"][self.item]["parts"][name] = {
            "seconds": round(outcome.seconds, 2),
            "problem": outcome.problem,
            "said": outcome.said if outcome.problem else "",
            "result": outcome.result,
        }
        self.write()
        print(f"  {name}: {outcome.problem or 'done'}, {outcome.seconds:.1f} s", flush=True)
        return outcome


def speeds(checks: Checks) -> None:
    """(1) Versions, copy and matmul speed, products at the shapes of the models, SDPA's backends, sums in float32."""
    if not checks.smoke and checks.part("a fork sees the device", 0.6, touch).problem:
        Isolated.fresh = True
    checks.part("speeds", 1.0, gpu_speeds.speeds, checks.smoke)


def touch(note: Note) -> None:
    """Use the device."""
    note(torch.ones(1, device="cuda").item())


def tests(checks: Checks) -> None:
    """(2) The tests marked gpu; beside them, on cores that they leave, the graphs of whole plain models are compiled for (4) and (6)."""
    left = checks.ends - time.monotonic()
    given = (ROOT, checks.folder, max(left - 12, left / 2), checks.smoke)
    if checks.smoke:
        checks.part("tests", 1.0, gpu_tests.run_tests, *given)
        return
    shapes = gpu_models.shapes(checks.memory(), checks.smoke)
    with Isolated(checks.folder / "ahead", left, gpu_models.compile_ahead, [shapes["124m"], shapes["1.3b"]]) as ahead:
        checks.part("tests", 1.0, gpu_tests.run_tests, *given)
    print(f"  compiled ahead, or ended: {ahead.noted()}", flush=True)


def one_step(checks: Checks) -> None:
    """(3) GPT-2 124M: what waits, the time by kernel, a Chrome trace."""
    shape = gpu_models.shapes(checks.memory(), checks.smoke)["124m"]
    words = [] if checks.smoke else ["train.kernels=triton"]
    checks.part("step", 1.0, gpu_models.step_apart, shape, words, checks.folder / "trace_124m.json.gz")


def model(name: str, steps: int) -> Callable[[Checks], None]:
    """(4), (5), (6) A shape in four ways, ours and plain PyTorch in turn; each side counts at its best of two."""

    def item(checks: Checks) -> None:
        shape = gpu_models.shapes(checks.memory(), checks.smoke)[name]
        if _ways(checks, name, shape, steps):
            _ways(checks, f"{name} smaller", shape.smaller(), steps)

    return item


def _ways(checks: Checks, name: str, shape: Shape, steps: int) -> bool:
    """Measure all of them; whether the first two showed that there is too little memory, and nothing else was tried."""
    table = checks.report["models"][name] = {"shape": shape.name, "rows": {}}
    # Triton's interpreter and a C++ compiler take longer than a smoke run may; that the ways are right, other tests know.
    first, second, backend = ["train.kernels=triton"], ["train.compile=block"], "inductor"
    if checks.smoke:
        first, second, backend = ["train.kernels=auto"], ["train.kernels=reference"], "aot_eager"
    times = (2, 1) if checks.smoke else (steps, 2)
    ways: dict[str, tuple[Any, ...]] = {
        "ours, triton": (gpu_models.ours, shape, first, *times),
        "plain, blocks compiled": (gpu_models.plain, shape, "blocks", *times, backend),
        "ours, compile": (gpu_models.ours, shape, second, *times),
        "plain, model compiled": (gpu_models.plain, shape, "model", *times, backend),
    }
    for number, (way, call) in enumerate(ways.items()):
        outcome = checks.part(f"{name} {way}", (0.5, 0.6, 0.6, 1.0)[number], *call)
        if number < 2 and outcome.problem and "OutOfMemory" in outcome.said:
            return not name.endswith("smaller")
        if isinstance(outcome.result, dict):
            table["rows"][way] = outcome.result
            _compare(table)
    return False


def _compare(table: dict[str, Any]) -> None:
    """The best of each side, so far."""
    best = {
        side: max((row["tokens_per_second"] for way, row in table["rows"].items() if way.startswith(side)), default=0.0)
        for side in ("ours", "plain")
    }
    if best["ours"]:
        mine = next(row for row in table["rows"].values() if row["tokens_per_second"] == best["ours"])
        table |= {"mfu": mine["mfu"], "expected_memory": mine["expected_memory"]}
    if all(best.values()):
        table["ratio"] = best["ours"] / best["plain"]


def ranks(checks: Checks) -> None:
    """(7) Several ranks over gloo on tensors of the device."""
    left = max(checks.ends - time.monotonic(), LEAST)
    checks.part("ranks", 1.0, gpu_ranks.ranks_agree, checks.folder, left, checks.smoke)


def kernel_table(checks: Checks) -> None:
    """(8) Each kernel beside its reference, torch.compile and the copy speed."""
    checks.part("kernels", 1.0, gpu_kernels.kernels_beside_others, checks.smoke)


def decoding(checks: Checks) -> None:
    """(9) The engine: Qwen3 0.6B with random weights, 256 requests side by side, and one alone."""
    checks.part("decoding", 1.0, decode, checks.smoke)


def decode(note: Note, smoke: bool) -> None:
    """Measure on the device there is."""
    decode_bench.measured(decode_bench.plan_of(torch.device("cpu" if smoke else "cuda"), smoke), note)


ITEMS: dict[str, Callable[[Checks], None]] = {
    "1 speeds": speeds,
    "2 tests": tests,
    "3 one step": one_step,
    "4 124m": model("124m", 8),
    "5 8b shape": model("8b shape", 3),
    "6 1.3b": model("1.3b", 3),
    "7 ranks": ranks,
    "8 kernels": kernel_table,
    "9 decoding": decoding,
}


def main() -> int:
    """Run the items; 0 if all came to their end without a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the report, the logs and the trace")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any machine")
    parser.add_argument("--items", default="123456789", help="digits of those to run (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all items; less makes each limit smaller")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    chosen = {name: item for name, item in ITEMS.items() if name[0] in args.items}
    scale = args.seconds / sum(LIMITS[name] for name in chosen)
    checks = Checks(args.folder.resolve(), args.smoke, {name: scale * LIMITS[name] for name in chosen})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu_checks: ended from outside"))
    try:
        for name, item in chosen.items():
            checks.run(name, item)
    finally:
        checks.write()
        print(gpu_report.markdown(checks.report), flush=True)
    return int(any(row["state"] != "done" for row in checks.report["items"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
