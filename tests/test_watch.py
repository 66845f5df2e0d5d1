"""What the start-up line says of a GPU."""

import pytest
import torch

from megatrain import watch


@pytest.mark.parametrize(
    ("device", "dtype", "inside", "said"),
    [
        ("cuda", torch.bfloat16, True, " | weight gradients: added inside the matmul"),
        ("cuda", torch.float16, False, " | weight gradients: added after the matmul"),
        ("cuda", torch.float32, False, ""),
        ("cpu", torch.bfloat16, False, ""),
    ],
    ids=str,
)
def test_where_weight_gradients_are_added_is_told(monkeypatch, device, dtype, inside, said):
    monkeypatch.setattr(watch, "adds_inside", lambda *_: inside)
    assert watch.summing_note(torch.device(device), dtype) == said
