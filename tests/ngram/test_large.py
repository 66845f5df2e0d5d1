"""Texts far larger than memory, and lines of 100 MB."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from megatrain.ngram.fit import Settings, fit

ROOT = Path(__file__).resolve().parents[2]


def text_of(path, size, seed=1):
    """Sentences of words as frequent as in a language, some of which go together."""
    draw = np.random.default_rng(seed)
    with path.open("wb") as file:
        while file.tell() < size:
            words = np.minimum(draw.zipf(1.15, 2_000_000), 3_000_000)
            words[1::3] = words[::3][: words[1::3].size] * 7 % 100_003
            text = b" ".join(b"w%x" % n for n in words.tolist())
            spaces = np.flatnonzero(np.frombuffer(text, np.uint8) == 32)
            data = np.frombuffer(text, np.uint8).copy()
            data[spaces[:: int(draw.integers(8, 20))]] = 10
            file.write(data.tobytes() + b"\n")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_stays_within_what_was_given(tmp_path):
    """1 GB at order 3: 512 MB hold it, and the file is the one that 3 GB give."""
    spec = importlib.util.spec_from_file_location("ngram_speed", ROOT / "docs/benchmarks/ngram_speed.py")
    speed = importlib.util.module_from_spec(spec)
    sys.modules["ngram_speed"] = speed
    spec.loader.exec_module(speed)
    text_of(tmp_path / "text", 10**9)
    found = {memory: speed.run(tmp_path / "text", 3, [], memory, 2, digest=True) for memory in ("512M", "3G")}
    assert found["512M"]["memory_mb"] <= 512, found["512M"]
    assert found["512M"]["sha256"] == found["3G"]["sha256"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_line_of_100_megabytes(tmp_path):
    (tmp_path / "text").write_bytes(b"ab c " * 20_000_000)
    report = fit([tmp_path / "text"], tmp_path / "m.arpa", Settings(3, fallback=(0.5, 1.0, 1.5), memory=1 << 29))
    assert report.tokens == 40_000_001 and report.types == 5
    (tmp_path / "one").write_bytes(b"x" * 10**8)
    assert fit([tmp_path / "one"], tmp_path / "o.arpa", Settings(2, fallback=(0.5, 1.0, 1.5))).counts == [4, 2]
