"""Dynamic loss scaling: when the scale grows and falls, and what a checkpoint keeps of it."""

import pytest
import torch

from megatrain.config.schema import TrainConfig
from megatrain.optim.optimizer import LossScale


def scale_of(window=3, hysteresis=2, first=64.0, least=1.0, precision="fp16"):
    config = TrainConfig(
        precision=precision,
        loss_scale=first,
        loss_scale_window=window,
        loss_scale_hysteresis=hysteresis,
        loss_scale_min=least,
    )
    return LossScale(config, torch.device("cpu"))


def after(scale, steps):
    """The scale after each of a string of steps: o overflow, . none."""
    found = []
    for step in steps:
        scale.update(torch.tensor(float(step == "o"), dtype=torch.float64))
        found.append(float(scale.scale))
    return found


@pytest.mark.parametrize(
    ("steps", "scales"),
    [
        ("......", [64, 64, 128, 128, 128, 256]),
        ("o.....", [64, 64, 64, 128, 128, 128]),  # one overflow is forgiven, but the window begins anew
        ("oo.", [64, 32, 32]),
        ("ooo.", [64, 32, 16, 16]),  # nothing is left to forgive until a window has passed
        ("oo...o.o", [64, 32, 32, 32, 64, 64, 64, 32]),
        ("..o..o", [64, 64, 64, 64, 64, 32]),
    ],
)
def test_growth_and_fall(steps, scales):
    assert after(scale_of(), steps) == scales


def test_never_below_the_least():
    assert after(scale_of(first=4.0, least=2.0, hysteresis=1), "oooo") == [2, 2, 2, 2]


def test_other_precisions_have_none():
    for precision in ("bf16", "fp32", "fp64"):
        assert after(scale_of(precision=precision, hysteresis=1), "o......") == [1] * 7


def test_a_checkpoint_goes_on_where_it_was():
    one, other = scale_of(), scale_of()
    after(one, "..oo..")
    other.restore(one.state())
    assert after(one, ".o.o...") == after(other, ".o.o...")


def test_it_goes_on_within_the_bounds_of_now_and_only_in_fp16():
    scale = scale_of(first=64.0, hysteresis=2, least=16.0)
    scale.restore([8.0, 2.0, 5.0])
    assert scale.state() == [16.0, 2.0, 2.0]
    scale.restore([4096.0, 1.0, 1.0])
    assert scale.state() == [4096.0, 1.0, 1.0]
    other = scale_of(precision="bf16")
    other.restore([4096.0, 1.0, 1.0])
    assert float(other.scale) == 1.0
