from pathlib import Path

import pytest
import served


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of a tiny model whose tokens are bytes."""
    return served.save_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def server(model, tmp_path_factory):
    """One server for all tests that do it no harm."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "template.jinja").write_text(served.TEMPLATE)
    words = (
        "--most-running",
        "24",
        "--queue",
        "200",
        "--request-seconds",
        "60",
        "--chat-template",
        str(folder / "template.jinja"),
    )
    with served.running(folder, model, *words) as running:
        yield running
