"""Configs of other schemas than that of a run: lists of groups, and mappings of names, as the corpus pipeline has them."""

from dataclasses import dataclass, field

import pytest

from megatrain.config.keys import type_name, value_of_names
from megatrain.config.load import ConfigError, load_sections
from megatrain.corpus.reading.choices import ReadConfig, SourceConfig


@dataclass(frozen=True)
class Sections:
    read: ReadConfig = field(default_factory=ReadConfig)


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")

    def load_text(text, *overrides):
        (tmp_path / "c.yaml").write_text(text)
        return load_sections(Sections, "c.yaml", overrides)

    return load_text


def test_lists_of_groups_and_mappings_of_names(load):
    text = """
    read:
      unit_bytes: 1000
      sources:
      - name: web
        paths: [~/web/*.jsonl, b.txt]
        thresholds: {gopher.mean_length: 12, c4.brace: off, x: 1e-3}
      - {name: code, kind: code, rules: []}
    """
    web = SourceConfig(
        "web",
        ("/home/me/web/*.jsonl", "b.txt"),
        thresholds=(("gopher.mean_length", 12.0), ("c4.brace", False), ("x", 0.001)),
    )
    code = SourceConfig("code", kind="code", rules=())
    assert load(text).read == ReadConfig((web, code), unit_bytes=1000)
    assert load(text, "read.sources=[{name: a}]", "read.longest=9").read == ReadConfig(
        (SourceConfig("a"),), unit_bytes=1000, longest=9
    )
    assert load(text).read.source("code") == code


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{name: a}", " is a mapping; expected list of {name, paths, ...}."),
        ("[a]", "[0] is the text 'a', not a mapping. Write its keys as {name, paths, ...}."),
        ("[{nam: a}]", "[0].nam is an unknown key. Did you mean read.sources[0].name?"),
        ("[{name: 1}]", "[0].name is the integer 1; expected text. Put text in quotes."),
        ("[{key: 1}]", "[0].key is the integer 1; expected text. Put text in quotes."),
        ("[{paths: x}]", "[0].paths is the text 'x'; expected list of text. Write [x]."),
        ("[{name: a, weight: 0}]", "[0].weight=0.0 must be greater than 0. Use for example 1.0."),
        ("[{name: a, paths: [a, '']}]", "[0].paths=[a, ] must not be empty text. Use for example [raw/web/**/*.jsonl.zst]."),
        ("[{thresholds: {a: b}}]", "[0].thresholds.a is the text 'b'; expected number or true or false."),
        ("[{thresholds: {a: null}}]", "[0].thresholds.a is null; expected number or true or false."),
        ("[{thresholds: 5}]", "[0].thresholds is the integer 5; expected mapping of names to number or true or false."),
    ],
)
def test_errors_say_which(load, value, said):
    with pytest.raises(ConfigError) as error:
        load(f"read: {{sources: {value}}}")
    assert str(error.value) == f"c.yaml:1: read.sources{said}"


def test_types_in_words():
    assert type_name(tuple[tuple[str, float | None], ...]) == "mapping of names to number or null"
    assert [
        value_of_names(kind) for kind in (tuple[str, ...], tuple[tuple[int, int], ...], tuple[tuple[str, ...], ...], str)
    ] == [None] * 4
