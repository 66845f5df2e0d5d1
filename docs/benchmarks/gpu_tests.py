"""The tests marked `gpu` in an order that loses the least when it is cut, each failure kept in full as soon as it is there.

As a plugin of pytest (-p gpu_tests) it takes the first case of every test, then the second of each, and so on, and writes a line of
JSON for every test that has ended into the file that MEGATRAIN_GPU_TESTS names.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from isolated import Note

RECORD = "MEGATRAIN_GPU_TESTS"
KEPT = 6000
"""Characters of a failure that the report keeps."""
WORKERS = 8


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Breadth first: the number of a case within its test decides, then the order of the files."""
    seen: collections.Counter[str] = collections.Counter()
    turns = {}
    for item in items:
        test = item.nodeid.split("[")[0]
        turns[item.nodeid] = seen[test]
        seen[test] += 1
    items.sort(key=lambda item: turns[item.nodeid])


def pytest_runtest_logreport(report: Any) -> None:
    """One line for a test that has passed, failed or was skipped; by the process that collects the reports alone."""
    if os.environ.get("PYTEST_XDIST_WORKER") or (report.when != "call" and report.outcome == "passed"):
        return
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.outcome == "failed":
        row["text"] = report.longreprtext
    with Path(os.environ[RECORD]).open("a") as file:
        file.write(json.dumps(row) + "\n")


def pytest_collectreport(report: Any) -> None:
    """A file that cannot be imported."""
    if report.failed and not os.environ.get("PYTEST_XDIST_WORKER"):
        row = {"test": report.nodeid, "outcome": "failed", "seconds": 0.0, "text": report.longreprtext}
        with Path(os.environ[RECORD]).open("a") as file:
            file.write(json.dumps(row) + "\n")


def files_with_the_mark(root: Path) -> list[str]:
    """Test files that know the mark, whole runs first; only these are collected, since others may need what is not installed."""
    marked = [path for path in sorted((root / "tests").rglob("test_*.py")) if re.search(r"\bmark\.gpu\b", path.read_text())]
    return [
        str(path) for path in sorted(marked, key=lambda path: (path.stem != "test_gpu", path.parent.name != "kernels", path))
    ]


def run_tests(note: Note, root: Path, folder: Path, seconds: float, smoke: bool) -> None:
    """Run them for so long at most; fails where one has failed or not all have ended."""
    record = folder / "tests.jsonl"
    record.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-c", str(root / "setup.cfg"), f"--rootdir={root}", "-q", "--tb=long", "-rfE"]
    command += ["-p", "no:cacheprovider", "-p", "gpu_tests", "-o", "addopts=--import-mode=importlib", "-o", "filterwarnings="]
    command += ["--continue-on-collection-errors"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["-o", "timeout=100"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "1" if smoke else str(WORKERS), "--dist", "load", "--maxschedchunk", "1"]
    if smoke:
        command += [str(root / "tests/kernels/test_triton.py"), "-k", "test_rotary and float32"]
    else:
        command += ["-m", "gpu", *files_with_the_mark(root)]
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # this may run within tests
    env = {**outer, RECORD: str(record), "OMP_NUM_THREADS": "1"}
    if not smoke:
        env.pop("TRITON_INTERPRET", None)
    began = time.monotonic()
    with (folder / "tests.txt").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        asked = False
        while process.poll() is None:
            time.sleep(0.2)
            if time.monotonic() - began > seconds and not asked:
                process.send_signal(signal.SIGINT)  # then it still says what has failed
                asked = True
            note(_counted(record))
    found = _counted(record) | {"exit_code": process.returncode, "cut": asked}
    found["end"] = (folder / "tests.txt").read_text(errors="replace")[-1500:]
    note(found)
    if process.returncode:
        sys.exit(f"{'cut, ' if asked else ''}exit code {process.returncode} of pytest")


def _counted(record: Path) -> dict[str, Any]:
    """How many of each outcome, the failures, and the slowest."""
    rows = [json.loads(line) for line in record.read_text().splitlines() if line.endswith("}")] if record.exists() else []
    counts = collections.Counter(row["outcome"] for row in rows)
    failures = [row | {"text": row["text"][-KEPT:]} for row in rows if row["outcome"] == "failed"]
    slowest = sorted(rows, key=lambda row: -row["seconds"])[:5]
    return {"outcomes": dict(counts), "failures": failures, "slowest": [(row["test"], row["seconds"]) for row in slowest]}
