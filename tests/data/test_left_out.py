"""Samples without those of some windows, and where they lie in the files."""

import jobs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.config.schema import CorpusConfig
from megatrain.data.indexed import TokenStore
from megatrain.data.left_out import LeftOut, merged
from megatrain.data.loader import Loader
from megatrain.data.samples.pairs import PairSamples
from megatrain.data.sources import build_samples

WINDOWS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)).map(lambda w: (w[0], w[0] + w[1])), max_size=6)


class Numbers:
    """Samples that are their numbers."""

    def sample(self, n):
        return np.full(5, n)


@given(WINDOWS)
def test_what_is_left_is_numbered_anew(windows):
    out = {n for first, end in windows for n in range(first, end)}
    left = LeftOut(Numbers(), windows)
    expected = [n for n in range(100) if n not in out]
    assert [left.number(n) for n in range(40)] == expected[:40]
    assert all(first < end for first, end in left.windows)
    assert all(a[1] < b[0] for a, b in zip(left.windows, left.windows[1:], strict=False))
    assert left.window(3, 7) == (expected[3], expected[6] + 1)


def test_windows_are_merged():
    assert merged([(5, 6), (2, 4), (4, 5), (9, 9), [3, 5]]) == ((2, 6),)
    left = LeftOut(Numbers(), [(2, 4)])
    left.leave_out((4, 5), (8, 9))
    assert left.windows == ((2, 5), (8, 9))


def test_batches_go_on_behind_a_window_whatever_the_layout():
    samples = LeftOut(Numbers(), [(6, 9), (20, 24)])
    numbers = [n for n in range(60) if n not in (6, 7, 8, 20, 21, 22, 23)]
    for dp in (1, 2, 4):
        found = []
        for rank in range(dp):
            with Loader(samples, 8, 2, rank, dp) as loader:
                found.append(np.stack([loader.batch(consumed).tokens[..., 0] for consumed in range(0, 40, 8)]))
        together = np.stack(found, axis=2).reshape(-1)  # [batch, micro-batch, rank, place]
        assert together.tolist() == numbers[:40]


@pytest.mark.parametrize("corpora", [1, 2])
def test_every_token_is_where_it_is_said_to_be(tmp_path, corpora):
    paths = [str(jobs.write_store(tmp_path / f"text{n}", documents=9 + n, length=14)) for n in range(corpora)]
    samples = build_samples([CorpusConfig(path=path) for path in paths], 16, seed=3)
    for n in range(12):
        parts = []
        for piece in samples.pieces(n):
            store = TokenStore(piece.file.removesuffix(".bin"))
            first, end = store.document_bounds(piece.document)
            assert first <= piece.offset < piece.offset + piece.tokens <= end
            parts.append(np.fromfile(piece.file, np.uint16)[piece.offset : piece.offset + piece.tokens])
        assert np.concatenate(parts).tolist() == samples.sample(n).tolist()


def test_prompts_and_answers_have_their_places(tmp_path):
    stores = [TokenStore(jobs.write_store(tmp_path / name, documents=4, length=6)) for name in ("prompts", "answers")]
    samples = PairSamples(*stores, text_length=40, seed=1)
    for n in range(5):
        pieces, texts = samples.pieces(n), [text for pair in samples.pairs(n) for text in pair]
        assert len(pieces) == len(texts)
        for piece, text in zip(pieces, texts, strict=True):
            assert piece.file == str(tmp_path / ("prompts.bin", "answers.bin")[pieces.index(piece) % 2])
            assert np.fromfile(piece.file, np.uint16)[piece.offset :][: piece.tokens].tolist() == text.tolist()
