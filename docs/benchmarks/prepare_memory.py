"""Memory of `data prepare`, looked at ten times a second: the most that the command, a worker and what a worker starts have had resident.

    python docs/benchmarks/prepare_memory.py TEXT.jsonl FOLDER [--line-mb 1000] [section.key=value ...]

TEXT.jsonl is prepared with a line of so many MB in its middle, by one worker, with the rules of English and all of de-duplication; lines
are compared too.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml


def write_input(text: Path, path: Path, megabytes: int) -> None:
    """The text with a long line in its middle."""
    size = text.stat().st_size
    with text.open("rb") as file, path.open("wb") as out:
        while file.tell() < size // 2:
            out.write(file.readline())
        out.write(b'{"text": "')
        for _ in range(megabytes):
            out.write(b"words without end and " * 45_455)
        out.write(b'"}\n')
        shutil.copyfileobj(file, out)


def peaks(command: list[str]) -> tuple[int, dict[str, float]]:
    """(exit code, most MiB resident by kind of process)."""
    most: dict[str, float] = {}
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            family = [("command", psutil.Process(process.pid))]
            try:
                workers = family[0][1].children()
                family += [("worker", worker) for worker in workers]
                family += [("extractor", child) for worker in workers for child in worker.children()]
                for kind, member in family:
                    most[kind] = max(most.get(kind, 0.0), member.memory_info().rss / (1 << 20))
            except psutil.Error:
                pass
            time.sleep(0.1)
    return process.returncode, most


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--line-mb", type=int, default=1000)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    raw, config = arguments.folder / "raw.jsonl", arguments.folder / "prepare.yaml"
    write_input(arguments.text, raw, arguments.line_mb)
    tree = {
        "read": {"sources": [{"name": "text", "paths": [str(raw)], "rules": ["gopher", "c4"]}]},
        "dedup": {"lines": "lines"},
        "tokenize": {"tokenizer": "bytes"},
        "output": {"dir": str(arguments.folder / "out")},
        "run": {"workers": 1},
    }
    config.write_text(yaml.safe_dump(tree))
    begin = time.monotonic()
    command = [sys.executable, "-m", "megatrain", "data", "prepare", str(config), *arguments.overrides]
    code, most = peaks(command)
    shown = ", ".join(f"{kind} {found:.0f} MiB" for kind, found in most.items())
    print(f"{raw.stat().st_size / 1e9:.2f} GB in {time.monotonic() - begin:.0f} s, exit code {code}: {shown}")


if __name__ == "__main__":
    main()
