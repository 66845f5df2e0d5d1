"""A missing package is told with the command that installs it."""

import importlib

import pytest
from small_corpus import rows_alone

from megatrain.cli.main import main
from megatrain.extras import need


def test_a_missing_package_is_told_with_its_command():
    assert need("json.decoder", "reading", "data").__name__ == "json.decoder"
    with pytest.raises(ImportError, match=r"^reading needs no_such_one: pip install 'megatrain\[data\]'$"):
        need("no_such_one.part", "reading", "data")


def test_a_preparation_without_a_package_ends_in_one_line(tmp_path, monkeypatch, capsys):
    rows_alone(tmp_path)
    monkeypatch.chdir(tmp_path)
    imported = importlib.import_module

    def without(name, package=None):
        if name == "orjson":
            raise ModuleNotFoundError("No module named 'orjson'", name=name)
        return imported(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    assert main(["data", "read", "prepare.yaml", "--worker"]) == 1
    assert capsys.readouterr().err == "megatrain: error: the corpus pipeline needs orjson: pip install 'megatrain[data]'\n"
