"""The example of docs/testing.md does what the page says."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from megatrain.testing import simulate, spawn

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path_factory.mktemp("page") / "test_my_layer.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("page_test_my_layer", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("run", [simulate, spawn])
def test_the_example_passes(example, run):
    example.test_my_layer(run)


def test_the_example_can_fail(example, monkeypatch):
    monkeypatch.setattr(example, "my_layer", lambda x, weight, tp: x @ weight)
    with pytest.raises(AssertionError):
        example.test_my_layer(simulate)
