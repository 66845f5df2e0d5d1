"""The keys of a config that differ from those of a checkpoint, and the effect that each difference has on a run that resumes.

`TABLE` has a row for every key; docs/resuming.md shows it, and a test tries each row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal

from megatrain.checkpoint.manifest import Manifest
from megatrain.config.keys import knobs, show
from megatrain.config.load import dump
from megatrain.config.schema import Config, ModelConfig
from megatrain.config.source import saved_values


@dataclass(frozen=True)
class Change:
    """The effect on a resumed run of changing some keys."""

    keys: tuple[str, ...]
    """`section.key`, or patterns with `*`; the first row that has a key counts."""
    then: Literal["kept", "told", "bent", "refused"]
    """kept: the same numbers but for rounding; told: the same curves, and a line in the log; bent: other curves from the next step on;
    refused: an error, unless checkpoint.accept_changes allows it.
    """
    what: str
    """The effect in words."""

    def has(self, key: str) -> bool:
        """Whether the row is about `key`."""
        return any(fnmatchcase(key, pattern) for pattern in self.keys)


def _train(*names: str) -> tuple[str, ...]:
    return tuple(f"train.{name}" for name in names)


def _optim(*names: str) -> tuple[str, ...]:
    return tuple(f"optim.{name}" for name in names)


TABLE = (
    Change(("parallel.*",), "kept", "another layout of the same run; the number of processes may change too"),
    Change(
        _train("global_batch_size", "batch_ramp"),
        "told",
        "rates, weight decay and length go on as they were, counted in updates with train.steps, in tokens with train.tokens",
    ),
    Change(_train("micro_batch_size"), "kept", "the same batches; with data.objective=glm other blanks are drawn from here on"),
    Change(
        _train("steps", "tokens"),
        "bent",
        "the curves are laid over the new length, and so are data.schedule and epochs, but for what is done",
    ),
    Change(
        _optim("lr", "min_lr", "lr_schedule", "decay_fraction", "warmup_steps"), "bent", "the new curve, from the next step on"
    ),
    Change(_optim("weight_decay", "weight_decay_end"), "bent", "the new decay, from the next step on"),
    Change(_optim("betas", "eps", "momentum", "clip_grad"), "bent", "from the next step on; moments stay"),
    Change(
        _optim("name"), "bent", "from the next step on between adam and adamw, whose moments stay; else refused: other states"
    ),
    Change(_optim("master"), "kept", "the same masters, kept otherwise"),
    Change(
        _train("precision"),
        "bent",
        "weights and moments are rounded or widened; into fp16 with a first scale of train.loss_scale, out of it without one",
    ),
    Change(_train("loss_scale"), "told", "no effect: the scale goes on from where it was"),
    Change(_train("loss_scale_*"), "bent", "from the next step on"),
    Change(_train("label_smoothing", "z_loss"), "bent", "the loss, from the next step on"),
    Change(
        _train("recompute", "kernels", "compile", "loss_chunk", "deterministic"), "kept", "the same numbers, made otherwise"
    ),
    Change(_train("skip_steps"), "bent", "steps that are done stay as they were; counted in updates, whatever their batch"),
    Change(
        _train("on_spike", "spike_*", "max_skipped_in_row"), "kept", "what follows the next spike; samples left out stay so"
    ),
    Change(_train("seed"), "refused", "another order of the text (data)"),
    Change(_train("*"), "kept", "when and how long it runs, is evaluated and audited; counted in updates"),
    Change(("model.init_from", "model.preset"), "kept", "weights come from the checkpoint"),
    Change(
        ("model.seq_length",),
        "refused",
        "another model (model); accepted, as many tokens as before are consumed, and samples are cut anew from there",
    ),
    Change(
        ("model.embedding_grad_*",), "refused", "another model (model); accepted, from the next step on, counted in updates"
    ),
    Change(("model.*",), "refused", "another model (model); accepted, it still must have the same tensors"),
    Change(
        ("data.train",),
        "refused",
        "another text, other answers, weights, epochs or order (data); accepted, each text goes on behind its last sample; the same text "
        "in another place is kept",
    ),
    Change(
        ("data.schedule", "data.replay"),
        "refused",
        "other weights (data); accepted, they hold from the next step on, and each text goes on behind its last sample",
    ),
    Change(("data.valid",), "told", "losses of before and after compare only where the text is the same"),
    Change(("data.tokenizer",), "refused", "another tokenizer (tokenizer); the same one in another place is kept"),
    Change(("data.cache_dir",), "kept", "where indices are cached"),
    Change(("data.*",), "refused", "other samples of the same text (data)"),
    Change(("checkpoint.*", "log.*", "eval.*"), "kept", "when and where it is saved and told, and what its model is asked"),
)
"""The effect of each change; a key's row is the first that has it."""

_LENGTHS = (
    *_optim("lr*", "min_lr", "decay_fraction", "warmup_steps", "weight_decay*"),
    *_train("steps", "tokens"),
    *_train("global_batch_size", "batch_ramp"),
    "model.seq_length",
)
"""Keys whose change makes a resumed run print its remaining length and learning rates."""
_FOLLOWING = {
    "head_dim": "head_size",
    "num_query_groups": "query_groups",
    "ffn_hidden_size": "ffn_size",
    "qkv_bias": "qkv_biased",
    "max_positions": "positions",
    "rope_original_length": "original_length",
}
"""Keys of the model that may be null -> the property that has the value then."""


def change_of(key: str) -> Change:
    """The row of TABLE for a key."""
    return next(row for row in TABLE if row.has(key))


def change_line(key: str, was: Any, now: Any, *, same: bool = False) -> str:
    """`key: was -> now (effect)`, values as in YAML. same: both paths lead to the same contents, which is then the effect."""
    row = change_of(key)
    what = "the same in another place" if same else "" if row.then == "kept" else row.what
    return f"{key}: {show(was)} -> {show(now)}" + (f" ({what})" if what else "")


def bends_schedules(key: str) -> bool:
    """Whether learning rates or the length of a run may depend on a key."""
    return any(fnmatchcase(key, pattern) for pattern in _LENGTHS)


def changes(manifest: Manifest, config: Config) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in the checkpoint's config, value now) of each key that differs."""
    before = values_then(manifest)
    now = dict(
        _leaves(saved_values(dump(config, {}), "the config"))
    )  # in the form that is saved, which leaves out defaults inside of lists
    effective = _effective(before), _effective(now)
    for key, value in now.items():
        if before[key] != value and (
            None not in (before[key], value) or effective[0].get(key, before[key]) != effective[1].get(key, value)
        ):
            yield key, before[key], value


def _effective(values: dict[str, Any]) -> dict[str, Any]:
    """Key -> the value that null stands for, so that writing out that value is no change."""
    model = ModelConfig(**{field.name: values[f"model.{field.name}"] for field in fields(ModelConfig)})
    vocabulary = {"model.vocab_size": None}  # follows from the tokenizer; shapes of tensors are checked on loading
    return vocabulary | {f"model.{key}": getattr(model, name) for key, name in _FOLLOWING.items()}


def values_then(manifest: Manifest) -> dict[str, Any]:
    """`section.key` -> value in a checkpoint's config; a key that its release did not have is at its default."""
    was = saved_values(manifest.config, "the config in the checkpoint")
    values = dict(_leaves(asdict(Config()))) | dict(_leaves(was))
    paths = {knob.key for knob in knobs() if knob.range.path} | {"data.train", "data.valid"}
    return {key: _at_home(value) if key in paths else value for key, value in values.items()}


def _at_home(value: Any) -> Any:
    """A path, or the paths of a list of corpora, with home directories for ~, as a config that is loaded has them."""
    if isinstance(value, list):
        return [_at_home(part) for part in value]
    if isinstance(value, dict):
        return {name: part if name == "set" else _at_home(part) for name, part in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111  (a Path would make `./a` another text)


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(`section.key` or `section.group.key`, value) of every value of a config."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield path + name, _plain(value)


def _plain(value: Any) -> Any:
    """A value with its tuples as lists, as YAML has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def table() -> str:
    """`TABLE` in Markdown, for docs/resuming.md."""
    rows = ["| key | then | what it does |", "| --- | --- | --- |"]
    return "\n".join([*rows, *(f"| {', '.join(f'`{key}`' for key in row.keys)} | {row.then} | {row.what} |" for row in TABLE)])
