"""Rotary settings of config.json in both spellings: `rope_parameters` of transformers 5, and the older `rope_theta` with `rope_scaling`.

Where both are given, transformers uses rope_scaling alone, and prefers a value inside the object to the same one outside; here two
that differ are refused. Written is the older spelling, which all versions read.
"""

from __future__ import annotations

import math
from typing import Any

from megatrain.checkpoint.together import ContentError
from megatrain.config.schema import ModelConfig
from megatrain.huggingface.json_names import Json, contradiction, nothing_said

NAMES = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
"""All names of config.json that are read here."""
_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
_SCALED = {"factor", "original_max_position_embeddings"}
_LLAMA3 = {"rope_low_freq_factor": "low_freq_factor", "rope_high_freq_factor": "high_freq_factor"}
_YARN = {"rope_beta_fast": ("beta_fast", 32), "rope_beta_slow": ("beta_slow", 1)}
_KNOWN = {
    "default": _ALWAYS,
    "linear": _ALWAYS | _SCALED,
    "llama3": _ALWAYS | _SCALED | set(_LLAMA3.values()),
    "yarn": _ALWAYS | _SCALED | {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"},
}
"""rope_type -> the names allowed beside it."""


def rope_of(config: Json, kind: str, positions: int, head_size: int, part: float | None) -> Json:
    """Rotary keys of the model section. Raises ContentError for settings that they cannot express, and for contradictions.

    positions: max_position_embeddings; part: share of a head that is rotated by default, None for families that rotate whole heads.
    """
    spelled = {name: _object(config, name) for name in ("rope_scaling", "rope_parameters")}
    given = {name: settings for name, settings in spelled.items() if settings}
    read = {name: _read(config, name, settings, positions) for name, settings in given.items()} or {
        "": _read(config, "", {}, positions)
    }
    found, *others = read.values()
    for other in others:
        for name in found.keys() | other.keys():
            if found.get(name) != other.get(name):
                raise contradiction(f"rope_scaling={spelled['rope_scaling']}", f"rope_parameters={spelled['rope_parameters']}")
    fraction = _fraction(config, kind, next(iter(given.values()), {}), part)
    turned = int(head_size * fraction)
    if turned % 2 or not 0 < fraction <= 1:
        raise ContentError(
            f"config.json rotates {turned} of the {head_size} numbers of a head (partial_rotary_factor={fraction}), and pairs need an even "
            "number up to that. transformers rounds up what is odd; the model section has no word for such a model."
        )
    return {**found, "rope_fraction": fraction}


def _object(config: Json, name: str) -> Json:
    settings = config.get(name) or {}
    if not isinstance(settings, dict):
        raise ContentError(f"config.json has {name}={settings!r}, which is no JSON object")
    return settings


def _read(config: Json, where: str, settings: Json, positions: int) -> Json:
    """The settings of one of the two objects together with those outside of it. where: its name; settings: its contents."""
    kind = _kind(where, settings)
    for name, value in settings.items():
        if name not in _KNOWN[kind] and value is not None and (kind, name, value) != ("default", "factor", 1):
            raise ContentError(
                f"config.json has {where}.{name}={value!r}, which rotary frequencies of rope_type={kind!r} do not have. Remove it, or "
                "give the rope_type that it belongs to."
            )
    theta = _number(config, where, settings, "rope_theta", 10000.0)
    found: Json = {"rope_theta": theta, "rope_scaling": "none" if kind == "default" else kind}
    if kind == "default":
        return found
    original = (
        positions if kind == "linear" else _number(config, where, settings, "original_max_position_embeddings", positions)
    )
    factor = settings.get("factor")
    if kind == "yarn" and factor is None and "factor" in settings:
        factor = positions / original
    if not isinstance(factor, (int, float)):
        raise ContentError(f"config.json has {where}.rope_type={kind!r} and gives no factor")
    found["rope_factor"] = factor
    if kind != "linear":
        found["rope_original_length"] = original
    if kind == "llama3":
        for ours, name in _LLAMA3.items():
            if settings.get(name) is None:
                raise ContentError(f"config.json has {where}.rope_type='llama3' and gives no {name}")
            found[ours] = settings[name]
    if kind == "yarn":
        _require_plain_yarn(where, settings, factor)
        found |= {ours: settings.get(name) or default for ours, (name, default) in _YARN.items()}
    return found


def _kind(where: str, settings: Json) -> str:
    """The type of rotary frequencies that an object names. Raises ContentError for null, an unknown one, or two that differ."""
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind is None:
        raise nothing_said(f"{where}.rope_type", "Give the type of rotary frequencies, or leave it out")
    if settings.get("type") not in (None, kind):
        raise contradiction(f"{where}.rope_type={kind!r}", f"{where}.type={settings['type']!r}")
    if kind not in _KNOWN:
        raise ContentError(f"config.json has {where}.rope_type={kind!r}; linear, llama3 and yarn are known")
    return str(kind)


def _one(config: Json, where: str, settings: Json, name: str) -> Any:
    """The value of a name inside an object or outside; None if neither has it. Raises ContentError if they differ."""
    within, outside = settings.get(name), config.get(name)
    if within is not None and outside is not None and within != outside:
        raise contradiction(f"{where}.{name}={within!r}", f"{name}={outside!r}")
    return outside if within is None else within


def _number(config: Json, where: str, settings: Json, name: str, default: float) -> Any:
    """The value of a name inside an object or outside, `default` where it is in neither. Raises ContentError for null, or two values."""
    value = _one(config, where, settings, name)
    if value is None and (name in settings or name in config):
        raise nothing_said(f"{where}.{name}" if name in settings else name)
    return default if value is None else value


def _fraction(config: Json, kind: str, settings: Json, part: float | None) -> float:
    """The share of a head that is rotated."""
    fraction = _one(config, "rope_parameters", settings, "partial_rotary_factor")
    if fraction is None:
        return 1.0 if part is None or "partial_rotary_factor" in config else part  # given as null it means 1, not `part`
    if not isinstance(fraction, (int, float)):
        raise ContentError(f"config.json has partial_rotary_factor={fraction!r}, which is no number")
    if part is None and fraction != 1:
        raise ContentError(
            f"config.json has partial_rotary_factor={fraction}, and a {kind} of transformers rotates whole heads"
        )
    return float(fraction)


def _require_plain_yarn(where: str, settings: Json, factor: float) -> None:
    """Raise ContentError for a factor of cosines, or a ramp, that differs from models/position.py."""

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

    one, every = settings.get("mscale"), settings.get("mscale_all_dim")
    given = settings.get("attention_factor")
    if given is None and one and every:
        given = scale(one) / scale(every)
    if given is not None and not math.isclose(given, scale(1), rel_tol=1e-9):
        raise ContentError(
            f"config.json has in {where} an attention_factor, or mscale and mscale_all_dim, that make {given:g} for yarn, whose factor "
            f"here is always 0.1 log(factor) + 1 = {scale(1):g}"
        )
    if not settings.get("truncate", True):
        raise ContentError(
            f"config.json has {where}.truncate=false for yarn, whose ramp here always begins and ends at whole pairs"
        )


def rope_to(model: ModelConfig, part: float | None) -> Json:
    """Rotary settings in the spelling of transformers before version 5."""
    written: Json = {"rope_theta": model.rope_theta, "rope_scaling": None}
    if part is not None:
        fraction = model.rope_fraction
        if int(model.head_size * fraction) != model.rotated:  # odd numbers are rounded down here, up in transformers
            fraction = (model.rotated + 0.5) / model.head_size
        written["partial_rotary_factor"] = fraction
    if model.rope_scaling == "none":
        return written
    scaling: Json = {"rope_type": model.rope_scaling, "type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling != "linear":
        scaling["original_max_position_embeddings"] = int(model.original_length)
    if model.rope_scaling == "llama3":
        scaling |= {name: getattr(model, ours) for ours, name in _LLAMA3.items()}
    if model.rope_scaling == "yarn":
        scaling |= {name: getattr(model, ours) for ours, (name, _) in _YARN.items()}
    return {**written, "rope_scaling": scaling}
