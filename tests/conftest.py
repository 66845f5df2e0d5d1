import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before megatrain's kernels are imported

import pytest

# `python -m pytest` puts the checkout first on the path, where its folder kernels/ would hide a package that transformers looks for.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parents[1]]


@pytest.fixture(autouse=True)
def defaults_stand():
    """Every test leaves torch's process-wide defaults as they were."""
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    assert (torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


@pytest.fixture
def one_thread():
    """For models so small that they lose more by sharing work between cores than they gain, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
