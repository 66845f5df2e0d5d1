"""What ranks compare before they train, and what a checkpoint keeps of it."""

import platform

import numpy as np
import torch

from megatrain.runtime import installed


def test_every_source_file_counts_kernels_too(tmp_path, monkeypatch):
    files = installed.sources()
    assert {"megatrain/training.py", "megatrain/optim/optimizer.py", "megatrain/kernels/adamw.py"} <= files.keys()
    monkeypatch.setattr(installed, "ROOTS", {"megatrain": tmp_path / "a", "megatrain/kernels": tmp_path / "b"})
    for name in "ab":
        (tmp_path / name / "room").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "room" / "file.py").write_text("lr = 1.0\n")
    before = installed.sources()
    assert list(before) == [
        "megatrain/__init__.py", "megatrain/kernels/__init__.py", "megatrain/kernels/room/file.py", "megatrain/room/file.py",
    ]  # fmt: skip
    (tmp_path / "b/room/file.py").write_text("lr = 1.5\n")
    after = installed.sources()
    assert [name for name in before if before[name] != after[name]] == ["megatrain/kernels/room/file.py"]
    assert installed.program(before)["code"] != installed.program(after)["code"] == installed.program(after)["code"]


def test_versions_are_those_that_are_imported(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.2.3")
    monkeypatch.setattr(installed, "OPTIONAL", ("no-such-package",))
    text = installed.described({"megatrain/a.py": "12ab"})
    assert text.splitlines() == [
        f"python {platform.python_version()}",
        "torch 1.2.3",
        f"numpy {np.__version__}",
        "megatrain 0.1.0",
        "no-such-package not installed",
        "megatrain/a.py 12ab",
    ]
