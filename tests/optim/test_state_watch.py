"""Sums of bits, row by row: every flip is seen and its row is told; and how often is often enough."""

import pytest
import torch

from megatrain.optim import state_watch
from megatrain.optim.state_watch import row_count, row_sums, rows_of, watched_every


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int16])
def test_each_flipped_bit_changes_the_sum_of_its_row_alone(dtype, monkeypatch):
    monkeypatch.setattr(state_watch, "ROWS", 3)
    tensor = torch.arange(64 * 7).to(dtype)
    before = row_sums(tensor)
    assert len(before) == row_count(tensor) == 4  # of 128 elements, the last of 64
    for at in (0, 127, 128, 383, 384, 447):
        for byte in range(tensor.element_size()):
            other = tensor.clone()
            other[at : at + 1].view(torch.uint8)[byte] ^= 128
            assert (row_sums(other) != before).nonzero().flatten().tolist() == [at // 128]
            assert rows_of(tensor, at, 1) == slice(at // 128, at // 128 + 1)
    assert rows_of(tensor, 100, 200) == slice(0, 3)


def test_small_tensors_have_a_row_for_each_64_elements_so_that_no_two_parameters_share_one():
    tensor = torch.zeros(64 * 100)
    assert row_count(tensor) == len(row_sums(tensor)) == 100
    large = torch.zeros(64 * ((1 << 17) + 1), dtype=torch.bfloat16)
    assert row_count(large) == len(row_sums(large)) == (1 << 16) // 2 + (1 << 15) + 1


def test_sums_wrap():
    tensor = torch.full((2,), 2**63 - 1).repeat(32)
    assert row_sums(tensor).tolist() == [-64]


def test_state_is_watched_at_each_step_where_that_is_cheap():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert watched_every(1 << 22, 1.0, cpu) == 1
    assert watched_every(119_662_592, 51e9, cpu) == 8
    # GPT-2 124M alone on a GPU, 30 bytes a parameter: 0.5 M tokens a step are enough, 16 k are not.
    assert watched_every(3_720_000_000, 6 * 124e6 * 524288, gpu) == 1
    assert watched_every(3_720_000_000, 6 * 124e6 * 16384, gpu) == 21
    assert watched_every(3_720_000_000, 6 * 124e6 * 16384, cpu) == 2
