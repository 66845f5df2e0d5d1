"""Counts in a config.json that no model has: each is refused by its name, at once, whatever reads it for each of its layers."""

import json
import re
import time

import pytest

from megatrain.checkpoint.together import ContentError
from megatrain.huggingface.config import model_of, names_of
from megatrain.huggingface.dialects import DIALECTS, _repeated
from megatrain.huggingface.model_files import model_keys

LARGEST = {
    **dict.fromkeys(("num_layers", "num_attention_heads", "num_query_groups", "head_dim"), 65536),
    **dict.fromkeys(("hidden_size", "ffn_hidden_size", "seq_length", "vocab_size"), 16777216),
    "window": 2147483647,
}
SIZES = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 24,
    "seq_length": 64,
    "vocab_size": 50,
}
CHATGLM = {"multi_query_attention": True, "multi_query_group_num": 2}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}


def config(kind, **keys):
    """A config.json of a kind with small sizes."""
    of = DIALECTS[kind]
    sizes = {of.keys[ours].names[0]: size for ours, size in SIZES.items() if ours in of.keys}
    marks = {"chatglm": CHATGLM, "chatglm_6b": {"position_encoding_2d": True}, "glm_1": {"block_position_encoding": True}}
    known = WINDOW if "sliding_window" in names_of(kind) else {}
    return {"model_type": of.model_type or kind, **sizes, **marks.get(kind, {}), **known, **keys}


COUNTS = [(kind, ours, of.names[0]) for kind, at in DIALECTS.items() for ours, of in at.keys.items() if ours in LARGEST]
COUNTS += [(kind, "window", "sliding_window") for kind in ("mistral", "qwen2", "qwen3")]
COUNTS += [("chatglm", "num_query_groups", "multi_query_group_num")]


def test_the_table_has_every_count():
    assert len(COUNTS) == 81
    for kind in DIALECTS:
        assert model_of(config(kind))["num_layers"] == 2


@pytest.mark.parametrize("number", [0, -1, "x", "64", 1.5, 64.0, True, float("nan"), [], {}])
def test_what_is_no_count_is_refused_by_name(number):
    for kind, _, name in COUNTS:
        with pytest.raises(ContentError) as error:
            model_of(config(kind, **{name: number}))
        assert str(error.value) == f"config.json has {name}={number!r}, which is no whole number above 0", kind


@pytest.mark.parametrize("number", [10**10, 2**40, 2**70, 10**4000], ids=["10^10", "2^40", "2^70", "10^4000"])
def test_a_count_beyond_every_model_is_refused_before_anything_is_made_of_it(number):
    begun = time.process_time()
    for kind, ours, name in COUNTS:
        with pytest.raises(ContentError) as error:
            model_of(config(kind, **{name: number}))
        shown = re.escape(str(number)) if number < 10**1000 else r"1\d* \.\.\. \(4,[0-9]+ characters\) \.\.\. \d*"
        wanted = f"config.json has {name}={shown}, and model.{ours} must be at most {LARGEST[ours]}"
        assert re.fullmatch(wanted, str(error.value)) and len(str(error.value)) < 3000, kind
    assert time.process_time() - begun < 5


def test_a_number_of_5000_digits_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config("qwen3", num_hidden_layers=77)).replace("77", "9" * 5000))
    with pytest.raises(ContentError, match="cannot be read") as error:
        model_keys(tmp_path)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("number", [-1, "x", 1.5, None, True, []])
def test_layers_without_a_window_are_counted(number):
    with pytest.raises(ContentError, match=r"config.json has max_window_layers=.*, which is no whole number of 0 or more"):
        model_of(config("qwen2", max_window_layers=number))
    assert model_of(config("qwen2", max_window_layers=2**70))["window"] is None


def test_the_pattern_of_as_many_layers_as_there_may_be_is_found_at_once():
    begun = time.process_time()
    assert len(_repeated(["full_attention"] * 65535 + ["sliding_attention"])) == 65536
    assert len(_repeated((["full_attention"] * 2000 + ["sliding_attention"]) * 32)) == 2001
    assert time.process_time() - begun < 5
