"""docs/config.md is what the schema says, and a new knob is a visible diff."""

from pathlib import Path

import pytest

from megatrain.config.keys import knobs
from megatrain.config.load import load
from megatrain.config.reference import reference
from megatrain.config.validate import validate

ROOT = Path(__file__).parents[2]


def test_the_committed_page_is_the_generated_one():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference(), "run `python -m megatrain.config.reference > docs/config.md`"


def test_the_list_of_keys_is_pinned():
    """Every key is promised to users. A new one belongs in keys.txt, in the order of the schema."""
    pinned = Path(__file__).with_name("keys.txt").read_text(encoding="utf-8").split()
    assert [knob.key for knob in knobs()] == pinned


def test_every_knob_is_explained():
    page = reference().replace(r"\|", "<bar>")
    for knob in knobs():
        doc = knob.doc.replace("|", "<bar>")
        row = next(line for line in page.splitlines() if line.startswith(f"| `{knob.name}` |") and doc in line)
        assert doc.endswith((".", ")")) and row.count("|") == 5


def test_the_page_has_types_ranges_and_the_keys_of_a_corpus():
    rows = reference().splitlines()
    for row in (
        "| `num_layers` | integer: 1 to 65536 | `8` | Number of transformer blocks. |",
        "| `betas` | list [number, number]: each in [0, 1) | `[0.9, 0.95]` | Adam's moment decay rates. *Has an effect when",
        "| `lr` | number: above 0 | `0.0003` | Peak learning rate. |",
        "| `path` | text: a path |  | Prefix of the .bin/.idx pair. |",
        "| `weight` | number: above 0 | `1.0` | Share of the samples, relative to the other corpora of the list. |",
    ):
        assert any(line.startswith(row) for line in rows), row


def test_what_is_refused_today_is_marked():
    rows = {line.split("`")[1]: line for line in reference().splitlines() if line.startswith("| `")}
    assert "*Later: all but" in rows["context_parallel_size"] and "*Later: all but `tensorboard` (" in rows["to"]
    assert "Later" not in rows["num_layers"]


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "configs").glob("[!p]*.yaml")), ids=lambda path: path.name)
def test_the_examples_load_and_obey_the_rules(path):
    for size in (1, 2):
        overrides = ["data.train=PREFIX", "data.tokenizer=bytes", f"parallel.tensor_parallel_size={size}"]
        overrides.append(f"parallel.sequence_parallel={size > 1}")
        config = load(path, overrides).config
        validate(config, size * config.parallel.pipeline_parallel_size)
