"""A process that reads changed files of one kind, and says before and behind each what it does.

    python tests/harness/fuzz_worker.py KIND SECONDS FOLDER

A line of JSON each on standard output: {"begin": name of the case}, then {"end": verdict, "seconds": of a core, "bytes": of memory beyond
what was there before, "file": name, "size": bytes}. The verdict is `refused` with the message, `taken`, or what is wrong.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "references")]

import fuzzing  # noqa: E402
from file_kinds import KINDS, changed_file, digest, snapshot  # noqa: E402

LONGEST_MESSAGE = 4000


def say(**row: Any) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def memory(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most since the last reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


def judged(read: Any, folder: Path, whole: str | None) -> str:
    """The verdict on one reading. whole: what must be read if anything is; None where anything may be."""
    from megatrain.cli.main import _expected

    try:
        found = digest(read(folder))
    except Exception as error:
        said = str(error)
        ours = _expected(error) and type(error) is not AssertionError
        if not ours:
            return f"WRONG: {type(error).__name__}: {said[:500]}\n{traceback.format_exc()[-1500:]}"
        if not said.strip() or "\n" in said or len(said) > LONGEST_MESSAGE:
            return f"WRONG: a message of {len(said)} characters and {len(said.splitlines())} lines: {said[:500]}"
        return f"refused: {said[:200]}"
    return "WRONG: a change was taken" if whole not in (None, found) else "taken"


def main(name: str, seconds: float, folder: Path) -> None:
    warnings.simplefilter("ignore")
    kind = KINDS[name]
    folder.mkdir(parents=True)
    kind.make(folder)
    files = snapshot(folder)
    whole = digest(kind.read(folder))
    for case, draw in fuzzing.cases(seconds, name):
        say(begin=case)
        path, data = changed_file(kind, folder, draw)
        before = path.read_bytes()
        path.write_bytes(data)
        Path("/proc/self/clear_refs").write_text("5")
        held, began = memory("VmRSS"), time.process_time()
        verdict = judged(kind.read, folder, whole if kind.sealed else None)
        took, more = time.process_time() - began, memory("VmHWM") - held
        say(end=verdict, seconds=took, bytes=more, file=str(path.relative_to(folder)), size=len(data))
        path.write_bytes(before)
        if (now := snapshot(folder)) != files:
            say(end=f"WRONG: other files than before: {sorted(now.keys() ^ files.keys())}", seconds=0, bytes=0, file="", size=0)
            return


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
