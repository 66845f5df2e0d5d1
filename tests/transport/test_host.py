"""Copies between host and device that are not waited for."""

import pytest
import torch

from megatrain.transport.host import ALIGNED, Moment, Reading, to_device

CPU = torch.device("cpu")


def mixed():
    """Tensors of several dtypes and strides."""
    return [
        torch.arange(24).view(2, 3, 4).transpose(1, 2),
        torch.tensor([0.5, -1.0, 2.0]),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.tensor(7.0, dtype=torch.float64),
        torch.tensor([[True], [False]]),
    ]


def check(device):
    for given, made in zip(mixed(), to_device(mixed(), device), strict=True):
        assert made.device.type == device.type and made.is_contiguous() and made.data_ptr() % ALIGNED == 0
        assert made.dtype == given.dtype and torch.equal(made.cpu(), given)


def test_what_travels_together_arrives_apart():
    check(CPU)
    assert to_device([], CPU) == []


def test_on_a_cpu_a_tensor_is_there_and_moments_have_come():
    began = Moment(CPU)
    reading = Reading(torch.tensor([1.0, 2.0]))
    assert began.reached() and reading.copied.reached() and reading.wait().tolist() == [1.0, 2.0]
    assert 0 <= reading.copied.seconds_since(began) < 60


@pytest.mark.gpu
def test_on_a_gpu_the_host_goes_on_and_waits_for_the_reading_alone():
    device = torch.device("cuda")
    check(device)
    began = Moment(device)
    torch.cuda._sleep(10**8)  # cycles: 50 ms
    reading = Reading(torch.full((3,), 5.0, device=device))
    assert not reading.copied.reached()
    assert reading.wait().tolist() == [5.0] * 3 and reading.wait().is_pinned()
    assert reading.copied.reached() and reading.copied.seconds_since(began) > 0.02


@pytest.mark.gpu
def test_on_a_gpu_memory_is_not_written_again_before_it_was_fetched():
    """The device is busy while many batches go through the allocator's pinned buffers."""
    device = torch.device("cuda")
    torch.cuda._sleep(10**9)
    made = [to_device([torch.full((1 << 16,), n)], device)[0] for n in range(50)]
    assert [int(x.float().mean()) for x in made] == list(range(50))
