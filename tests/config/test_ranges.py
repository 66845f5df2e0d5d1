"""Every knob refuses every kind of a bad value, with the key, the value, its range and a value that works."""

import ast
import math
import re
import time
import types
import typing
from pathlib import Path
from typing import Literal

import pytest
import yaml

from megatrain.config import validate
from megatrain.config.keys import knobs
from megatrain.config.knob import LARGEST_INTEGER, LARGEST_NUMBER, Range
from megatrain.config.load import from_dict
from megatrain.config.schema import Config, CorpusConfig, OptimConfig, WeightsConfig
from megatrain.config.source import ConfigError
from megatrain.config.validate import require_values


def refusal(key, value):
    """What is said of the default config with one other value; "" where it is taken."""
    tree = value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    try:
        require_values(from_dict(tree))
    except ConfigError as error:
        return str(error)
    return ""


def members(kind):
    """The types of a union, or the type."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def just_outside(within, kind):
    """The numbers next to a range, on either side, that are not in it."""
    unit = 1 if kind is int else 1e-3
    low = within.above if within.above is not None else within.at_least - unit
    if within.below is not None:
        return [low, within.below]
    most = within.at_most if within.at_most is not None else LARGEST_INTEGER if kind is int else LARGEST_NUMBER
    return [low, most + 1 if kind is int else most * 1.001]


def bad_scalars(kind, within):
    """Values that a scalar of type `kind` does not take: of other types, and out of range."""
    if typing.get_origin(kind) is Literal:
        return ["no such choice", "", 99, -1, 0.5, math.nan, [], {}, True]
    if kind is bool:
        return [0, 1, "yes", 0.5, math.nan, [], {}]
    if kind is str:
        empty = [""] if within.not_empty or within.path else []
        return [True, 3, 0.5, math.nan, [], {}, *empty, *(["~no_such_user/x", "a\0b", "\ud800"] if within.path else [])]
    odd = [True, False, "many", "3", "", math.nan, math.inf, -math.inf, [], {}, *just_outside(within, kind)]
    return [*odd, -(10**23), 10**400] if kind is float else [*odd, 0.5, 10**23, -(10**23)]


def bad_values(kind, within):
    """Values that a knob does not take."""
    first, *others = members(kind)
    if others:  # null, or text beside a number
        bad = [value for value in bad_values(first, within) if type(value) not in others]
        return bad + ([""] if str in others and within.not_empty else [])
    if typing.get_origin(kind) is not tuple:
        return [None, *bad_scalars(kind, within)]
    items = typing.get_args(kind)
    elements = {
        CorpusConfig: [3, {}, {"path": "a", "weight": True}],
        WeightsConfig: [
            3,
            {"from_step": 0.5},
            {"from_share": 1},
            {"weights": 3},
            {"weights": {"a": -1}},
            {"weights": {"a": None}},
        ],
    }
    parts = elements[items[0]] if items[0] in elements else bad_scalars(items[0], within)
    lists = [[part] if items[-1] is Ellipsis else [part, *[0.5] * (len(items) - 1)] for part in parts]
    lengths = [] if items[-1] is Ellipsis else [[], [1] * (len(items) + 1)]
    return [None, 3, 0.5, True, math.nan, "", {"a": 3}, *lists, *lengths]


@pytest.mark.parametrize("knob", list(knobs()), ids=lambda knob: knob.key)
def test_every_kind_of_a_bad_value_is_refused_with_what_would_work(knob):
    for value in bad_values(knob.kind, knob.range):
        said = refusal(knob.key, value)
        assert said.startswith(knob.key) and "\n" not in said, (value, said)
        advised = re.search(rf"^{re.escape(knob.key)}(?: |=).* Use for example (.*)\.$", said)
        assert advised or re.search(r"expected |Write |Did you mean|Use for example ", said), (value, said)
        if advised:
            assert refusal(knob.key, yaml_value(advised[1], knob.kind)) == "", (value, said)


def yaml_value(text, kind):
    """A value as an error writes it, as a config takes it."""
    value = yaml.safe_load(text)
    return float(value) if kind is float else value


def test_numbers_at_the_ends_of_their_ranges_are_taken():
    for knob in knobs():
        for kind in {int, float} & set(members(knob.kind)):
            within, unit = knob.range, 1 if kind is int else 1e-3
            low = within.at_least if within.at_least is not None else within.above + unit
            high = within.below - unit if within.below is not None else within.at_most
            high = (LARGEST_INTEGER if kind is int else LARGEST_NUMBER) if high is None else high
            of_this_release = knob.deferred is None
            for value in (low, high) if of_this_release else (low,):
                assert refusal(knob.key, value) == "", (knob.key, value)


def test_every_number_has_a_lower_bound_and_every_text_says_whether_it_may_be_empty():
    may_be_empty = {"model.preset"}  # refused by name
    for knob in knobs():
        kinds = members(knob.kind) + typing.get_args(next(iter(members(knob.kind))))
        if {int, float} & set(kinds):
            assert (knob.range.at_least is None) != (knob.range.above is None), knob.key
        assert (knob.range.not_empty or knob.range.path) == (str in kinds) or knob.key in may_be_empty, knob.key


@pytest.mark.parametrize(
    ("key", "bad", "rule"),
    [
        ("optim.lr", 0, "optim.lr=0.0 must be greater than 0. Use for example 0.0003."),
        ("optim.lr", -1, "optim.lr=-1.0 must be greater than 0. Use for example 0.0003."),
        ("optim.weight_decay", -0.1, "optim.weight_decay=-0.1 must be 0 or more. Use for example 0.1."),
        ("optim.betas", [0.9, 1.0], "optim.betas=[0.9, 1.0] must lie in [0, 1). Use for example [0.9, 0.95]."),
        ("model.dropout", 1, "model.dropout=1.0 must lie in [0, 1). Use for example 0.0."),
        ("optim.decay_fraction", 1.5, "optim.decay_fraction=1.5 must be at most 1. Use for example 0.1."),
        ("train.seed", 1 << 63, f"train.seed={1 << 63} must be at most {(1 << 63) - 1}. Use for example 1234."),
        ("model.rope_factor", 0.5, "model.rope_factor=0.5 must be 1 or more. Use for example 1.0."),
        ("log.dir", "", "log.dir='' must not be empty text. Use for example runs/demo."),
        ("data.glm.blank.mask_ratio", 0, "data.glm.blank.mask_ratio=0.0 must lie in (0, 1). Use for example 0.15."),
        ("data.glm.short_seq_prob", 1.1, "data.glm.short_seq_prob=1.1 must be at most 1. Use for example 0.0."),
        ("train.skip_steps", [3, 0], "train.skip_steps=[3, 0] must be greater than 0. Use for example []."),
        ("train.batch_ramp", [4, 0, 8], "train.batch_ramp=[4, 0, 8] must be greater than 0. Use for example null."),
        ("model.head_dim", 0, "model.head_dim=0 must be greater than 0. Use for example null."),
        ("model.rope_theta", 1, "model.rope_theta=1.0 must be greater than 1. Use for example 10000.0."),
        ("model.window", 1 << 31, "model.window=2147483648 must be at most 2147483647. Use for example null."),
        ("parallel.context_parallel_size", 0, "parallel.context_parallel_size=0 must be greater than 0. Use for example 1."),
        ("data.eod", -1, "data.eod=-1 must be 0 or more. Use for example null."),
        ("data.eod", "", "data.eod='' must not be empty text. Use for example null."),
        (
            "log.dir",
            "~no_such_user/x",
            "log.dir='~no_such_user/x' must not begin with ~ and the name of no user. Use for example runs/demo.",
        ),
        ("data.tokenizer", "", "data.tokenizer='' must not be empty text. Use for example bytes."),
        ("data.train", [""], "data.train[0].path='' must not be empty text. Use for example data/train."),
        (
            "data.train",
            [{"path": "a", "answers": ""}],
            "data.train[0].answers='' must not be empty text. Use for example null.",
        ),
        (
            "data.valid",
            {"web": ["a", {"path": "b", "weight": -1}]},
            "data.valid[1].weight=-1.0 must be greater than 0. Use for example 1.0.",
        ),
        ("train.loss_scale", math.nan, "train.loss_scale is nan; expected a finite number. Use for example 65536.0."),
        ("train.seed", True, "train.seed is the truth value true; expected integer. Use for example 1234."),
        ("train.tokens", "2e9 tokens", "train.tokens is the text '2e9 tokens'; expected number or null."),
        ("checkpoint.keep", 2.5, "checkpoint.keep is the number 2.5; expected integer. Use for example 3."),
    ],
)
def test_what_is_said(key, bad, rule):
    assert refusal(key, bad) == rule


@pytest.mark.parametrize(
    ("key", "bad", "bound"),
    [
        ("model.hidden_size", 1 << 31, "16777216"),
        ("model.num_layers", 10**23, "65536"),
        ("model.seq_length", 1 << 31, "16777216"),
        ("model.vocab_size", 10**23, "16777216"),
        ("model.window", 1 << 31, "2147483647"),
        ("parallel.pipeline_parallel_size", (1 << 31) - 1, "16777216"),
        ("parallel.tensor_parallel_size", 10**23, "16777216"),
        ("train.global_batch_size", 10**23 + 1, "16777216"),
        ("train.steps", 1 << 31, "2147483647"),
        ("train.tokens", 1e23, "1e+18"),
        ("train.batch_ramp", [4, 4, 10**23], "2147483647"),
        ("train.hang_timeout_seconds", 1e10, "1000000.0"),
        ("data.glm.blank.max_span", 1 << 31, "65536"),
    ],
)
def test_what_is_far_too_large_is_refused_at_once(key, bad, bound):
    began = time.perf_counter()
    said = refusal(key, bad)
    assert time.perf_counter() - began < 1
    assert re.match(rf"{re.escape(key)}=.* must be at most {re.escape(bound)}\. Use for example ", said), said


def test_a_config_made_in_python_is_held_to_the_same_ranges():
    for bad, rule in ((math.nan, "greater than 0"), (math.inf, "at most 1000000000000000.0"), (-1.0, "greater than 0")):
        with pytest.raises(ConfigError) as raised:
            require_values(Config(optim=OptimConfig(lr=bad)))
        assert str(raised.value) == f"optim.lr={bad} must be {rule}. Use for example 0.0003."


@pytest.mark.parametrize(
    ("within", "whole", "words"),
    [
        (Range(), True, ""),
        (Range(), False, ""),
        (Range(above=0), True, "1 or more"),
        (Range(above=0), False, "above 0"),
        (Range(at_least=0), True, "0 or more"),
        (Range(at_least=0), False, "0 or more"),
        (Range(above=0, at_most=1 << 16), True, "1 to 65536"),
        (Range(above=0, at_most=1 << 16), False, "in (0, 65536]"),
        (Range(at_least=0, below=1), False, "in [0, 1)"),
        (Range(above=0, below=1), False, "in (0, 1)"),
        (Range(at_least=0, at_most=1), False, "in [0, 1]"),
        (Range(above=0, at_most=1e18), False, "in (0, 1e+18]"),
        (Range(not_empty=True), True, "not empty"),
        (Range(at_least=0, not_empty=True), True, "0 or more, not empty"),
        (Range(path=True), True, "a path"),
    ],
)
def test_a_range_in_words(within, whole, words):
    assert within.words(whole) == words


def test_validate_has_rules_between_knobs_alone():
    """A function of validate.py that refuses reads two knobs or more: the range of a single one stands beside it."""
    names = {field for knob in knobs() for field in knob.path[1:]}
    derived = {"query_groups", "positions", "head_size", "rotated", "ffn_size", "has_answers", "checkpoint_dir"}
    refusing = {}
    for node in ast.walk(ast.parse(Path(validate.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and any(isinstance(part, ast.Raise) for part in ast.walk(node)):
            read = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
            refusing[node.name] = read & (names | derived)
    assert len(refusing) > 10
    whole = {"require_values", "require_effects", "_require_multiple"}  # over all knobs; over numbers that were read before
    assert {name: read for name, read in refusing.items() if len(read) < 2 and name not in whole} == {}
