"""Every Triton kernel compiles for an H100, without one; nothing spills, and 16-bit numbers are read and written side by side."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="only Linux has Triton")
EACH_KIND = [
    "norm n=768 rms=0 add=1 before=0 bfloat16",
    "norm n=12288 rms=0 add=1 before=1 bfloat16",
    "norm n=4096 rms=1 add=1 before=1 float32",
    "gate swiglu 11008 of 22016 bias=0 bfloat16",
    "gate geglu 4096 of 8192 bias=1 bfloat16",
    "act gelu 1001 bias=1 float32",
    "rotary 32x128 of 128 interleaved=0 x1 bfloat16",
    "heads 128 of 128 groups=8 interleaved=0 bias=0 bfloat16",
    "heads 64 of 32 groups=1 interleaved=1 bias=1 bfloat16",
    "entropy v=50257 of 50304 more=1 bfloat16",
    "dropout h=768 bfloat16",
    "weights n=1024 bfloat16",
    "attention 32 of 8 x 128 all masks bfloat16",
    "pages 16 of 8 x 128 queries=one masked=0 bfloat16",
    "pages 16 of 8 x 128 queries=several masked=1 bfloat16",
    "adam n=1048576 decoupled=1 bfloat16",
    "adam n=1048576 decoupled=0 halves",
]
"""A call or two of each kind, of those that differ most; `test_every_call` has the others."""


def compiled(tmp_path, *patterns):
    """What the compiler made of the calls that match, a row for each kernel."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parents[1] / "harness/sm_90.py"), *patterns]
    done = subprocess.run(
        command, env=env | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows):
    assert [row for row in rows if row["spilled"]] == []
    many = [row for row in rows if row["registers"] > 168 and not row["call"].startswith(("attention ", "pages "))]
    assert many == [], "three blocks of 128 threads on a multiprocessor; two of attention, whose sums lie in registers"
    odd = (
        "norm n=1000 ",
        "gate geglu 1001",
        "gate swiglu 1001",
        "act gelu 1001",
        "act gelu_tanh 1001",
        "act relu 1001",
        "rotary 1x21 ",
        "heads 21 ",
        "heads 80 ",  # 20 pairs: the second half begins at no multiple of 16 bytes
        "entropy v=101 ",
        "adam n=1001 ",
        "dropout h=101 ",
        "weights n=101 ",
        "attention 3 of 1 x 21 ",
    )
    wide = [row for row in rows if "float32" not in row["call"] and not row["call"].startswith(odd)]
    assert [row for row in wide if row["half_words"] > row["kernel"].startswith("_statistics")] == [], "the label's logit alone"


def test_calls_of_each_kind(tmp_path):
    rows = compiled(tmp_path, *EACH_KIND)
    assert {row["call"] for row in rows} == set(EACH_KIND) and len(rows) >= 2 * len(EACH_KIND) - 5, (
        "adam has no backward, dropout's is itself, pages have one for several queries"
    )
    check(rows)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_call(tmp_path):
    """All dtypes, sizes and views: three minutes of a core."""
    rows = compiled(tmp_path, "*")
    assert len(rows) > 400
    check(rows)
