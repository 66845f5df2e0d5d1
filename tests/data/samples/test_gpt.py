"""GPT samples: every token of an epoch once, in an order that depends on nothing but (seed, epoch)."""

import json
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.data.draws import permutation
from megatrain.data.indexed import TokenStore, TokenStoreError, TokenStoreWriter
from megatrain.data.samples import gpt
from megatrain.data.samples.gpt import GptSamples, build_epoch


def store_of(prefix, lengths):
    """Documents of these lengths whose tokens are numbered through: the token is its own place in the store."""
    with TokenStoreWriter(prefix, "i4") as writer:
        writer.add_documents(np.arange(sum(lengths)), lengths)
    return TokenStore(prefix)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(lambda x: sum(x) > 12), st.integers(1, 11), st.integers(0, 3)
)
def test_every_token_of_an_epoch_is_an_input_once_up_to_the_tail(tmp_path_factory, lengths, seq_length, epoch):
    store = store_of(tmp_path_factory.mktemp("s") / "s", lengths)
    samples = GptSamples(store, seq_length, seed=5)
    count = samples.samples_per_epoch
    rows = [samples.sample(epoch * count + i) for i in range(count)]
    inputs = np.concatenate([row[:-1] for row in rows])
    assert len(set(inputs.tolist())) == inputs.size == count * seq_length
    assert store.tokens - inputs.size <= seq_length
    # The line of documents, put together by hand in the epoch's order, is what the samples cut.
    index = samples.epoch_index(epoch)
    line = np.concatenate([store.document(int(d)) for d in index.documents])
    for place, row in enumerate(rows):
        start = int(index.shuffle[place]) * seq_length
        assert row.tolist() == line[start : start + seq_length + 1].tolist()
    assert sorted(index.documents.tolist()) == list(range(len(lengths)))
    assert sorted(index.shuffle.tolist()) == list(range(count))


def test_order_is_a_pure_function_of_seed_and_epoch(tmp_path):
    store = store_of(tmp_path / "s", [7] * 60)
    forward = [GptSamples(store, 6, seed=1).sample(n).tolist() for n in range(200)]
    fresh = GptSamples(store, 6, seed=1)
    backward = [fresh.sample(n).tolist() for n in reversed(range(200))]
    assert forward == backward[::-1]
    other_seed = GptSamples(store, 6, seed=2)
    assert forward != [other_seed.sample(n).tolist() for n in range(200)]
    count = fresh.samples_per_epoch
    assert forward[:count] != forward[count : 2 * count]


def test_the_permutation_never_changes():
    """Pinned: a checkpoint resumed with a later release must see the same order."""
    assert permutation(8, 1234, 0, 1).tolist() == [5, 0, 4, 7, 3, 1, 6, 2]
    assert permutation(0, 1).tolist() == []
    assert permutation(8, -1, 2**70).tolist() == permutation(8, 2**64 - 1, 2**70).tolist()


def test_the_permutation_mixes():
    """No neighbour correlation: the chance that i and i + 1 stay in order is a half, as is that of any place's parity."""
    order = permutation(20000, 7, 0, 1)
    assert sorted(order.tolist()) == list(range(20000))
    assert abs(np.mean(np.diff(order) > 0) - 0.5) < 0.02
    assert abs(np.corrcoef(order, np.arange(order.size))[0, 1]) < 0.03
    assert abs(np.corrcoef(order, permutation(20000, 7, 1, 1))[0, 1]) < 0.03


def test_a_long_document_goes_on_in_the_next_sample(tmp_path):
    store = store_of(tmp_path / "s", [100])
    index = build_epoch(store.document_lengths(), 10, seed=0, epoch=0)
    assert index["starts"].tolist() == [[0, 10 * i] for i in range(9)]


def test_too_few_tokens_are_refused_with_the_numbers(tmp_path):
    store = store_of(tmp_path / "s", [5, 5])
    assert GptSamples(store, 9, seed=0).samples_per_epoch == 1
    with pytest.raises(TokenStoreError, match=r"holds 10 tokens, fewer than a sample: .* = 11\. .*at most 9"):
        GptSamples(store, 10, seed=0)
    with pytest.raises(ValueError, match="seq_length=0"):
        GptSamples(store, 0, seed=0)


def test_ids_are_checked_at_the_sample_where_the_store_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr("megatrain.data.indexed.VERIFY_AT_OPEN", 10)
    store = store_of(tmp_path / "s", [25, 25])
    samples = GptSamples(store, 7, seed=0, vocab_size=49)
    found = []
    for n in range(samples.samples_per_epoch):
        try:
            samples.sample(n)
        except TokenStoreError as error:
            found.append(str(error))
    assert found and all("token id 49 at token 49 (byte 196)" in message for message in found)


def test_ids_are_checked_at_every_sample_of_a_small_store_too(tmp_path):
    samples = GptSamples(store_of(tmp_path / "s", [50]), 4, seed=0, vocab_size=50)
    with (tmp_path / "s.bin").open("r+b") as file:
        file.write(b"\xff" * 200)
    for n in range(samples.samples_per_epoch):
        with pytest.raises(TokenStoreError, match=r"s\.bin: token id -1 at token \d+ \(byte \d+\) of document 0 is outside"):
            samples.sample(n)


def test_ids_are_checked_at_open_where_that_is_cheap(tmp_path):
    with pytest.raises(TokenStoreError, match=r"token id 49 at token 49"):
        GptSamples(store_of(tmp_path / "s", [50]), 4, seed=0, vocab_size=49)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A store whose index is cached although it is small, and its cache directory."""
    monkeypatch.setattr(gpt, "SMALL_INDEX", 0)
    return store_of(tmp_path / "s", [9] * 40), tmp_path / "index_cache"


def counting(monkeypatch):
    """Counts how often an index is built."""
    calls = []
    real = gpt.build_epoch
    monkeypatch.setattr(gpt, "build_epoch", lambda *a: (calls.append(a), real(*a))[1])
    return calls


def test_a_cached_index_that_is_cut_under_a_run_is_built_again(cached):
    store, directory = cached
    samples = GptSamples(store, 8, seed=1)
    first = [samples.sample(n).tolist() for n in range(44)]
    for path in directory.glob("*.npy"):
        with path.open("r+b") as file:
            file.truncate(130)
    assert [samples.sample(n).tolist() for n in range(44)] == first


def test_documents_that_became_shorter_under_a_run_are_told(tmp_path):
    """Both lengths and offsets of the index were written anew, for the same number of tokens."""
    samples = GptSamples(store_of(tmp_path / "s", [9] * 4), 7, seed=1)
    first = [samples.sample(n).tolist() for n in range(5)]
    assert len(first) == samples.samples_per_epoch
    with (tmp_path / "s.idx").open("r+b") as file:
        file.seek(34 + 16 + 8)
        file.write(np.array([1, 2, 3], "<i8").tobytes())
    with pytest.raises(TokenStoreError, match=r"s\.idx was changed while it was in use: document \d ends before sample \d"):
        for n in range(5):
            samples.sample(n)


def test_the_index_is_cached_by_what_it_depends_on(cached, monkeypatch):
    store, directory = cached
    calls = counting(monkeypatch)
    first = GptSamples(store, 8, seed=1).sample(3).tolist()
    assert len(list(directory.glob("*.npy"))) == 3 and len(list(directory.glob("*.json"))) == 1
    assert GptSamples(store, 8, seed=1).sample(3).tolist() == first and len(calls) == 1
    GptSamples(store, 8, seed=2).sample(0)
    GptSamples(store, 7, seed=1).sample(0)
    GptSamples(store, 8, seed=1).sample(GptSamples(store, 8, seed=1).samples_per_epoch)
    assert len(calls) == 4 and len(list(directory.glob("*.json"))) == 4


@pytest.mark.parametrize("name", ["documents.npy", "starts.npy", "shuffle.npy", "json"])
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone", "other"])
def test_a_damaged_cache_is_built_again(cached, monkeypatch, name, how):
    store, directory = cached
    expected = [GptSamples(store, 8, seed=1).sample(n).tolist() for n in range(20)]
    path = next(p for p in directory.iterdir() if p.name.endswith(name))
    whole = path.read_bytes()
    damaged = {
        "flip": whole[:-1] + bytes([whole[-1] ^ 1]),
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "other": b"[1, 2]" * 99,
    }
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(damaged[how])
    calls = counting(monkeypatch)
    assert [GptSamples(store, 8, seed=1).sample(n).tolist() for n in range(20)] == expected
    assert len(calls) == 1 and path.read_bytes() == whole


def test_an_unwritable_cache_costs_a_warning_only(cached, caplog, tmp_path):
    store, _ = cached
    blocked = tmp_path / "a file"
    blocked.write_text("")
    expected = GptSamples(store, 8, seed=1).sample(0).tolist()
    with caplog.at_level(logging.WARNING):
        assert GptSamples(store, 8, seed=1, cache_dir=blocked / "cache").sample(0).tolist() == expected
    assert "cannot be cached" in caplog.text and "data.cache_dir" in caplog.text


def test_many_ranks_may_build_at_once(cached):
    store, directory = cached
    results, errors = [], []

    def rank():
        try:
            results.append([GptSamples(TokenStore(store.prefix), 8, seed=1).sample(n).tolist() for n in range(10)])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=rank) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and all(result == results[0] for result in results) and len(results) == 8
    assert len(list(directory.iterdir())) == 4
    assert set(json.loads(next(directory.glob("*.json")).read_text())["crc32"]) == {"documents", "starts", "shuffle"}


def test_small_indices_leave_no_files(tmp_path):
    GptSamples(store_of(tmp_path / "s", [9] * 40), 8, seed=1).sample(0)
    assert sorted(p.name for p in Path(tmp_path).iterdir()) == ["s.bin", "s.idx"]
