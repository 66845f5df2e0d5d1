import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.parallel import rng
from megatrain.parallel.rng import Key, bits, dropout, key, normal

WORD = 1 << 32


def mix(x: int) -> int:
    """lowbias32 in unbounded integers, from its published definition."""
    x ^= x >> 16
    x = x * 0x7FEB352D % WORD
    x ^= x >> 15
    x = x * 0x846CA68B % WORD
    return x ^ (x >> 16)


def number(word: int, a: int, b: int) -> int:
    return mix(mix(word ^ a) ^ b)


def descend(word: int, a: int, b: int) -> tuple[int, int]:
    return number(word, a, b), number(word, a ^ 0x1E3779B9, b ^ 0x05EBCA6B)


def words(k: Key) -> tuple[int, int]:
    return k.first % WORD, k.second % WORD


def reference_bits(k: Key, index: int) -> int:
    high, low = divmod(index % WORD**2, WORD)
    return number(low, *descend(high, *words(k)))


def reference_normal(k: Key, index: int) -> float:
    high, low = divmod(index, WORD)
    u, v = descend(low, *descend(high, *words(k)))
    # word w of [0, 2^32) as a signed int32 plus 2^31 is w with its top bit flipped
    u, v = ((w ^ (1 << 31)) + 0.5 for w in (u, v))
    return math.sqrt(-2 * math.log(u / WORD)) * math.cos(2 * math.pi * v / WORD)


def reference_kept(k: Key, p: float, sample: int, position: int, column: int) -> bool:
    high, low = divmod(sample, WORD)
    row = descend(position, *descend(low, *descend(high, *words(k))))
    return (number(column, *row) + (1 << 31)) % WORD >= round(p * WORD)


def unsigned(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.int64) % WORD


def uniform(x: torch.Tensor) -> torch.Tensor:
    return unsigned(x).double() / WORD


def excess(cells: torch.Tensor, expected: float | torch.Tensor) -> float:
    """Chi-square of counts, in standard deviations from its mean."""
    cells = cells.double()
    freedom = cells.numel() - 1
    return float((((cells - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def check_bytes(numbers: torch.Tensor) -> None:
    numbers = unsigned(numbers.flatten())
    for shift in (0, 8, 16, 24):
        cells = torch.bincount((numbers >> shift) & 255, minlength=256)
        assert abs(excess(cells, numbers.numel() / 256)) < 5, f"byte at bit {shift}"
    for bit in range(32):
        ones = int(((numbers >> bit) & 1).sum())
        assert abs(ones - numbers.numel() / 2) < 4.5 * math.sqrt(numbers.numel()) / 2, f"bit {bit}"


def check_independent(x: torch.Tensor, y: torch.Tensor) -> None:
    """Joint distribution of the same byte of both, for the highest and the lowest byte, and the correlation of the values."""
    for shift in (0, 24):
        pair = ((unsigned(x) >> shift) & 255) * 256 + ((unsigned(y) >> shift) & 255)
        cells = torch.bincount(pair.flatten(), minlength=1 << 16)
        assert abs(excess(cells, pair.numel() / (1 << 16))) < 5, f"bytes at bit {shift}"
    correlation = torch.corrcoef(torch.stack([uniform(x).flatten(), uniform(y).flatten()]))[0, 1]
    assert abs(float(correlation)) < 4.5 / math.sqrt(x.numel())


def test_key_is_pinned_and_unambiguous():
    assert key(1234, "layers.0.attention.query.weight") == Key(1944784924, -897827264)
    purposes = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 1), ("a", "1"), ("a,1",)]
    assert len({key(seed, *what) for seed in (1, 2) for what in purposes}) == 2 * len(purposes)
    assert key(1, "ä", -5) == key(1, "ä", -5)


def test_golden_bits():
    assert bits(Key(0, 0), 0, 4).tolist() == [-1991176851, -502080198, 784407239, -1066668698]
    assert bits(key(1234, "golden"), 0, 4).tolist() == [-837267445, 919607142, -808515546, -1410537672]
    assert bits(key(1234, "golden"), 2**40 + 5, 3).tolist() == [-1400252308, -1549510949, 819497916]


def test_golden_normals_and_dropout():
    assert [x.hex() for x in normal(key(1234, "golden"), (4,)).tolist()] == [
        "0x1.fafe760000000p-1",
        "0x1.22ae560000000p-1",
        "0x1.4b5d100000000p+0",
        "0x1.cacc600000000p+0",
    ]
    kept = dropout(torch.ones(2, 1, 8), 0.5, key(1234, "golden"), torch.tensor([3])) > 0
    assert kept.int().flatten().tolist() == [1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("start", [0, 1, 2**31 - 3, 2**32 - 3, 2**40 + 2**31, 2**63 - 2, 2**64 - 2, -2])
def test_bits_match_big_integers_at_any_start(start):
    k = key(7, "reference")
    assert unsigned(bits(k, start, 7)).tolist() == [reference_bits(k, start + i) for i in range(7)]


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_bits_match_big_integers_for_any_key(first, second, index):
    assert unsigned(bits(Key(first, second), index, 1)).tolist() == [reference_bits(Key(first, second), index)]


def test_blocks_and_threads_do_not_show(monkeypatch):
    k, samples = key(3), torch.arange(3)
    x = torch.randn(50, 3, 70, generator=torch.Generator().manual_seed(0))
    whole = bits(k, 2**32 - 70_000, 140_000), normal(k, (300, 401)), dropout(x, 0.3, k, samples)
    monkeypatch.setitem(rng._BLOCK, "cpu", 1000)
    again = bits(k, 2**32 - 70_000, 140_000), normal(k, (300, 401)), dropout(x, 0.3, k, samples)
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)


def test_bits_of_nothing():
    assert bits(key(1), 5, 0).shape == (0,)
    assert normal(key(1), (0, 3)).shape == (0, 3)
    assert dropout(torch.ones(0, 2, 3), 0.5, key(1), torch.arange(2)).shape == (0, 2, 3)


def test_consecutive_numbers_are_equidistributed_and_independent():
    for name in ("a", "b"):
        numbers = bits(key(1, name), 0, 1 << 19)
        check_bytes(numbers)
        check_independent(numbers[:-1], numbers[1:])
        check_independent(numbers[:-512], numbers[512:])


def test_neighbouring_keys_are_equidistributed_and_independent():
    count = 64
    by_step = torch.stack([bits(key(1, "dropout", step, 0), 0, count) for step in range(2048)])
    by_layer = torch.stack([bits(key(1, "dropout", 0, layer), 0, count) for layer in range(2048)])
    raw = torch.stack([bits(Key(5, second), 0, count) for second in range(2048)])
    for numbers in (by_step, by_layer, raw):
        check_bytes(numbers)
        check_independent(numbers[:-1], numbers[1:])
    check_independent(by_step[1:], by_layer[1:])


def test_neighbouring_samples_and_positions_have_independent_streams():
    a, c = rng._row_keys(key(1), torch.arange(64), (range(64),))
    numbers = torch.arange(128, dtype=torch.int32).expand(64 * 64, 128).contiguous()
    numbers = rng._number(numbers, torch.empty_like(numbers), a, c).view(64, 64, 128)
    check_bytes(numbers)
    check_independent(numbers[1:], numbers[:-1])
    check_independent(numbers[:, 1:], numbers[:, :-1])
    check_independent(numbers[..., 1:], numbers[..., :-1])
    check_independent(numbers, numbers.transpose(0, 1).contiguous().roll(1, 2))


def test_the_two_words_of_a_descended_key_are_independent():
    first, second = rng._descend(torch.arange(1 << 19, dtype=torch.int32), 1, 2)
    check_bytes(first)
    check_bytes(second)
    check_independent(first, second)


def test_normals_are_normal():
    z = normal(key(1, "moments"), (1 << 10, 1 << 10)).double()
    n = z.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((z**power).mean()) - mean) < 4.5 * math.sqrt(variance / n), power
    edges = torch.linspace(-4, 4, 65, dtype=torch.float64)
    share = torch.diff(torch.special.ndtr(torch.cat([torch.tensor([-math.inf]), edges, torch.tensor([math.inf])])))
    cells = torch.bincount(torch.bucketize(z.flatten(), edges), minlength=66)
    assert abs(excess(cells, share * n)) < 5
    assert 4.5 < float(z.abs().max()) < 6.8
    assert abs(float((z[:, 1:] * z[:, :-1]).mean())) < 4.5 / math.sqrt(n)
    assert abs(float((z[1:] * z[:-1]).mean())) < 4.5 / math.sqrt(n)


def test_normals_match_the_formula():
    k = key(9, "formula")
    shape, part = (1 << 20, 1 << 20), (slice(3, 5), slice(1000, 1004))
    wanted = [[reference_normal(k, (r << 20) + c) for c in range(1000, 1004)] for r in (3, 4)]
    assert torch.allclose(normal(k, shape, part), torch.tensor(wanted), rtol=1e-6, atol=1e-9)


def test_logarithm_and_cosine():
    x = torch.rand(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, torch.tensor([0.5, 2**-33, 1 - 2**-33, math.sqrt(0.5), 0.25], dtype=torch.float64)])
    assert torch.allclose(rng._log(x), x.log(), rtol=1e-11, atol=0)
    assert torch.allclose(rng._cos_turn(x), (2 * math.pi * x).cos(), rtol=0, atol=1e-11)


@st.composite
def parts(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=0, max_size=4))
    ranges = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return tuple(shape), tuple(slice(*r) for r in ranges)


@given(parts())
@settings(max_examples=100, deadline=None)
def test_a_part_is_the_part_of_the_whole(shape_and_part):
    shape, part = shape_and_part
    k = key(5, "part")
    assert torch.equal(normal(k, shape, part), normal(k, shape)[part])


def test_normal_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="one slice per dim"):
        normal(key(1), (2, 3), (slice(None),))
    with pytest.raises(ValueError, match="step 2"):
        normal(key(1), (4,), (slice(0, 4, 2),))


def test_dropout_matches_big_integers():
    k, samples = key(11, "dropout", 0), torch.tensor([0, 7, 2**31 + 1])
    kept = dropout(torch.ones(4, 3, 5), 0.4, k, samples, (range(9, 13),)) > 0
    wanted = [[[reference_kept(k, 0.4, int(n), 9 + r, c) for c in range(5)] for n in samples] for r in range(4)]
    assert kept.tolist() == wanted


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_dropout_rate_and_scale(p):
    y = dropout(torch.ones(64, 8, 512), p, key(1, p.hex()), torch.arange(8))
    dropped = (y == 0).double()
    assert abs(float(dropped.mean()) - p) < 4.5 * math.sqrt(p * (1 - p) / y.numel())
    assert torch.equal(y[y != 0].unique(), torch.tensor([1 / (1 - p)]))
    for a, b in ((dropped[1:], dropped[:-1]), (dropped[:, 1:], dropped[:, :-1]), (dropped[..., 1:], dropped[..., :-1])):
        assert abs(float((a * b).mean()) - p * p) < 4.5 * p / math.sqrt(a.numel())


@pytest.mark.parametrize("p", [1 - 2.0**-33, 1 - 2.0**-50])
def test_all_but_certain_dropout_drops(p):
    """p 2^32 rounds to 2^32, which is no word."""
    assert not dropout(torch.ones(64, 2, 64), p, key(1), torch.arange(2)).any()
    heads = torch.zeros(2, 1, dtype=torch.int64)
    assert not rng.attention_dropout(p, key(1), torch.arange(2), heads, torch.arange(8), torch.arange(8)).any()


def test_dropout_masks_differ_by_step_layer_and_site():
    masks = [
        dropout(torch.ones(64, 2, 64), 0.5, key(1, *what), torch.arange(2))
        for what in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))
    ]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(float((a == b).double().mean()) - 0.5) < 4.5 * 0.5 / math.sqrt(a.numel())


def test_backward_uses_the_mask_of_the_forward():
    x = torch.randn(6, 2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    k, samples, places = key(2), torch.tensor([4, 1]), (range(3, 5), range(9, 13))
    assert torch.autograd.gradcheck(lambda t: dropout(t, 0.4, k, samples, places), (x,))
    assert torch.autograd.gradgradcheck(lambda t: dropout(t, 0.4, k, samples, places) ** 2, (x,))
    y = dropout(x, 0.4, k, samples, places)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(gradient == 0, y == 0)


def test_dropout_stores_no_mask():
    saved = []
    x = torch.ones(8, 2, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda t: t):
        dropout(x, 0.5, key(1), torch.arange(2))
    assert saved == [2]


def test_sequence_parallel_parts_make_the_whole():
    x, k, samples = torch.ones(12, 3, 7), key(3), torch.tensor([0, 1, 2])
    whole = dropout(x, 0.5, k, samples)
    pieces = [dropout(x[i : i + 3], 0.5, k, samples, (range(i, i + 3),)) for i in range(0, 12, 3)]
    assert torch.equal(torch.cat(pieces), whole)


def test_grouping_of_sequences_does_not_matter():
    x, k = torch.ones(12, 6, 7), key(3)
    whole = dropout(x, 0.5, k, torch.arange(6))
    for order in ([5], [2, 3], [4, 0, 1]):
        assert torch.equal(dropout(x[:, order], 0.5, k, torch.tensor(order)), whole[:, order])


def test_dropout_of_a_view_and_of_other_dtypes():
    x, k, samples = torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(0)), key(1), torch.arange(2)
    whole = dropout(x, 0.5, k, samples)
    assert torch.equal(dropout(x.transpose(0, 2).contiguous().transpose(0, 2), 0.5, k, samples), whole)
    half = dropout(x.bfloat16(), 0.5, k, samples)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half == 0, whole == 0)
    assert torch.equal(half, (whole != 0) * x.bfloat16() * 2)


def test_no_dropout_is_the_identity():
    x = torch.ones(2, 2, 2, requires_grad=True)
    assert dropout(x, 0.0, key(1), torch.arange(2)) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_dropout_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match="probability"):
        dropout(torch.ones(1, 1, 1), p, key(1), torch.arange(1))


@pytest.mark.parametrize(("shape", "count"), [((2, 3, 4), 2), ((2, 3), 3)])
def test_dropout_refuses_samples_that_do_not_fit(shape, count):
    with pytest.raises(ValueError, match="samples"):
        dropout(torch.ones(shape), 0.1, key(1), torch.arange(count))
