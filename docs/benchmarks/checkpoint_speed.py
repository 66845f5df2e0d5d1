"""Saving and loading a checkpoint, beside torch.distributed.checkpoint (DCP) with the same tensors and disk, in interleaved pairs.

    python docs/benchmarks/checkpoint_speed.py --folder /tmp          # GPT-2 124M: weights and two moments in float32, 1.49 GB

Both sides wait for the disk (fsync). megatrain's also makes a checksum of every byte it saves and verifies every byte it loads.
Saves: until everything is on the disk. Loads: from the page cache. Stall: how long a training loop waits for an asynchronous save to
take its copy (DCP with a stager that is kept, of the second save on). Slowed: a loop of matrix products while that save is under way,
against alone.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from megatrain.checkpoint.load import load
from megatrain.checkpoint.save import Contents, Saver
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import ParamSpec
from megatrain.parallel.portion import Portion
from megatrain.runtime.allocator import tune_allocator

KINDS = ("weights", "exp_avg", "exp_avg_sq")
CTX = ParallelContext.single()


def shapes(layers: int = 12, hidden: int = 768, vocab: int = 50257) -> dict[str, tuple[int, ...]]:
    """The tensors of a GPT-2; without arguments those of 124M."""
    found: dict[str, tuple[int, ...]] = {"embedding.tokens": (vocab, hidden), "embedding.positions": (1024, hidden)}
    for n in range(layers):
        for name, rows, columns in (("qkv", 3, 1), ("output", 1, 1), ("up", 4, 1), ("down", 1, 4)):
            found[f"layers.{n}.{name}.weight"] = (rows * hidden, columns * hidden)
            found[f"layers.{n}.{name}.bias"] = (rows * hidden,)
        found |= {f"layers.{n}.norm{i}.{kind}": (hidden,) for i in (1, 2) for kind in ("weight", "bias")}
    return found


def state(hidden: int) -> dict[str, dict[str, torch.Tensor]]:
    """Kind -> name -> tensor."""
    return {kind: {name: torch.randn(shape) for name, shape in shapes(hidden=hidden).items()} for kind in KINDS}


class Ours:
    """megatrain."""

    def __init__(self, folder: Path, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        self.folder = folder / "megatrain"
        self.portions = {
            kind: {n: Portion.whole(ParamSpec(n, tuple(t.shape)), t) for n, t in named.items()}
            for kind, named in tensors.items()
        }
        self.saver = Saver(self.folder, CTX, keep=1)
        self.step = 0

    def save(self, *, wait: bool = True) -> None:
        """Save; without `wait` return when all is copied."""
        self.step += 1
        self.path = self.saver.save(Contents(self.step, {}, "model: {}\n"), self.portions, wait=wait)

    def finish(self) -> None:
        """Wait for the disk."""
        self.saver.finish()

    def load(self) -> None:
        """Load, and verify every byte."""
        load(self.path, self.portions, CTX)


class Theirs:
    """DCP."""

    def __init__(self, folder: Path, tensors: dict[str, dict[str, torch.Tensor]], threads: int) -> None:
        self.folder, self.threads = folder / f"dcp{threads}", threads
        self.tensors: dict[str, Any] = {f"{kind}.{n}": t for kind, named in tensors.items() for n, t in named.items()}
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.pending: Any = None

    def _writer(self) -> Any:
        return dcp.FileSystemWriter(self.folder, thread_count=self.threads, sync_files=True, overwrite=True)

    def save(self, *, wait: bool = True) -> None:
        """Save; without `wait` return when all is copied."""
        if wait:
            dcp.save(self.tensors, storage_writer=self._writer(), no_dist=True)
        else:
            made = dcp.async_save(self.tensors, storage_writer=self._writer(), async_stager=self.stager, no_dist=True)
            self.pending = getattr(made, "upload_completion", made)

    def finish(self) -> None:
        """Wait for the disk."""
        self.pending.result()

    def load(self) -> None:
        """Load."""
        dcp.load(self.tensors, storage_reader=dcp.FileSystemReader(self.folder), no_dist=True)


def seconds(action: Callable[..., None], **given: Any) -> float:
    """Of one call."""
    gc.collect()
    start = time.perf_counter()
    action(**given)
    return time.perf_counter() - start


def products(a: torch.Tensor, until: Callable[[], bool]) -> float:
    """Seconds of a matrix product, one after the other until told to stop."""
    start, count = time.perf_counter(), 0
    while not until() or count < 5:
        torch.mm(a, a)
        count += 1
    return (time.perf_counter() - start) / count


def warm(folder: Path) -> None:
    """Bring all files into the page cache, where a save has left them or not."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                while stream.read(2**26):
                    pass


def for_a_second() -> Callable[[], bool]:
    """Whether a second has passed since this was called."""
    end = time.perf_counter() + 1
    return lambda: time.perf_counter() > end


def done(side: Any) -> Callable[[], bool]:
    """Whether a side's save under way has ended."""
    future = side.saver._published if isinstance(side, Ours) else side.pending
    ended: Callable[[], bool] = future.done
    return ended


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; emptied again")
    parser.add_argument("--hidden", type=int, default=768, help="the model's width")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(args.threads)
    folder = args.folder / "checkpoint_speed"
    tensors = state(args.hidden)
    sides = {
        "megatrain": Ours(folder, tensors),
        "dcp": Theirs(folder, tensors, 1),
        "dcp, 2 threads": Theirs(folder, tensors, 2),
    }
    took: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in sides} for what in ("save", "load", "stall", "slowed")
    }
    a = torch.randn(1024, 1024)
    try:
        for pair in range(args.pairs + 1):
            for name, side in sides.items():
                row = {"save": seconds(side.save)}
                warm(side.folder)
                row["load"] = seconds(side.load)
                alone = products(a, for_a_second())
                row["stall"] = seconds(side.save, wait=False)
                row["slowed"] = products(a, done(side)) / alone
                side.finish()
                if pair:  # the first takes memory and page cache
                    for what, value in row.items():
                        took[what][name].append(value)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    median = {what: {name: round(statistics.median(v), 3) for name, v in of.items()} for what, of in took.items()}
    ratios = {
        f"{what}, {name}": [
            round(f([t / o for t, o in zip(took[what][name], took[what]["megatrain"], strict=True)]), 2)
            for f in (statistics.median, min, max)
        ]
        for what in ("save", "load", "stall")
        for name in list(sides)[1:]
    }
    numbers = sum(t.nbytes for named in tensors.values() for t in named.values())
    print(
        json.dumps(
            {"bytes": numbers, "pairs": args.pairs, "median": median, "ratio, theirs to ours (median, min, max)": ratios}
        )
    )


if __name__ == "__main__":
    main()
