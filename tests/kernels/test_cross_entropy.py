"""The reference's statistics of 16-bit logits: exponentials are those of float64, rounded."""

import pytest
import torch

from megatrain.kernels.cross_entropy import statistics_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exponentials_of_16_bits_are_rounded_once(dtype):
    logits = (torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    logits[3, 5] = -torch.inf
    exact = (logits.double() - logits.double().amax(1, keepdim=True)).exp()
    labels = torch.arange(40)
    written = logits.clone()
    top, total, label, _ = statistics_of(written, labels, torch.ones(40, dtype=torch.bool))
    assert torch.equal(top, logits.float().amax(1)) and torch.equal(label, logits.float()[labels, labels])
    torch.testing.assert_close(total.double(), exact.sum(1), rtol=2e-6, atol=0)
    assert (written != exact.to(dtype)).sum() <= 12 and written[3, 5] == 0, "one in a thousand lies so near a tie"
    torch.testing.assert_close(written.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=6e-8)


def test_large_logits_lose_nothing():
    """Their differences are exact: of two large products by log2(e) the roundings alone would be left."""
    logits = torch.tensor([[30000.0, 29952.0, 30000.0], [-30016.0, -30024.0, -30016.0]], dtype=torch.float16).bfloat16()
    exact = (logits.double() - logits.double().amax(1, keepdim=True)).exp()
    _, total, _, _ = statistics_of(logits, torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool))
    assert total.tolist() == pytest.approx(exact.sum(1).tolist(), rel=1e-6) and logits[0].tolist()[::2] == [1.0, 1.0]
