"""Batches are a function of the samples consumed, whatever the number of data-parallel ranks."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.config.schema import CorpusConfig
from megatrain.data.held_out import HeldOut, build_held_out, evaluation_batches
from megatrain.data.indexed import TokenStore, TokenStoreError, TokenStoreWriter
from megatrain.data.loader import Loader, batch_places, isolated_documents
from megatrain.data.sources import build_samples

S = 6


def write(prefix, tokens, length=10):
    with TokenStoreWriter(prefix, "u2") as writer:
        for start in range(0, len(tokens), length):
            writer.add_document(tokens[start : start + length])
    return str(prefix)


@pytest.fixture
def corpora(tmp_path):
    return (CorpusConfig(write(tmp_path / "a", range(500)), 0.7), CorpusConfig(write(tmp_path / "b", range(500, 1000)), 0.3))


class Numbered:
    """Sample n is filled with n."""

    def sample(self, n):
        return np.full(S + 1, n)


def by_place(batches):
    """{place: (tokens, labels)} over the batches of all ranks."""
    found = {}
    for batch in batches:
        for i, j in np.ndindex(batch.places.shape):
            assert int(batch.places[i, j]) not in found
            found[int(batch.places[i, j])] = (batch.tokens[i, j].tolist(), batch.labels[i, j].tolist())
    return found


@given(st.sampled_from([(8, 1), (8, 2), (8, 4), (24, 2), (24, 3)]), st.sampled_from([1, 2, 4]), st.integers(0, 10**6))
def test_the_union_over_ranks_does_not_depend_on_their_number(sizes, dp_size, consumed):
    global_batch, micro_batch = sizes
    if global_batch % (micro_batch * dp_size):
        return
    ranks = [Loader(Numbered(), global_batch, micro_batch, r, dp_size).build(consumed) for r in range(dp_size)]
    single = Loader(Numbered(), global_batch, 1, 0, 1).build(consumed)
    assert by_place(ranks) == by_place([single]) == {p: ([consumed + p] * S, [consumed + p] * S) for p in range(global_batch)}
    assert all(batch.tokens.shape == (global_batch // micro_batch // dp_size, micro_batch, S) for batch in ranks)


def test_shapes_dtypes_and_shift(corpora):
    with Loader(build_samples(corpora, S, seed=3, vocab_size=1000), 8, 2, 1, 2) as loader:
        batch = loader.batch(16)
    assert batch.tokens.shape == batch.labels.shape == batch.loss_weights.shape == batch.positions.shape == (2, 2, S)
    assert [a.dtype.name for a in (batch.tokens, batch.labels, batch.loss_weights, batch.positions, batch.places)] == [
        "int64", "int64", "float32", "int64", "int64",
    ]  # fmt: skip
    assert (batch.tokens[..., 1:] == batch.labels[..., :-1]).all()
    assert (batch.loss_weights == 1).all() and (batch.positions == np.arange(S)).all()
    assert batch.places.tolist() == [[2, 3], [6, 7]]


def test_a_run_resumes_from_one_integer(corpora):
    samples = build_samples(corpora, S, seed=3)
    with Loader(samples, 4, 2, 0, 1) as loader:
        straight = [loader.batch(consumed).tokens for consumed in range(0, 400, 4)]
    with Loader(build_samples(corpora, S, seed=3), 4, 2, 0, 1) as again:
        for step in (57, 58, 3, 99, 0):
            assert (again.batch(4 * step).tokens == straight[step]).all()


def test_corpora_are_mixed_by_weight(corpora):
    samples = build_samples(corpora, S, seed=3)
    second = sum(int(samples.sample(n)[0] >= 500) for n in range(1000))
    assert second == 300


def test_the_next_batch_is_built_while_this_one_is_used():
    main = threading.get_ident()
    built = []

    class Watched(Numbered):
        def sample(self, n):
            built.append((n, threading.get_ident() == main))
            return super().sample(n)

    with Loader(Watched(), 2, 1, 0, 1) as loader:
        for consumed in (0, 2, 4):
            assert loader.batch(consumed).tokens[:, 0, 0].tolist() == [consumed, consumed + 1]
    assert built == [(0, True), (1, True)] + [(n, False) for n in range(2, 8)]


def test_behind_the_last_batch_nothing_is_read_and_a_read_that_hangs_keeps_nobody():
    read, answers = [], threading.Event()

    class Dead(Numbered):
        def sample(self, n):
            read.append(n)
            if n == 4:
                answers.wait(60)
            return super().sample(n)

    with Loader(Dead(), 2, 1, 0, 1) as loader:
        loader.goes_on = lambda: False
        loader.batch(2)
        assert loader.thread is None
    assert read == [2, 3]
    began = time.monotonic()
    with Loader(Dead(), 2, 1, 0, 1) as loader:
        loader.batch(2)
        while read[-1] != 4:
            time.sleep(0.01)
    assert time.monotonic() - began < 30 and not answers.is_set(), "left while a thread reads"
    answers.set()
    loader.batch(2)
    loader.batch(4)
    assert loader.thread not in (None, threading.get_ident())


def test_an_error_of_the_thread_is_raised_where_its_batch_is_asked_for():
    class Broken(Numbered):
        def sample(self, n):
            if n == 3:
                raise OSError("the disk is gone")
            return super().sample(n)

    with Loader(Broken(), 2, 1, 0, 1) as loader:
        loader.batch(0)
        with pytest.raises(OSError, match="the disk is gone"):
            loader.batch(2)
        assert loader.batch(4).tokens[0, 0, 0] == 4
    loader.close()


@pytest.mark.parametrize(
    ("sizes", "message"), [((10, 4, 0, 1), "Use 8"), ((8, 2, 0, 3), "times 3 data-parallel ranks = 6. Use 6")]
)
def test_sizes_that_do_not_divide_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        batch_places(*sizes)


@pytest.mark.parametrize("sizes", [(0, 1, 0, 1), (4, 0, 0, 1), (4, 1, 1, 1), (4, 1, -1, 1), (4, 1, 0, 0)])
def test_senseless_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        batch_places(*sizes)


def test_missing_data_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        build_samples((), S, 0)
    with pytest.raises(TokenStoreError, match="no file"):
        build_samples((CorpusConfig(str(tmp_path / "none")),), S, 0)


def test_an_id_outside_the_vocabulary_is_refused(corpora, monkeypatch):
    with pytest.raises(TokenStoreError, match=r"b\.bin: token id 999 at token 499 \(byte 998\)"):
        build_samples(corpora, S, 0, vocab_size=999)
    monkeypatch.setattr("megatrain.data.indexed.VERIFY_AT_OPEN", 0)
    with Loader(build_samples(corpora, S, 0, vocab_size=999), 400, 1, 0, 1) as loader:
        with pytest.raises(TokenStoreError, match=r"b\.bin: token id 999 at token 499 \(byte 998\)"):
            loader.batch(0)
        with pytest.raises(TokenStoreError, match="token id"):
            loader.batch(0)


@given(st.integers(2, 200), st.integers(1, 9), st.sampled_from([(4, 1), (4, 2), (8, 2)]), st.sampled_from([1, 2]))
def test_evaluation_predicts_each_token_once_in_order(tmp_path_factory, tokens, seq_length, sizes, dp_size):
    store = TokenStore(write(tmp_path_factory.mktemp("e") / "v", range(tokens)))
    held_out = HeldOut([store], seq_length)
    seen = {}
    counts = set()
    for rank in range(dp_size):
        batches = list(evaluation_batches(held_out, *sizes, rank, dp_size))
        counts.add(len(batches))
        for number, batch in enumerate(batches):
            assert batch.tokens.shape == (sizes[0] // sizes[1] // dp_size, sizes[1], seq_length)
            for i, j in np.ndindex(batch.places.shape):
                used = batch.loss_weights[i, j] == 1
                assert (batch.loss_weights[i, j][~used] == 0).all()
                assert (batch.labels[i, j][used] == batch.tokens[i, j][used] + 1).all()
                seen[number * sizes[0] + int(batch.places[i, j])] = batch.labels[i, j][used].tolist()
    assert [label for place in sorted(seen) for label in seen[place]] == list(range(1, tokens))
    assert counts == {-(-len(held_out) // sizes[0])}


def test_evaluation_is_limited_by_batches(corpora):
    held_out = build_held_out(corpora, S, vocab_size=1000)[""]
    assert len(list(evaluation_batches(held_out, 4, 2, 0, 2, limit=3))) == 3
    assert len(list(evaluation_batches(held_out, 4, 2, 0, 2, limit=10**6))) == -(-len(held_out) // 4)


def test_an_evaluation_cut_short_sees_every_set(tmp_path):
    sets = (CorpusConfig(write(tmp_path / "big", range(600))), CorpusConfig(write(tmp_path / "small", range(1000, 1100))))
    held_out = build_held_out(sets, S)[""]
    first = [int(held_out.sample(n)[0][0]) for n in range(14)]
    assert sum(token >= 1000 for token in first) == 2
    assert [t for t in first if t < 1000] == sorted(t for t in first if t < 1000)


def test_held_out_text_needs_two_tokens(tmp_path):
    with pytest.raises(TokenStoreError, match="2 tokens"):
        HeldOut([TokenStore(write(tmp_path / "v", [1]))], S)
    with pytest.raises(TokenStoreError, match=r"data\.valid"):
        HeldOut([], S)
    assert build_held_out((), S) == {}


def test_held_out_ids_are_checked(tmp_path, monkeypatch):
    store = TokenStore(write(tmp_path / "v", range(100)))
    with pytest.raises(TokenStoreError, match=r"v\.bin: token id"):
        HeldOut([store], S, vocab_size=99)
    monkeypatch.setattr("megatrain.data.indexed.VERIFY_AT_OPEN", 0)
    held_out = HeldOut([store], S, vocab_size=99)
    held_out.sample(0)
    with pytest.raises(TokenStoreError, match="token id 99 at token 99"):
        held_out.sample(len(held_out) - 1)


# --- isolated documents ---------------------------------------------------------------------------------------------------


def test_isolated_documents_count_from_their_start_and_do_not_predict_each_other(tmp_path):
    """Documents of 4 tokens, whose first is a multiple of 4: each position is the token's place in its document's part."""
    corpora = (CorpusConfig(write(tmp_path / "c", range(400), length=4)),)
    with Loader(build_samples(corpora, S, seed=5), 8, 4, 0, 1, compose=isolated_documents) as loader:
        for consumed in (0, 8, 480):
            batch = loader.build(consumed)
            for row, positions, numbers, labels, weights in zip(
                *(a.reshape(-1, S) for a in (batch.tokens, batch.positions, batch.documents, batch.labels, batch.loss_weights)),
                strict=True,
            ):
                starts = [i for i in range(S) if i == 0 or row[i] // 4 != row[i - 1] // 4 or row[i] != row[i - 1] + 1]
                for i in range(S):
                    start = max(s for s in starts if s <= i)
                    assert positions[i] == i - start
                    assert numbers[i] == numbers[start]
                    assert weights[i] == float(labels[i] == row[i] + 1 and labels[i] // 4 == row[i] // 4)
                assert (np.diff(numbers) >= 0).all()


def test_without_isolation_nothing_is_said_of_documents(corpora):
    with Loader(build_samples(corpora, S, seed=5), 8, 4, 0, 1) as loader:
        assert loader.build(0).documents is None


def test_isolated_held_out_documents(tmp_path):
    store = TokenStore(write(tmp_path / "v", range(20), length=7))
    (batch,) = evaluation_batches(HeldOut([store], S, isolate_documents=True), 4, 4, 0, 1)
    tokens, numbers, weights = (a.reshape(-1, S) for a in (batch.tokens, batch.documents, batch.loss_weights))
    assert (numbers[:3] == tokens[:3] // 7).all()
    assert weights[:3].astype(bool).tolist() == [
        [(t + 1) // 7 == t // 7 and t < 19 for t in row] for row in tokens[:3].tolist()
    ]
    assert weights[3].tolist() == [1.0, 0, 0, 0, 0, 0]  # 18 is followed by 19, and that is all


@given(sizes=st.lists(st.integers(1, 5), min_size=3, max_size=12))
def test_a_ramp_gives_every_sample_once_and_in_order(sizes):
    ends = np.cumsum([0, *sizes])

    def size(consumed):
        return sizes[int(np.searchsorted(ends, consumed, side="right")) - 1] if consumed < ends[-1] else 1

    loader, seen, consumed = Loader(Numbered(), size, 1, 0, 1), [], 0
    for expected in sizes:
        batch = loader.build(consumed)
        assert len(batch.places) == expected
        seen += batch.tokens[:, 0, 0].tolist()
        consumed += expected
    assert seen == list(range(sum(sizes)))


def test_the_time_that_a_caller_waits_for_data_is_told():
    class Slow(Numbered):
        def sample(self, n):
            time.sleep(0.02)
            return super().sample(n)

    with Loader(Slow(), 4, 4, 0, 1) as loader:
        loader.batch(0)
        assert loader.waited >= 0.08, "nothing was ready"
        time.sleep(0.5)
        loader.batch(4)
        assert loader.waited < 0.06, "it was made meanwhile"
        loader.batch(8)
        assert loader.waited > 0.04, "the caller was faster"
