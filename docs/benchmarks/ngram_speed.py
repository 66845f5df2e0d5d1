"""How fast `megatrain ngram fit` is, and what it takes: tokens a second, n-grams written, memory of all processes, disk.

    python docs/benchmarks/ngram_speed.py TEXT --orders 3 5 --memory 400M

One line of JSON a model: order 3, order 5, order 5 with --prune 0 0 1. Memory is the largest sum of resident memory of the command and its
children, looked at 50 times a second; disk is the largest size of the folder of intermediate files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def resident(pid: int) -> int:
    """Bytes of a process and of all below it."""
    total = 0
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    if found := re.search(r"VmRSS:\s+(\d+) kB", status):
        total += int(found[1]) * 1024
    return total + sum(resident(int(child)) for child in children)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total


def sha256_of(path: Path) -> str:
    """Of a file, a piece at a time."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 22):
            digest.update(piece)
        return digest.hexdigest()


def run(text: Path, order: int, prune: list[int], memory: str, workers: int, *, digest: bool = False) -> dict[str, object]:
    """Fit one model. digest: also the SHA-256 of what it wrote."""
    with tempfile.TemporaryDirectory(dir=text.parent) as name:
        folder = Path(name)
        command = [sys.executable, "-m", "megatrain", "ngram", "fit", "--order", str(order), "--input", str(text)]
        command += ["--arpa", str(folder / "m.arpa"), "--memory", memory, "--workers", str(workers), "--temporary", name]
        command += ["--discount-fallback"]
        command += ["--prune", *map(str, prune)] if prune else []
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        most = disk = rounds = 0
        while process.poll() is None:
            most = max(most, resident(process.pid))
            rounds += 1
            if rounds % 10 == 0:
                disk = max(disk, sum(folder_bytes(part) for part in folder.glob("ngram-*")))
            time.sleep(0.02)
        seconds = time.monotonic() - began
        said = (process.stdout or sys.stdin).read()
        tokens = int(re.search(r": ([\d,]+) tokens", said)[1].replace(",", ""))  # type: ignore[index]
        counts = [int(n.replace(",", "")) for n in re.findall(r"-grams: ([\d,]+)", said)]
        return {
            "order": order,
            "prune": prune,
            "seconds": round(seconds, 1),
            "tokens": tokens,
            "million_tokens_per_second": round(tokens / seconds / 1e6, 3),
            "ngrams": sum(counts),
            "arpa_mb": round((folder / "m.arpa").stat().st_size / 1e6),
            "memory_mb": round(most / 2**20),
            "disk_mb": round(disk / 1e6),
            **({"sha256": sha256_of(folder / "m.arpa")} if digest else {}),
        }


def main() -> None:
    """Fit all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--orders", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--memory", default="400M")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-prune", action="store_true", help="leave the pruned model out")
    options = parser.parse_args()
    models: list[tuple[int, list[int]]] = [(order, []) for order in options.orders]
    if 5 in options.orders and not options.no_prune:
        models.append((5, [0, 0, 1]))
    for order, prune in models:
        print(json.dumps(run(options.text, order, prune, options.memory, options.workers)), flush=True)


if __name__ == "__main__":
    main()
