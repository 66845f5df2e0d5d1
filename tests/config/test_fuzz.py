"""Random values for random keys: each is refused at once, in one line with advice that helps, or loads again and trains a step."""

import math
import re
import time
import typing
from dataclasses import replace
from typing import Literal

import fuzzing
import pytest
import yaml

from megatrain.assembly import assemble, require_schedule
from megatrain.config.keys import Knob, is_optional, knobs
from megatrain.config.load import dump, from_dict, restored
from megatrain.config.presets import PRESETS
from megatrain.config.schema import Config, CorpusConfig, WeightsConfig
from megatrain.config.source import ConfigError
from megatrain.config.validate import require_effects, validate, validate_layout, validate_step
from megatrain.data.loader import Loader
from megatrain.parallel.mesh import ParallelContext
from megatrain.program import vocabulary
from megatrain.testing.trace import random_source
from megatrain.training import train_step

AT_ONCE = 1.0
"""Seconds of a refusal, on a busy machine."""
TINY = {
    "model": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 64, "vocab_size": 400},
    "data": {"train": "PREFIX", "tokenizer": "bytes"},
    "train": {"steps": 4, "global_batch_size": 12, "micro_batch_size": 1, "precision": "fp32"},
}
INTEGERS = (-1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 40, 64, 100, 1000, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, 1 << 63, 10**23)
NUMBERS = (
    -1.0,
    0.0,
    1e-300,
    1e-8,
    0.1,
    0.25,
    0.5,
    0.999,
    1.0,
    1.5,
    2.0,
    4.0,
    100.0,
    1e4,
    1e15,
    1e23,
    1e300,
    math.inf,
    math.nan,
)
TEXTS = ("", "auto", "never", "bytes", "somewhere", "\u00e9: #")
KNOBS = [knob for knob in knobs() if knob.key not in ("model.init_from", "data.tokenizer", "data.eod", "data.bos")]
"""Without those that say which files there are."""


def value_of(kind, draw):
    """Of a knob's type, mostly within reason."""
    if is_optional(kind):
        return None if draw.random() < 0.1 else value_of(typing.get_args(kind)[0], draw)
    if typing.get_origin(kind) is Literal:
        return draw.choice(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        items = (items[0],) * draw.randrange(4) if items[-1] is Ellipsis else items
        return [value_of(item, draw) for item in items]
    if kind is CorpusConfig:
        return {"path": draw.choice(TEXTS), "weight": draw.choice(NUMBERS)}
    if kind is WeightsConfig:
        return {"from_step": draw.choice(INTEGERS), "weights": {draw.choice(TEXTS): draw.choice(NUMBERS)}}
    if kind is str:
        return draw.choice(TEXTS)
    if kind is bool:
        return draw.random() < 0.5
    values = INTEGERS if kind is int else NUMBERS
    return draw.choice(values[2:9] if draw.random() < 0.6 else values)


def put(tree, knob: Knob, value):
    """A tree with one more value."""
    section, *groups, name = knob.path
    root = {**tree, section: dict(tree.get(section, {}))}
    inner = root[section]
    for group in groups:
        inner[group] = dict(inner.get(group, {}))
        inner = inner[group]
    inner[name] = value
    return root


def drawn(draw):
    """(a tree, how many processes) with a few random values, now and then those of a preset or of GLM."""
    tree = TINY
    if draw.random() < 0.15:
        tree = put(tree, next(knob for knob in KNOBS if knob.key == "model.preset"), draw.choice(sorted(PRESETS)))
    if draw.random() < 0.3:
        tree = {**tree, "data": {**tree["data"], "objective": "glm"}, "model": {**tree["model"], "family": "glm"}}
    for knob in draw.sample(KNOBS, draw.choice((1, 1, 2, 3, 5, 8))):
        tree = put(tree, knob, value_of(knob.kind, draw))
    return tree, draw.choice((1, 1, 1, 2, 4, 6))


def refusal(tree, world):
    """What is said of a tree; "" where it is taken."""
    began = time.perf_counter()
    try:
        config = from_dict(tree)
        validate(config, world)
        require_schedule(config)
    except ConfigError as error:
        assert time.perf_counter() - began < AT_ONCE, error
        said = str(error)
        assert said and "\n" not in said, said
        return said
    assert time.perf_counter() - began < AT_ONCE
    return ""


def advised(tree, said):
    """The tree with the first value that a refusal advises; None where it advises none that can be read."""
    by_key = {knob.key: knob for knob in knobs()}
    if idle := re.search(r"^([a-z_0-9.]+)=.* has no effect: .* or leave \1 out", said):
        return put(tree, by_key[idle[1]], by_key[idle[1]].default)
    example = re.search(r"^([a-z_.]+)=.* Use for example ([^ ]+)\.$", said)
    named = re.search(r" Use (?:for example )?([a-z_0-9]+\.[a-z_0-9.]+)=(\[[^\]]*\]|[^ ,]+?)(?:[,.]? |\.$|$)", said)
    found = example or named
    if found is None or found[1] not in by_key:
        return None
    value = yaml.safe_load(found[2].rstrip("."))
    return put(tree, by_key[found[1]], float(value) if by_key[found[1]].kind is float else value)


def small(config: Config) -> bool:
    """Whether a step of it takes a moment."""
    model, train, parallel = config.model, config.train, config.parallel
    sizes = (model.num_layers / 4, model.hidden_size / 64, model.num_attention_heads / 16, model.head_size / 64)
    sizes += (model.ffn_size / 512, model.positions / 4096, model.seq_length / 128, (model.vocab_size or 257) / 2000)
    sizes += (train.global_batch_size / 16, parallel.virtual_pipeline_size / 4)
    if model.vocab_size is None and config.data.tokenizer != "bytes":
        return False  # the vocabulary is in a file that is not there
    here = train.kernels != "triton" and train.compile == "none" and parallel.device != "cuda" and parallel.backend != "nccl"
    return here and max(sizes) <= 1


def step(config: Config) -> None:
    """One step on random text. Raises ValueError where GLM's blanks do not fit."""
    ctx, train, vocab_size = ParallelContext.single(), config.train, config.model.vocab_size or vocabulary(config)
    samples, compose = random_source(config, vocab_size)
    with Loader(samples, train.global_batch_size, train.micro_batch_size, 0, 1, compose=compose) as loader:
        run = assemble(config, ctx, loader, vocab_size)
        report = train_step(run)
    assert report.step == 1 and report.samples > 0


def fuzz(limit):
    seen = dict.fromkeys(("taken", "refused", "trained"), 0)
    for name, draw in fuzzing.cases(limit, "config", lambda: min(seen.values()) > 0):
        tree, world = drawn(draw)
        told = f"{name}: {tree} in a world of {world}"
        try:
            said = refusal(tree, world)
            if said:
                seen["refused"] += 1
                better = advised(tree, said)
                assert better is None or refusal(better, world) != said, f"the advice changes nothing: {said}"
                continue
            seen["taken"] += 1
            config = from_dict(tree)
            again = from_dict(yaml.safe_load(dump(config)))
            assert again == config == restored(yaml.safe_load(dump(config)))
            validate(again, world)
            validate_step(config, world)
            validate_layout(config, world)
            require_effects(config)
            if world == 1 and config.parallel.pipeline_parallel_size == 1 and small(config):
                try:
                    step(replace(config, parallel=replace(config.parallel, zero_stage=min(config.parallel.zero_stage, 2))))
                except ValueError as error:  # told before anything is trained, once the text and its blanks are known
                    assert re.search(r"Use |GLM's special token|Give each an id", str(error)), error
                seen["trained"] += 1
        except Exception as error:
            raise AssertionError(f"{told}: {error}") from error
    return seen.values()


def test_random_values_are_refused_at_once_or_train(one_thread):
    assert min(fuzz(fuzzing.seconds())) > 0


@pytest.mark.slow
def test_many_random_values_are_refused_at_once_or_train(one_thread):
    assert min(fuzz(fuzzing.seconds(slow=True))) > 10
