"""The oldest and the newest Triton that setup.cfg admits pass the tests of the kernels, interpreted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDEST = re.search(r"triton>=([0-9.]+)", (ROOT / "setup.cfg").read_text())[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux alone")
@pytest.mark.parametrize("wanted", [f"triton=={OLDEST}.*", "triton"], ids=["oldest", "newest"])
def test_the_kernels_pass_with(wanted, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), wanted]
    subprocess.run(pip, check=True, timeout=250)
    env = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    names = (
        "test_triton.py",
        "test_triton_views.py",
        "test_adamw.py",
        "test_dropout.py",
        "test_attention_dropout.py",
        "test_paged_triton.py",
    )
    tests = [str(ROOT / "tests/kernels" / name) for name in names]
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(pytest_, env=env, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    which = [sys.executable, "-c", "import triton; print(triton.__file__)"]
    assert Path(subprocess.check_output(which, env=env, text=True).strip()).is_relative_to(tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
