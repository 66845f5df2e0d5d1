"""The dropout kernel has the reference's bits: which elements stay, what they are multiplied by, and in which order."""

import pytest
import torch

from megatrain.config.schema import ModelConfig
from megatrain.kernels.dispatch import Kernels
from megatrain.models.batch import MicroBatch
from megatrain.models.layers import Build, Dropout
from megatrain.parallel import rng
from megatrain.parallel.mesh import Axis, Rows

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
SAME_WIDTH = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def both(x, p, key, samples, places=None):
    """(output, gradient of a random product, its bits) by Triton and by the reference."""
    sides = []
    for kernels in ("triton", "reference"):
        leaf = x.detach().requires_grad_()
        y = rng.dropout(leaf, p, key, samples, places, kernels=kernels)
        (dx,) = torch.autograd.grad(y, leaf, numbers(*x.shape, dtype=x.dtype).transpose(0, 1).contiguous().transpose(0, 1))
        sides.append((y.detach(), dx))
    return sides


def require_same_bits(sides):
    for ours, theirs in zip(*sides, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.equal(ours.contiguous().view(SAME_WIDTH[ours.dtype]), theirs.contiguous().view(SAME_WIDTH[ours.dtype]))


def test_words_of_a_key_of_two_samples_and_positions():
    """Against numbers that unbounded integers gave (tests/parallel/test_rng.py has their formulas)."""
    kept = (
        rng.dropout(torch.ones(2, 1, 8, device=DEVICE), 0.5, rng.key(1234, "golden"), torch.tensor([3]), kernels="triton") > 0
    )
    assert kept.int().flatten().tolist() == [1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("shape", "p", "seed", "first", "samples"),
    [
        ((1, 1, 1), 0.5, 0, 0, [0]),
        ((2, 3, 5), 0.01, 1, 1, [2**32 - 1, 0, 2**31]),
        ((1, 2, 255), 0.99, 2**63, 16, [7, 7]),
        ((2, 1, 256), 2.0**-40, 3, 4096, [5]),
        ((1, 3, 300), 2.0**-32, 4, 2**31 - 5, [1, 2, 3]),
        ((2, 2, 768), 1 - 2.0**-31, 5, 2**31 - 1, [2**31 - 1, 1]),
        ((1, 1, 2100), 1 - 2.0**-33, 2**62 + 1, 0, [9]),
        ((2, 3, 2100), 1 - 2.0**-50, 6, 3, [4, 2**32 - 2, 11]),
        ((2, 2, 2100), 0.3, 7, 2**20, [2**16, 12]),
    ],
    ids=str,
)
def test_every_bit_is_the_references(shape, p, seed, first, samples):
    require_same_bits(both(numbers(*shape), p, rng.key(seed, "any"), torch.tensor(samples), (range(first, first + shape[0]),)))


def test_rows_that_are_no_neighbours_have_the_masks_of_their_places():
    x, key, samples = numbers(6, 2, 300), rng.key(8), torch.tensor([3, 1])
    whole = both(x, 0.5, key, samples)
    apart = both(torch.cat([x[:1], x[4:]]), 0.5, key, samples, (range(1), range(4, 6)))
    require_same_bits(apart)
    for (of_all, _), (of_some, _) in zip(whole, apart, strict=True):
        assert torch.equal(of_some, torch.cat([of_all[:1], of_all[4:]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_numbers(dtype):
    """Doubled, which rounds nothing: the interpreter cuts numbers off where a GPU rounds them."""
    x, key, samples = numbers(3, 2, 300, dtype=dtype), rng.key(1), torch.tensor([7, 2**32 - 1])
    require_same_bits(both(x, 0.5, key, samples))
    (ours, _), (theirs, _) = both(x, 0.1, key, samples)
    assert torch.equal(ours == 0, theirs == 0) and 0 < int((ours == 0).sum()) < 300
    torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=0)


def test_views_and_nothing():
    key, samples = rng.key(2), torch.arange(6)[::2]
    for x in (numbers(7, 3, 5).transpose(0, 2), numbers(5, 3, 14)[..., ::2], numbers(1, 3, 7).expand(5, 3, 7)):
        require_same_bits(both(x, 0.3, key, samples))
    require_same_bits(both(numbers(0, 3, 4), 0.3, key, samples))
    require_same_bits(both(numbers(4, 3, 0), 0.3, key, samples))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of 0 times infinity
def test_what_is_not_finite_is_not_hidden():
    x = torch.full((4, 1, 64), torch.inf, device=DEVICE)
    (ours, _), (theirs, _) = both(x, 0.5, rng.key(3), torch.tensor([0]))
    assert torch.equal(ours.isnan(), theirs.isnan()) and 0 < int(ours.isnan().sum()) < 256


def test_the_backward_of_the_backward():
    x, key, samples = numbers(3, 2, 9).requires_grad_(), rng.key(4), torch.arange(2)
    found = []
    for kernels in ("triton", "reference"):
        y = rng.dropout(x, 0.4, key, samples, kernels=kernels)
        (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.sum(), x)[0])
    require_same_bits([[found[0]], [found[1]]])


def test_double_precision_has_the_reference():
    x, key, samples = numbers(2, 1, 40).double(), rng.key(5), torch.arange(1)
    ours, theirs = (rng.dropout(x, 0.1, key, samples, kernels=kernels) for kernels in ("triton", "reference"))
    assert torch.equal(ours, theirs) and float(ours.abs().max() / x[ours.abs() == ours.abs().max()].abs()) == 1 / 0.9


@pytest.mark.parametrize(("kernels", "launches"), [("triton", 2), ("reference", 0)])
def test_a_layer_takes_the_kernels_of_its_run(monkeypatch, kernels: Kernels, launches):
    called, plain = [], rng.dropout_triton
    monkeypatch.setattr(rng, "dropout_triton", lambda x, *rest: called.append(x.shape) or plain(x, *rest))
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=1, seq_length=4, vocab_size=9, dropout=0.5)
    build = Build(Rows(Axis("tp")), torch.float32, DEVICE, config, 9, 0, kernels=kernels)
    tokens = torch.zeros(4, 2, dtype=torch.int64, device=DEVICE)
    batch = MicroBatch(tokens, tokens, tokens.float(), tokens, torch.arange(2, device=DEVICE), 0)
    Dropout(build, 0, "mlp")(numbers(4, 2, 16).requires_grad_(), batch).sum().backward()
    assert called == [(4, 2, 16)] * launches
