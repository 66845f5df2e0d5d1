"""docs/prepare.md is what the schema says, and the example config is one."""

from pathlib import Path

import pytest

from megatrain.corpus.conduct import load_config
from megatrain.corpus.prepare_page import prepare_page

ROOT = Path(__file__).parents[2]


def test_the_committed_page_is_the_generated_one():
    page = (ROOT / "docs/prepare.md").read_text(encoding="utf-8")
    assert page == prepare_page(), "run `python -m megatrain.corpus.prepare_page > docs/prepare.md`"


@pytest.mark.parametrize("name", ["prepare_en_zh", "prepare_quickstart"])
def test_the_configs_of_the_house_are_sound(name):
    load_config(str(ROOT / f"launch/configs/{name}.yaml"), [])
