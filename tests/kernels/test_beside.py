"""Parts of one buffer are read as they lie, and others are copied into one."""

import pytest
import torch

from megatrain.kernels.beside import beside, together

WHOLE = torch.arange(2 * 3 * 12.0).view(2, 3, 12)


def rows(*widths):
    return WHOLE.split(widths, -1)


@pytest.mark.parametrize("parts", [rows(4, 4, 4), rows(6, 3, 3), rows(12), rows(5, 7)[:1], rows(2, 5, 5)[1:]], ids=len)
def test_neighbours_are_one_view(parts):
    found = beside(parts)
    assert found.data_ptr() == parts[0].data_ptr() and torch.equal(found, torch.cat(parts, -1))


@pytest.mark.parametrize(
    "parts",
    [
        rows(4, 4, 4)[::2],  # a gap
        rows(6, 6)[::-1],  # the wrong order
        (WHOLE[..., :6], WHOLE.clone()[..., 6:]),  # two storages
        (WHOLE[..., :6], WHOLE[..., 6:].contiguous()),
        (WHOLE[..., :8:2], WHOLE[..., 8:]),  # every second
        (WHOLE[:1].expand(2, 3, 12)[..., :6], WHOLE[..., 6:]),  # other rows
        tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in rows(6, 6)),
    ],
)
def test_others_are_copied(parts):
    found = beside(parts)
    assert found.data_ptr() not in [part.data_ptr() for part in parts] and torch.equal(found, torch.cat(parts, -1))


def test_gradient_of_the_whole_is_cut():
    whole = WHOLE.double().requires_grad_()
    (grad,) = torch.autograd.grad((together(*whole.split([5, 4, 3], -1)) ** 2).sum(), whole)
    assert torch.equal(grad, 2 * whole)
