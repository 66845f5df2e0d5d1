"""Changed files of every kind that the program reads: no crash, no hang, no memory without bound, our own errors in one line.

Nor is a checkpoint or a compiled model taken that was changed. Each kind has a moment here, twenty in `launch/fuzz.sh` (so in CI) and ten
minutes in `launch/test.sh --all`, or MEGATRAIN_FUZZ_SECONDS. A process of its own reads them (fuzz_worker.py), and may crash.
"""

import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import fuzzing
import mutations
import pytest
from file_kinds import KINDS, digest
from jobs import Job

LONGEST = 10.0
"""Seconds of a core for one file; of the clock, too, where nothing is said for so long and STARTING."""
STARTING = 20.0
"""Seconds of imports, more than a case may be silent."""
MOST_MEMORY = 256 << 20
"""Bytes beside twice the file's size."""


def fuzz(kind, seconds, folder):
    """Counts of verdicts; asserts that each is as promised."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is measured by /proc of Linux")
    environment = {**os.environ, fuzzing.SEED: str(fuzzing.seed())}
    with Job(folder / "job") as job:
        job.fork(
            [str(Path(__file__).with_name("harness") / "fuzz_worker.py"), kind, str(seconds), str(folder / "files")],
            environment,
        )
        out, size, moved = folder / "job" / "out_0", -1, time.monotonic()
        while job.processes[0].poll() is None and time.monotonic() - moved < LONGEST + STARTING:
            now = out.stat().st_size if out.exists() else -1  # the process makes it
            if now != size:
                size, moved = now, time.monotonic()
            time.sleep(0.05)
        code, said = job.processes[0].poll(), job.ended(0).err[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0, f"{kind}: the process {'hangs' if code is None else f'ended with {code}'} in {rows[-1:]}\n{said}"
    found, case = Counter(), ""
    for row in rows:
        case = row.get("begin", case)
        if "end" in row:
            assert not row["end"].startswith("WRONG"), f"{kind}, {case}: {row}"
            assert row["seconds"] < LONGEST, f"{kind}, {case}: {row}"
            assert row["bytes"] <= 2 * row["size"] + MOST_MEMORY, f"{kind}, {case}: {row}"
            found[row["end"].partition(":")[0]] += 1
    print(f"{kind}: {dict(found)}")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files(kind, tmp_path):
    assert sum(fuzz(kind, fuzzing.seconds(short=0.4), tmp_path).values())


@pytest.mark.fault(
    injection="changed files of kind {kind}", promise="no crash, no hang, bounded memory, errors of one line", layout="1"
)
@pytest.mark.parametrize("kind", KINDS)
def test_more_changed_files(kind, tmp_path):
    assert fuzz(kind, fuzzing.seconds(short=20.0), tmp_path)["refused"] > 5


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", KINDS)
def test_many_changed_files(kind, tmp_path):
    assert fuzz(kind, fuzzing.seconds(slow=True, long=600.0), tmp_path)["refused"] > 50


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_read_and_changes_change_them(kind, tmp_path):
    made = KINDS[kind]
    made.make(tmp_path)
    assert digest(made.read(tmp_path)) == digest(made.read(tmp_path))
    for pattern, change in made.changes.items():
        files = [path for path in sorted(tmp_path.glob(pattern)) if path.is_file()]
        before = files[0].read_bytes()
        draw = random.Random(1)
        assert sum(change(before, draw) != before for _ in range(20)) > 10


def test_the_bombs_of_a_tree():
    assert (
        mutations.text_of({"a": mutations.DIGITS, "b": [mutations.TWICE]})
        == b'{"a": ' + b"9" * 10_000 + b', "b": [{"a": 1, "a": 2}]}'
    )
