"""The rows that fault tests leave and the table that is made of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import promises
import pytest

ROOT = Path(__file__).resolve().parents[2]

TESTS = """
import pytest

@pytest.mark.fault(injection="kill in {section}", promise="it ends", bound="{limit} + 1", layout="tp 2")
@pytest.mark.parametrize(("section", "limit"), [("a step", 1), ("a save", 1)])
def test_a_kill(measured, section, limit):
    measured.detected(1.0 if section == "a step" else 3.0)

@pytest.mark.fault(injection="a fixture that fails", promise="a row all the same")
def test_no_fixture(broken, measured):
    pass

@pytest.fixture
def broken():
    raise OSError("no room")

@pytest.mark.fault(injection="a stop", promise="it goes on")
def test_a_stop(measured):
    measured.recovered(1.25, lost=3)
    measured.recovered(0.5)

@pytest.mark.fault
def test_without_words():
    pass
"""


def test_rows_of_tests_that_held_and_that_did_not(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    rows = tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "promises",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-c",
        os.devnull,
        "-W",
        "ignore",
    ]
    env = {**os.environ, promises.ROWS: str(rows), "PYTHONPATH": str(ROOT / "tests/faults")}
    done = subprocess.run(
        [*command, str(tmp_path)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stdout
    assert "promised within 2 s" in done.stdout
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(one["injection"], one["detected_after"], one["recovered_after"], one["lost"], one["held"]) for one in found] == [
        ("kill in a step", 1.0, None, None, True),
        ("kill in a save", 3.0, None, None, False),
        ("a fixture that fails", None, None, None, False),
        ("a stop", None, 1.25, 3, True),
    ]
    assert promises.table(found).splitlines()[2:] == [
        "| kill in a step | it ends | tp 2 | 2 | 1.0 | | | HELD |",
        "| kill in a save | it ends | tp 2 | 2 | 3.0 | | | **FAILED** |",
        "| a fixture that fails | a row all the same | | | | | | **FAILED** |",
        "| a stop | it goes on | | | | 1.2 | 3 | HELD |",
    ]


def test_a_row_takes_the_place_of_the_last_one(tmp_path):
    path = tmp_path / "new/rows.jsonl"
    for test, held in (("a", False), ("b", True), ("a", True)):
        promises.write(path, {"test": test, "held": held})
    assert promises.read(path) == [{"test": "a", "held": True}, {"test": "b", "held": True}]


def test_the_table_stands_between_the_markers():
    page = f"before\n{promises.BEGIN}\nold\n{promises.END}\nbehind\n"
    assert promises.between(page, "new\n") == f"before\n{promises.BEGIN}\n\nnew\n\n{promises.END}\nbehind\n"
    with pytest.raises(ValueError, match="no <!-- table"):
        promises.between("no markers", "new\n")
    assert promises.BEGIN in (ROOT / "docs/reliability.md").read_text()


def test_what_is_left_takes_as_long_as_it_took():
    assert promises.Progress(Path(), ["a", "b"], {"a": 60.0, "c": 120.0}).minutes() == 2.5
