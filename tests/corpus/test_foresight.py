"""What a config promises and lacks is said before anything is read, with its key."""

import pytest

from megatrain.config.source import ConfigError
from megatrain.corpus.conduct import load_config
from megatrain.corpus.judging import RulesByKind
from megatrain.corpus.reading.choices import SourceConfig
from megatrain.corpus.revision import paths_in
from megatrain.corpus.rules.rule_choices import FilterConfig
from megatrain.data.boundaries import TokenizerError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("read: {sources: [{name: web, paths: [raw/*]}]}\n")
    (tmp_path / "names").write_text("a\n")
    return tmp_path


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "read.sources=[{name: web, paths: [a], language: english}]",
            r"read\.sources\[0\]\.language='english' is no language's code",
        ),
        ("read.sources=[{name: web, paths: [a], language: EN}]", r"read\.sources\[0\]\.language='EN'"),
        ("language.keep=[en, Chinese]", r"language\.keep='Chinese'"),
        ("perplexity.models=[{language: zh_CN, path: names}]", r"perplexity\.models\[0\]\.language='zh_CN'"),
        (
            "read.sources=[{name: web, paths: [a], rules: [gophr]}]",
            r"read\.sources\[0\], web: there is no rule 'gophr'; the nearest",
        ),
        (
            "clean.words.lists=[names, none]",
            r"clean\.words\.lists: 'none' cannot be read \(No such file or directory; relative",
        ),
        ("clean.stop_words=.", r"clean\.stop_words: '\.' cannot be read \(Is a directory"),
        ("dedup.leaks.sets=[{name: a, files: [none]}]", r"dedup\.leaks\.sets\[0\]\.files: 'none' cannot be read"),
        ("perplexity.models=[{language: en, path: none}]", r"perplexity\.models\[0\]\.path: 'none' cannot be read"),
    ],
)
def test_what_a_config_names_is_there(here, override, said):
    with pytest.raises(ConfigError, match=said):
        load_config("c.yaml", [override], "read")


def test_files_of_changed_copies_and_tokenizers_are_looked_for_before_text_is_read(here):
    with pytest.raises(ConfigError, match=r"augment\.synonyms: 'none' cannot be read"):
        load_config("c.yaml", ["augment.copies=1", "augment.synonyms=none"])
    for name, said in (("none", "tokenizer none cannot be read"), ("names", "names is not a tokenizer.json")):
        with pytest.raises(TokenizerError, match=said):
            load_config("c.yaml", [f"tokenize.tokenizer={name}"])
        load_config("c.yaml", [f"tokenize.tokenizer={name}"], "dedup")  # which makes no tokens
    twice = "perplexity.models=[{language: en, path: names}, {language: en, path: names}]"
    with pytest.raises(ValueError, match="two models of language en"):
        load_config("c.yaml", [twice])


def test_paths_have_their_keys(here):
    told = load_config("c.yaml", ["perplexity.models=[{language: code, path: names}]", "clean.words.lists=[names]"], "dedup")
    assert list(paths_in(told.perplexity, "perplexity")) == [("perplexity.models[0].path", "names")]
    assert list(paths_in(told.clean, "clean")) == [("clean.words.lists", "names")]


@pytest.mark.parametrize(
    ("thresholds", "said"),
    [
        ({"fineweb2_zh.letters": 0.5}, r"a threshold for the rule fineweb2_zh\.letters, which is not asked for"),
        (
            {"gopher.words.least": 9.0, "gopher.words.most": 8.0},
            r"no document can meet gopher\.words\.least=9 and gopher\.words\.most=8",
        ),
        (
            {"gopher.mean_length.most": 2.0},
            r"no document can meet gopher\.mean_length\.least=3 and gopher\.mean_length\.most=2",
        ),
    ],
)
def test_thresholds_that_judge_nothing_or_refuse_all_are_no_thresholds(thresholds, said):
    with pytest.raises(ValueError, match=said):
        RulesByKind(SourceConfig(language="en", thresholds=tuple(thresholds.items())), FilterConfig())
    RulesByKind(SourceConfig(language="en", thresholds=(("gopher.words.most", 50.0), ("fineweb2_zh", False))), FilterConfig())
