"""The quickstart as a person runs it: how far it gets in its minutes, and that a second run has nothing left to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def quickstart(folder: Path, *words: str) -> tuple[dict[str, float], str]:
    """Run it with this environment's interpreter; its comparison with the n-grams, and what it printed."""
    command = [sys.executable, str(ROOT / "launch/quickstart.py"), "--dir", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    (comparison,) = folder.glob("*_*/comparison.json")
    return json.loads(comparison.read_text()), done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_default_is_far_below_the_unigram_and_is_not_repeated(tmp_path: Path) -> None:
    losses, _ = quickstart(tmp_path)
    assert losses["model"] < losses["unigram"] - 1.2
    (picture,) = tmp_path.glob("*/loss.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    _, printed = quickstart(tmp_path)
    assert "trained already" in printed
    assert "megatrain train" not in printed


@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_forty_minutes_are_below_the_bigram(tmp_path: Path) -> None:
    losses, _ = quickstart(tmp_path, "--minutes", "40")
    assert losses["model"] < losses["bigram"]
