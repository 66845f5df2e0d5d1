from pathlib import Path

import breaking
import pytest


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> breaking.House:
    """One house for all faults, with undisturbed runs that they share."""
    return breaking.furnish(Path(tmp_path_factory.mktemp("faults")))
