"""A cache keeps what a layer has seen: room grows up to the capacity, and sequences are chosen and cut."""

import pytest
import torch

from megatrain.inference.key_values import KeyValueCache


def numbers(seed, length, sequences=1):
    return torch.randn(length, sequences, 2, 4, generator=torch.Generator().manual_seed(seed))


def test_tokens_come_behind_those_that_are_there_and_more_than_the_capacity_are_refused():
    cache, parts = KeyValueCache(1, 2, 700, 4, torch.float32, torch.device("cpu")), [numbers(n, n) for n in (3, 509, 1, 187)]
    assert len(cache.keys) == 512
    for part in parts:
        keys, values = cache.extend(part, -part)
    assert torch.equal(keys, torch.cat(parts)) and torch.equal(values, -keys) and len(cache.keys) == 700
    with pytest.raises(ValueError, match=r"701 tokens do not fit the key-value cache of 700; model.max_positions is the limit"):
        cache.extend(parts[2], parts[2])


def test_sequences_are_chosen_and_cut():
    cache, x = KeyValueCache(3, 2, 8, 4, torch.float32, torch.device("cpu")), numbers(1, 5, 3)
    cache.extend(x, -x)
    cache.select([2, 0], 4)
    keys, values = cache.extend(x[:1, :2], x[:1, :2])
    assert torch.equal(keys, torch.cat([x[:4, [2, 0]], x[:1, :2]])) and torch.equal(values[:4], -keys[:4])
