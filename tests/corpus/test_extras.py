"""A missing package is told with the command that installs it."""

import pytest

from megatrain.corpus.extras import need


def test_a_missing_package_is_told_with_its_command():
    assert need("json.decoder", "reading", "data").__name__ == "json.decoder"
    with pytest.raises(ImportError, match=r"^reading needs no_such_one: pip install 'megatrain\[data\]'$"):
        need("no_such_one.part", "reading", "data")
