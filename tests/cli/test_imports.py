import gc

import pytest

from megatrain.cli.imports import imports


def test_garbage_is_looked_for_again_behind_imports():
    with imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError), imports():
        import nothing_of_this_name  # noqa: F401
    assert gc.isenabled()


def test_what_looks_for_none_still_does_not():
    gc.disable()
    try:
        with imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
