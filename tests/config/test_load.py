"""YAML and overrides become a Config: exact types, known keys, errors that say where."""

import dataclasses
import os
import typing
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.config.keys import knobs
from megatrain.config.load import ConfigError, dump, from_dict, load, load_overrides
from megatrain.config.schema import Config, CorpusConfig, DataConfig, ModelConfig, WeightsConfig


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a config; messages then show it as `c.yaml`."""
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "c.yaml"

    return write


def message(path, *overrides):
    """The one-line message of the ConfigError that loading raises."""
    with pytest.raises(ConfigError) as raised:
        load(path, overrides)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_values_and_origins(write):
    path = write("# a run\nmodel:\n  num_layers: 4\n\n  dropout: 0\noptim: {lr: 1e-4}\n")
    loaded = load(path, ["train.steps=7", "optim.lr=5e-4"])
    assert loaded.config.model.num_layers == 4
    assert loaded.config.model.dropout == 0.0 and isinstance(loaded.config.model.dropout, float)
    assert loaded.config.optim.lr == 5e-4
    assert loaded.config.train.steps == 7
    assert loaded.config.train.seed == Config().train.seed
    assert loaded.origins["model.num_layers"] == "c.yaml:3"
    assert loaded.origins["model.dropout"] == "c.yaml:5"
    assert loaded.origins["optim.lr"] == loaded.origins["train.steps"] == "command line"
    assert loaded.origins["train.seed"] == "default"
    assert list(loaded.origins) == [knob.key for knob in knobs()]


@pytest.mark.parametrize(
    "value, corpora",
    [
        ("PREFIX", [("PREFIX", 1.0)]),
        ("[a, b]", [("a", 1.0), ("b", 1.0)]),
        ("[{path: a, weight: 2}, b, {path: c}]", [("a", 2.0), ("b", 1.0), ("c", 1.0)]),
        ("[]", []),
    ],
)
def test_corpora(write, value, corpora):
    expected = tuple(CorpusConfig(*corpus) for corpus in corpora)
    assert load(write(f"data:\n  train: {value}\n")).config.data.train == expected
    assert load(write("data:\n  train: [x, y]\n"), [f"data.train={value}"]).config.data.train == expected


def test_a_section_whose_keys_are_commented_out_has_its_defaults(write):
    assert load(write("model:\n  # num_layers: 3\nlog:\n  dir: x\n")).config.model == ModelConfig()
    assert load(write("model:\n"), ["model.num_layers=3"]).config.model.num_layers == 3


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "+2.5E3", 2500.0),
        ("optim.lr", "3", 3.0),
        ("optim.betas", "[0, 1e-3]", (0.0, 1e-3)),
        ("train.steps", "1_000", 1000),
        ("model.vocab_size", "null", None),
        ("model.vocab_size", "", None),
        ("model.position", "none", "none"),
        ("log.dir", "2026-01-31", "2026-01-31"),
        ("log.dir", "a=b", "a=b"),
        ("log.to", "[]", ()),
        ("data.tokenizer", '"0123"', "0123"),
    ],
)
def test_override_values(write, key, text, value):
    section, name = key.split(".")
    read = getattr(getattr(load(write("log: {dir: x}"), [f"{key}={text}"]).config, section), name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "yaml, parts",
    [
        ("model:\n  num_layer: 3", ["c.yaml:2: model.num_layer is an unknown key", "Did you mean model.num_layers?"]),
        ("model:\n  num_heads: 3", ["Did you mean model.num_attention_heads?"]),
        ("model:\n  qqq: 3", ["c.yaml:2: model.qqq is an unknown key. Known keys of model: family,"]),
        ("model:\n\n  lr: 3", ["c.yaml:3: model.lr is an unknown key", "Did you mean optim.lr?"]),
        ("modle:\n  num_layers: 3", ["c.yaml:1: modle is an unknown section. Did you mean model?"]),
        ("model:\nnum_layers: 3", ["c.yaml:2: num_layers is an unknown section", "as model.num_layers"]),
        ("zzz: 3", ["c.yaml:1: zzz is an unknown section. Sections: model, parallel, data,"]),
        ("1: 3", ["c.yaml:1: 1 is an unknown section"]),
        ("model: {<<: {num_layers: 3}}", ["c.yaml:1: model.<< is an unknown key"]),
        (
            "model:\n  num_layers: 3\n  bias: true\n  num_layers: 4",
            ["c.yaml:4: model.num_layers is given twice, first at c.yaml:2"],
        ),
        ("model: {}\nlog: {}\nmodel: {}", ["c.yaml:3: model is given twice, first at c.yaml:1"]),
        ("model: 3", ["c.yaml:1: model is the integer 3, not a mapping", "indented below `model:`"]),
        ("model: {num_layers: '8'}", ["model.num_layers is the text '8'; expected integer. Write 8 without quotes."]),
        ("model: {num_layers: 8.0}", ["model.num_layers is the number 8.0; expected integer. Write 8."]),
        ("model: {num_layers: true}", ["model.num_layers is the truth value true; expected integer. Use for example 8."]),
        ("model: {num_layers: null}", ["model.num_layers is null; expected integer. Use for example 8."]),
        ("model: {num_layers: [1]}", ["model.num_layers is a list; expected integer."]),
        ("model: {num_layers: {a: 1}}", ["model.num_layers is a mapping; expected integer."]),
        ("model: {vocab_size: 5.5}", ["model.vocab_size is the number 5.5; expected integer or null."]),
        ("model: {dropout: a}", ["model.dropout is the text 'a'; expected number."]),
        ("model: {dropout: '0.5'}", ["model.dropout is the text '0.5'; expected number. Write 0.5 without quotes."]),
        ("model: {dropout: false}", ["model.dropout is the truth value false; expected number."]),
        ("model: {dropout: .nan}", ["model.dropout is nan; expected a finite number. Use for example 0.0."]),
        ("model: {dropout: -.inf}", ["model.dropout is -inf; expected a finite number"]),
        ("model: {dropout: 1e999}", ["expected a finite number"]),
        ("model: {bias: 1}", ["model.bias is the integer 1; expected true or false."]),
        ("log: {dir: 5}", ["log.dir is the integer 5; expected text. Put text in quotes."]),
        ("checkpoint: {resume: no}", ["checkpoint.resume is the truth value false; expected text. Put text in quotes."]),
        ("model: {norm: rms}", ["model.norm is the text 'rms'; expected one of layernorm, rmsnorm. Did you mean rmsnorm?"]),
        ("parallel: {zero_stage: 4}", ["parallel.zero_stage is the integer 4; expected one of 0, 1, 2, 3."]),
        ("parallel: {zero_stage: true}", ["parallel.zero_stage is the truth value true; expected one of 0, 1, 2, 3."]),
        ("parallel: {zero_stage: 1.0}", ["parallel.zero_stage is the number 1.0; expected one of"]),
        ("optim: {betas: [0.9]}", ["optim.betas has 1 values, expected 2"]),
        (
            "optim:\n  betas:\n  - 0.9\n  - x",
            ["c.yaml:4: optim.betas[1] is the text 'x'; expected number. Use for example 0.95."],
        ),
        (
            "optim: {betas: 0.9}",
            ["optim.betas is the number 0.9; expected list [number, number]. Use for example [0.9, 0.95]."],
        ),
        (
            "log: {to: tensorboard}",
            ["log.to is the text 'tensorboard'; expected list of any of tensorboard, wandb, mlflow. Write [tensorboard]."],
        ),
        ("data: {train: 3}", ["data.train is the integer 3; expected list of {path, weight}."]),
        ("train: {skip_steps: true}", ["train.skip_steps is the truth value true; expected list of integer."]),
        ("train: {skip_steps: 7}", ["train.skip_steps is the integer 7; expected list of integer. Write [7]."]),
        (
            "train: {batch_ramp: [4, 4]}",
            ["train.batch_ramp has 2 values, expected 3: list [integer, integer, integer] or null."],
        ),
        ("data: {train: {path: a}}", ["data.train is a mapping; expected a list"]),
        ("data: {train: {a: [b]}}", ["data.train is a mapping", "expected a list of {path, weight}"]),
        ("data: {valid: {a: 3}}", ["data.valid.a is the integer 3", "expected list of {path, weight}"]),
        ("data: {valid: {'': [b]}}", ["data.valid names a validation set with empty text"]),
        (
            "data:\n  train:\n  - a\n  - wieght: 2\n    path: a",
            ["c.yaml:4: data.train[1].wieght is an unknown key", "data.train[1].weight?"],
        ),
        ("data: {train: [{weight: 2}]}", ["data.train[0] has no path. Write {path: PREFIX, weight: 1.0}."]),
        ("data: {train: [[a]]}", ["data.train[0] is a list; expected a path or {path, weight}."]),
        ("data: {train: [{path: a, path: b}]}", ["data.train[0].path is given twice"]),
        ("data: {train: [{path: 1}]}", ["data.train[0].path is the integer 1; expected text."]),
    ],
)
def test_wrong_values(write, yaml, parts):
    said = message(write(yaml))
    assert said.startswith("c.yaml:")
    for part in parts:
        assert part in said, said


@pytest.mark.parametrize("number", ["010", "0x10", "0b11", "1:30", "1:30.5", "1" * 5000])
def test_numbers_that_yaml_reads_in_surprising_ways(write, number):
    assert "not a plain decimal number" in message(write(f"train:\n  steps: {number}"))


@pytest.mark.parametrize(
    "data, parts",
    [
        ("", ["c.yaml is empty"]),
        ("# only a comment\n---\n", ["c.yaml is empty"]),
        ("just words", ["c.yaml:1: the config is the text 'just words', not a mapping", "sections model,"]),
        ("- a\n- b", ["c.yaml:1: the config is a list, not a mapping"]),
        ("a: b: c", ["c.yaml:1: this is not YAML: mapping values are not allowed here"]),
        ("model: {num_layers: 3", ["c.yaml:1: this is not YAML"]),
        ("model:\n\tnum_layers: 3", ["c.yaml:2: this is not YAML"]),
        ("def f():\n    return {'a': [1, 2\n", ["c.yaml:", "this is not YAML"]),
        ("log: {}\n---\nlog: {}", ["c.yaml:2: this is not YAML: but found another document"]),
        ("? [a, b]\n: 3", ["c.yaml:1: a list or mapping cannot be a key"]),
        (b"log: {dir: \x01}", ["c.yaml: this is not YAML: special characters are not allowed"]),
        (b"\x80\x02}q\x00.", ["c.yaml is not text: byte 0 is not UTF-8"]),
        (b"PK\x03\x04\x00\x00", ["c.yaml is a binary file"]),
        (b"a: 1\n" * 100_000, ["c.yaml has more than 262144 bytes: this is not a config"]),
        ("model: !!python/object/apply:os.system ['echo']", ["c.yaml:1: a YAML tag (!) is not accepted"]),
        ("log: {dir: !!str 5}", ["c.yaml:1: a YAML tag (!) is not accepted"]),
        ("log: &l {dir: x}", ["c.yaml:1: a YAML anchor (&) is not accepted"]),
        ("log:\n  dir: *l", ["c.yaml:2: a YAML alias (*) is not accepted"]),
        ("log: {to: " + "[" * 50_000, ["c.yaml:1: nested more than 16 levels deep"]),
        ("\n".join(" " * n + "a:" for n in range(500)), ["c.yaml:17: nested more than 16 levels deep"]),
    ],
)
def test_files_that_are_no_config(write, data, parts):
    said = message(write(data))
    for part in parts:
        assert part in said, said


def test_a_byte_order_mark_is_no_part_of_the_config(write):
    assert load(write(b"\xef\xbb\xbflog: {dir: x}")).config.log.dir == "x"


def test_missing_file_directory_and_unreadable_file(write, tmp_path):
    assert f"gpt.yaml: no such file (relative paths start at {tmp_path})" in message("gpt.yaml")
    assert f"{tmp_path} is a directory" in message(tmp_path)
    assert "cannot be read" in message("a\0b")
    assert "cannot be read: Not a directory" in message(f"{write('log: {}')}/gpt.yaml")


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["model.num_layers"], ["'model.num_layers' has no `=`", "section.key=value"]),
        (["model={}"], ["'model={}': model is a whole section", "model.key=value"]),
        (["=3"], ["'=3': '' is an unknown section"]),
        (["num_layers=3"], ["'num_layers' is an unknown section", "as model.num_layers"]),
        (["modle.num_layers=3"], ["'modle' is an unknown section. Did you mean model?"]),
        (["data.train.0.path=x"], ["data.train.0.path goes deeper than a key", "data.train=value"]),
        (["model.num_layer=3"], ["model.num_layer is an unknown key. Did you mean model.num_layers?"]),
        (["optim.lr=1", "log.dir=x", "optim.lr=2"], ["optim.lr is given twice, as 'optim.lr=1' and 'optim.lr=2'"]),
        (["model.num_layers=x"], ["model.num_layers is the text 'x'; expected integer."]),
        (["data.train=[a, 3]"], ["'data.train=[a, 3]': data.train[1] is the integer 3"]),
        (["data.train=[a"], ["'data.train=[a': this is not YAML"]),
        (["data.train=*"], ["'data.train=*': this is not YAML"]),
        (["data.train=*a"], ["'data.train=*a': a YAML alias (*) is not accepted"]),
        (["log.dir=\udc80"], ["this is not YAML"]),
    ],
)
def test_wrong_overrides(write, overrides, parts):
    said = message(write("model: {bias: false}"), *overrides)
    assert said.startswith("command line: ")
    for part in parts:
        assert part in said, said


def test_an_override_replaces_the_value_and_its_faults(write):
    path = write("data:\n  train:\n  - {path: a, weight: x}\n  - b\n")
    loaded = load(path, ["data.train=c"])
    assert loaded.config.data.train == (CorpusConfig("c"),)
    assert message(path, "data.train=[c, d, {weight: 1}]").startswith("command line: ")


def test_from_dict_checks_trees_and_configs():
    assert from_dict({}) == Config()
    assert from_dict({"model": {"num_layers": 3}, "data": {"train": ["a"]}, "optim": {"betas": (0, 0.5)}}) == Config(
        model=ModelConfig(num_layers=3),
        data=DataConfig(train=(CorpusConfig("a"),)),
        optim=dataclasses.replace(Config().optim, betas=(0.0, 0.5)),
    )
    config = Config(data=DataConfig(train=(CorpusConfig("a", 2.0),)))
    assert from_dict(config) == config
    with pytest.raises(ConfigError, match=r"^model\.num_layer is an unknown key. Did you mean model\.num_layers"):
        from_dict({"model": {"num_layer": 3}})
    with pytest.raises(ConfigError, match=r"^model\.num_layers is the text '8'"):
        from_dict(Config(model=ModelConfig(num_layers="8")))
    with pytest.raises(ConfigError, match="the config is null, not a mapping"):
        from_dict(None)
    with pytest.raises(ConfigError, match=r"log\.dir is a Python PurePosixPath; expected text"):
        from_dict({"log": {"dir": PurePosixPath("x")}})


def test_from_dict_leaves_its_argument_alone():
    tree = {"model": {"num_layers": 3}, "log": None}
    from_dict(tree)
    assert tree == {"model": {"num_layers": 3}, "log": None}


def test_dump_says_origins(write):
    loaded = load(write("model:\n  num_layers: 4\n"), ["data.train=a b"])
    lines = dump(loaded.config, loaded.origins).splitlines()
    assert "  num_layers: 4  # c.yaml:2" in lines
    assert '  train: [{path: "a b", weight: 1.0}]  # command line' in lines
    assert "  seed: 1234  # default" in lines
    by_hand = dump(Config(model=ModelConfig(num_layers=3))).splitlines()
    assert "  num_layers: 3  # python" in by_hand and "  hidden_size: 512  # default" in by_hand


@pytest.mark.skipif(os.name == "nt", reason="file names without line breaks")
def test_a_tilde_is_the_home_directory_and_is_saved_as_it_was_written(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    path = write(
        "data: {train: [~/a, {path: ~/b, weight: 2, answers: ~/c}, ./~d], valid: {web: ~/v}, tokenizer: ~/t.json, cache_dir: '~'}\n"
        "model: {init_from: ~/hf}\n"
        "train: {exit_file: ~/stop}\n"
        "checkpoint: {dir: ~/run/checkpoints}\n"
    )
    read = []
    loaded = load(path, ["log.dir=~/run", "checkpoint.resume=~/old/step_1"], lambda path: read.append(path) or {})
    config = loaded.config
    assert read == ["/home/ann/hf"] and config.model.init_from == "/home/ann/hf"
    train = (CorpusConfig("/home/ann/a"), CorpusConfig("/home/ann/b", 2.0, "/home/ann/c"), CorpusConfig("./~d"))
    assert config.data.train == train and config.data.valid == (CorpusConfig("/home/ann/v", set="web"),)
    assert (config.data.tokenizer, config.data.cache_dir, config.log.dir) == ("/home/ann/t.json", "/home/ann", "/home/ann/run")
    assert config.train.exit_file == "/home/ann/stop" and config.checkpoint_dir == "/home/ann/run/checkpoints"
    assert config.checkpoint.resume == "/home/ann/old/step_1"
    lines = loaded.text.splitlines()
    assert '  dir: "~/run"  # command line' in lines and '  tokenizer: "~/t.json"  # c.yaml:1' in lines
    assert "/home/ann" not in loaded.text
    monkeypatch.setenv("HOME", "/home/bob")
    assert load(write(loaded.text)).config.log.dir == "/home/bob/run"
    assert load_overrides(Config(), ["data.valid=~/v"]).data.valid == (CorpusConfig("/home/bob/v"),)


def test_every_knob_whose_words_say_that_it_is_a_path_is_one():
    paths = {knob.key for knob in knobs() if knob.range.path}
    named = ["model.init_from", "data.tokenizer", "data.cache_dir", "train.exit_file", "checkpoint.dir", "checkpoint.resume"]
    assert paths == {*named, "log.dir"}


def test_a_preset_for_a_config_that_has_every_key_is_refused(tmp_path):
    whole = tmp_path / "config.yaml"
    whole.write_text(dump(from_dict({"model": {"preset": "gpt2_124m"}}), {}))
    assert load(whole).config.model.preset == "gpt2_124m"
    with pytest.raises(ConfigError, match=r"model.preset llama3_8b has no effect: the file gives each of its keys itself"):
        load(whole, ["model.preset=llama3_8b"])
    part = tmp_path / "part.yaml"
    part.write_text("model: {num_layers: 3}\n")
    assert load(part, ["model.preset=llama3_8b"]).config.model.hidden_size == 4096


def test_dump_survives_a_file_name_with_a_line_break(tmp_path):
    path = tmp_path / "a\nmodel: {num_layers: 99}\n.yaml"
    path.write_text("model: {num_layers: 4}")
    loaded = load(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump(loaded.config, loaded.origins))
    assert load(again).config == loaded.config


def values(kind):
    """Any value of a field's type, in the plain form of YAML."""
    parts = typing.get_args(kind)
    if kind is CorpusConfig:
        return st.text() | st.fixed_dictionaries(
            {"path": st.text()}, optional={"weight": values(float), "set": st.text(), "name": st.text(), "old": st.booleans()}
        )
    if kind is WeightsConfig:
        weights = st.dictionaries(st.text(), values(float), max_size=3)
        return st.fixed_dictionaries({}, optional={"from_step": values(int), "weights": weights})
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(parts)
    if typing.get_origin(kind) is tuple:
        return st.lists(values(parts[0]), max_size=3) if parts[-1] is ... else st.tuples(*map(values, parts)).map(list)
    if parts:
        return st.none() | values(parts[0])
    return {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63),
        float: st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53),
        str: st.text()
        | st.sampled_from(["on", "NO", "null", "~", "1e-4", "0x10", "1:30", "2026-01-31", "<<", "=", "- a", "a: b", "#"]),
    }[kind]


trees = st.fixed_dictionaries(
    {
        section: st.fixed_dictionaries(
            {},
            optional={
                knob.name: values(knob.kind)
                for knob in knobs()
                if knob.section == section
                and len(knob.path) == 2
                and knob.key not in ("model.preset", "model.family")  # explicit keys win, so an override of it changes nothing
            },
        )
        for section in [item.name for item in dataclasses.fields(Config)]
    }
)


def test_named_validation_sets():
    named = from_dict({"data": {"valid": {"web": ["a", {"path": "b", "weight": 2.0}], "code": "c"}}}).data.valid
    assert [(corpus.set, corpus.path, corpus.weight) for corpus in named] == [
        ("web", "a", 1.0),
        ("web", "b", 2.0),
        ("code", "c", 1.0),
    ]


@settings(max_examples=40, deadline=None)
@given(tree=trees, others=trees)
def test_dump_then_load_gives_an_equal_config(tmp_path_factory, tree, others):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    config = from_dict(tree)
    path.write_text(dump(config), encoding="utf-8")
    assert load(path).config == config

    rendered = {
        knob.key: line.partition(": ")[2].rpartition("  #")[0] for knob, line in zip(knobs(), body(others), strict=True)
    }
    overrides = [f"{section}.{name}={rendered[f'{section}.{name}']}" for section in others for name in others[section]]
    loaded = load(path, overrides)
    assert loaded.config == from_dict({section: tree[section] | others[section] for section in tree})
    path.write_text(dump(loaded.config, loaded.origins), encoding="utf-8")
    assert load(path).config == loaded.config


def body(tree):
    """The lines of a dump that hold a knob."""
    return [line for line in dump(from_dict(tree)).splitlines() if line.startswith("  ") and "#" in line]
