"""What the guards of a run cost: the CPU time of their own code on every rank, by that of the steps, so that other programs do not count.

    python docs/benchmarks/guard_overhead.py [--ranks 2] [section.key=value ...]

Trains in as many processes on random tokens and adds up, for each guard,

    in the step      the time in its functions, less that of other guards and of the step itself within
    beside it        the CPU time of its threads and processes, by the time that has passed
    waits            of each wait, the two looks at the clock: their time, measured apart, by the number of waits

Audits (copies compared, a micro-batch computed twice) are taken every AUDIT_EVERY steps and counted at their default intervals. One JSON
line: each guard's share of the time of the steps, the mean over the ranks; their sum, and the largest of a rank.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

import megatrain
from megatrain.config.load import load
from megatrain.config.schema import Config
from megatrain.data.indexed import TokenStoreWriter
from megatrain.runtime.ports import free_port_near
from megatrain.training import Run
from megatrain.transport.stalls import HostStalls

GUARDS = {
    "limits of time": [
        "lifecycle.guard.Guard",
        "lifecycle.sections.Sections",
        "lifecycle.monitor.Monitor",
        "lifecycle.limits.Limits",
    ],
    "who is slow": ["lifecycle.stragglers.Stopwatch", "lifecycle.stragglers.Comparison", "watch.Watch._compare"],
    "loss guard": ["lifecycle.spikes.Spikes"],
    "state between updates": ["optim.state_watch.StateWatch", "auditor.Auditor.updated"],
    "copies compared": ["auditor.Auditor.check"],
    "computed twice": ["auditor.Auditor.recompute"],
    "ids of a batch": ["data.indexed.TokenStore.read"],
}
"""Functions of each guard, and classes, of which all public functions. Reading tokens counts whole, though only a part checks them."""
STEP = ["watch.queue_step"]
THREADS = ("megatrain-guard", "megatrain-monitor")
WARM_UP, AUDIT_EVERY = 10, 20
CONFIG: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 128, "vocab_size": 512},
    "train": {
        "steps": 200,
        "global_batch_size": 16,
        "micro_batch_size": 8,
        "precision": "fp32",
        "audit_every": AUDIT_EVERY,
        "audit_compute_every": AUDIT_EVERY,
        "eval_every": 0,
    },
    "checkpoint": {"save_every": 0},
    "parallel": {"device": "cpu", "tensor_parallel_size": 2},
}
"""The model of launch/configs/gpt_tiny.yaml, of 0.9 million parameters."""


class Clock:
    """CPU time in the functions of each guard, less that in those which they call of others."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._here = threading.local()

    def around(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def timed(*given: Any, **named: Any) -> Any:
            outer, self._here.inner = getattr(self._here, "inner", 0.0), 0.0
            began = time.thread_time()
            try:
                return function(*given, **named)
            finally:
                took = time.thread_time() - began
                self.seconds[label] += took - self._here.inner
                self._here.inner = outer + took

        return timed

    def install(self, label: str, path: str) -> None:
        """Time a function, a method, or all public methods of a class, `path` being its name under megatrain."""
        for owner, name in methods(path):
            setattr(owner, name, self.around(label, getattr(owner, name)))


def methods(path: str) -> Iterator[tuple[Any, str]]:
    """(module or class, name) of what `path` means."""
    words = path.split(".")
    split = next(i for i in range(1, len(words)) if Path(megatrain.__path__[0], *words[:i]).with_suffix(".py").exists())
    owner: Any = importlib.import_module(".".join(["megatrain", *words[:split]]))
    for word in words[split:-1]:
        owner = getattr(owner, word)
    found = getattr(owner, words[-1])
    if not inspect.isclass(found):
        yield owner, words[-1]
        return
    for name, of in vars(found).items():
        if inspect.isfunction(of) and (not name.startswith("_") or name == "__call__"):
            yield found, name


def beside() -> float:
    """CPU seconds of the guards' threads and processes so far."""
    nanoseconds = 0
    for thread in threading.enumerate():
        if thread.name.startswith(THREADS):
            nanoseconds += int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0])
    times = [child.cpu_times() for child in psutil.Process().children() if any("monitor" in word for word in child.cmdline())]
    return nanoseconds / 1e9 + sum(of.user + of.system for of in times)


def look_seconds() -> float:
    """What the count of a wait takes."""
    stalls, times = HostStalls(), 20_000
    stalls.open()
    began = time.thread_time()
    for _ in range(times):
        stalls.end(stalls.begin())
    return (time.thread_time() - began) / times


def rank(config: Path, folder: Path) -> None:
    """Train as one rank, and leave its shares in a file."""
    clock, began, at = Clock(), Counter[str](), [0.0]
    for label, paths in {**GUARDS, "step": STEP}.items():
        for path in paths:
            clock.install(label, path)
    job = megatrain.build(config)
    train = job.config.train

    def look(run: Run) -> None:
        if run.step + 1 in (WARM_UP, train.steps):
            calls = sum(total.calls for total in job.session.recorder.totals().values())
            clock.seconds["beside"], clock.seconds["calls"], clock.seconds["wall"] = beside(), calls, time.perf_counter()
            if run.step + 1 == WARM_UP:
                began.update(clock.seconds)
            at.append(time.thread_time())

    job.observers.before_update.append(look)
    megatrain.train(job)
    job.close()
    clock.seconds.subtract(began)
    seconds = {label: clock.seconds[label] for label in GUARDS}
    seconds["who is slow"] += 2 * clock.seconds["calls"] * look_seconds()  # a call's start is a wait too
    seconds["copies compared"] *= AUDIT_EVERY / Config().train.audit_every
    seconds["computed twice"] *= AUDIT_EVERY / Config().train.audit_compute_every
    total = at[2] - at[1]
    shares = {label: of / total for label, of in seconds.items()}
    shares["limits of time"] += clock.seconds["beside"] / clock.seconds["wall"]
    shares |= {"step": total / (train.steps - WARM_UP)}
    (folder / f"shares_{job.session.rank}").write_text(json.dumps(shares))


def main() -> None:
    """Start the ranks and print what they have left."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--ranks", type=int, default=2, metavar="N")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = np.random.default_rng(1).integers(0, CONFIG["model"]["vocab_size"], 1 << 20)
        with TokenStoreWriter(folder / "data", np.uint16) as writer:
            writer.add_documents(text, [1 << 10] * (1 << 10))
        tree = {**CONFIG, "data": {"train": str(folder / "data")}, "log": {"dir": str(folder / "run"), "peak_tflops": 1.0}}
        (folder / "given.yaml").write_text(yaml.safe_dump(tree))
        (folder / "config.yaml").write_text(load(folder / "given.yaml", options.overrides).text)
        words = [sys.executable, str(Path(__file__).resolve()), "--rank", str(folder)]
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port_near(29500)), "GLOO_SOCKET_IFNAME": "lo"}
        size = {"WORLD_SIZE": str(options.ranks), "LOCAL_WORLD_SIZE": str(options.ranks), "OMP_NUM_THREADS": "1"}
        env = {**os.environ, **address, **size}
        ranks = range(options.ranks)
        started = [subprocess.Popen(words, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=-3) for r in ranks]
        if any(process.wait() for process in started):
            sys.exit("a rank has failed")
        shares = [json.loads((folder / f"shares_{r}").read_text()) for r in ranks]
    row = {label: f"{100 * statistics.mean(of[label] for of in shares):.3f}%" for label in GUARDS}
    sums = [sum(of[label] for label in GUARDS) for of in shares]
    milliseconds = round(1e3 * statistics.mean(of["step"] for of in shares), 1)
    print(
        json.dumps(
            {
                "step_cpu_ms": milliseconds,
                **row,
                "all": f"{100 * statistics.mean(sums):.3f}%",
                "most": f"{100 * max(sums):.3f}%",
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2], "config.yaml"), Path(sys.argv[2]))
    else:
        main()
