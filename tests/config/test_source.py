"""YAML that a program has written, such as the config in a checkpoint, is read no less strictly than a user's."""

import time

import pytest

from megatrain.config.load import dump, from_dict
from megatrain.config.source import ConfigError, saved_values

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 20))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, r"the config, line 1: a YAML anchor \(&\) is not accepted"),
        ("a: *b", r"line 1: a YAML alias \(\*\) is not accepted"),
        ("a: !!python/object/apply:os.system [ls]", r"a YAML tag \(!\) is not accepted"),
        ("{a: " * 50, "nested more than 16 levels deep"),
        ("a: " + "9" * 10_000, "9999 is not a plain decimal number"),
        ("a: " + "1:1" * 10_000, "is not a plain decimal number"),
        ("[1, 2]", "the config is no sections of keys"),
        ("a: [", "this is not YAML"),
        ("#" + "x" * (1 << 20), "the config has 1,048,577 letters"),
    ],
)
def test_what_harms_is_refused_at_once(text, said):
    began = time.monotonic()
    with pytest.raises(ConfigError, match=said) as caught:
        saved_values(text, "the config")
    assert time.monotonic() - began < 5 and len(str(caught.value)) < 300


def test_what_was_written_is_read():
    config = from_dict({"model": {"hidden_size": 64}, "optim": {"lr": 1e-05}})
    values = saved_values(dump(config, {}), "the config")
    assert values["model"]["hidden_size"] == 64 and values["optim"]["lr"] == 1e-05
    assert from_dict(values) == config and saved_values("", "the config") == {}
