"""Batches with blanks: of one shape, a function of seed and place alone, mixed as the config says."""

import time
from dataclasses import replace

import numpy as np
import pytest

from megatrain.config.glm_data import BlankConfig, DocumentConfig, GlmConfig, ObjectiveMix, SentenceConfig
from megatrain.data.draws import Draws
from megatrain.data.indexed import TokenStore, TokenStoreError, TokenStoreWriter
from megatrain.data.loader import batch_places
from megatrain.data.samples.glm import KINDS, Drawn, GlmBatches, Plan, text_length
from megatrain.data.samples.gpt import GptSamples
from megatrain.data.samples.infilling import Sentinels
from megatrain.data.samples.pairs import PairSamples

IDS = Sentinels(cls=90, eos=91, mask=92, gmask=93, smask=94, sop=95, eop=96, noise=97)
ENDS = np.arange(98) % 10 == 7
MIX = {"blank": {"blank": 1.0, "sentence": 0.0, "document": 0.0}}
MIX |= {
    "sentence": {"blank": 0.0, "sentence": 1.0, "document": 0.0},
    "document": {"blank": 0.0, "sentence": 0.0, "document": 1.0},
}


class Texts:
    """Text below 90 with documents of so many tokens."""

    def __init__(self, length, document=1000):
        self.length, self.document = length, document

    def sample(self, n):
        return (np.arange(n * self.length, (n + 1) * self.length + 1) * 13 + n) % 90

    def document_numbers(self, n):
        return np.arange(n * self.length, (n + 1) * self.length + 1) // self.document

    def pairs(self, n):
        return None


def batches(seq_length=128, **settings):
    mix = settings.pop("mix", MIX["blank"])
    plan = {name: settings.pop(name) for name in ("isolate", "two_dimensional", "closed", "seed") if name in settings}
    config = GlmConfig(objective_mix=ObjectiveMix(**mix) if isinstance(mix, dict) else mix, **settings)
    return GlmBatches(Plan(config, IDS, seq_length, plan.pop("seed", 5), ENDS, **{"closed": False, **plan}))


def batch_of(compose, consumed=0, size=8, micro=4, rank=0, ranks=1, document=1000):
    texts = Texts(compose.plan.text_length - 1, document)
    return compose(texts, consumed, batch_places(size, micro, rank, ranks))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("document", [1000, 40])
def test_every_batch_has_one_shape(kind, document):
    batch = batch_of(batches(mix=MIX[kind]), document=document)
    for array in (batch.tokens, batch.labels, batch.loss_weights, batch.positions, batch.block_positions):
        assert array.shape == (2, 4, 128)
    assert batch.prefix.shape == (2, 4) and batch.documents is None
    assert (batch.kinds == KINDS.index(kind)).all()
    assert batch.positions.max() < 128 and batch.block_positions.max() <= 128
    for row in range(8):
        tokens, weights, sep = batch.tokens.reshape(8, -1)[row], batch.loss_weights.reshape(8, -1)[row], batch.prefix.flat[row]
        counted = np.flatnonzero(weights)
        assert counted.size and counted[0] >= sep and tokens[0] == IDS.cls
        assert (tokens[:sep] != IDS.sop).all() and tokens[sep] == IDS.sop


def test_each_epoch_cuts_out_other_spans(tmp_path):
    """The one document of a store, once an epoch: the same text, other blanks, again the same in another run."""
    compose = batches(closed=True)
    text = (np.arange(compose.plan.text_length - 1) * 13 % 90).astype(np.uint16)
    with TokenStoreWriter(tmp_path / "one", np.uint16) as writer:
        writer.write(text)
        writer.end_documents(np.array([text.size]))
    samples = GptSamples(TokenStore(tmp_path / "one"), text.size - 1, seed=3)
    assert samples.samples_per_epoch == 1
    epochs = [compose(samples, epoch, batch_places(1, 1, 0, 1)) for epoch in range(8)]
    assert len({np.concatenate(compose.text(samples, epoch)).tobytes() for epoch in range(8)}) == 1
    cut = [tuple(np.flatnonzero(batch.tokens[0, 0, : int(batch.prefix[0, 0])] == IDS.mask)) for batch in epochs]
    assert len(set(cut)) == 8 and min(map(len, cut)) > 1
    again = GptSamples(TokenStore(tmp_path / "one"), text.size - 1, seed=3)
    assert np.array_equal(batches(closed=True)(again, 5, batch_places(1, 1, 0, 1)).tokens, epochs[5].tokens)


def test_what_is_behind_the_text_is_zeros():
    batch = batch_of(batches(mix=MIX["document"]))
    used = int(batch.prefix[0, 0] + batch.block_positions[0, 0].max())
    for array in (batch.tokens, batch.labels, batch.loss_weights, batch.positions, batch.block_positions):
        assert not array[0, 0, used:].any()


def test_the_text_can_be_read_back():
    """Part A with its blanks filled in by part B is the text."""
    compose = batches()
    batch = batch_of(compose)
    for row in range(8):
        tokens, positions = batch.tokens.reshape(8, -1)[row], batch.positions.reshape(8, -1)[row]
        inside, sep = batch.block_positions.reshape(8, -1)[row], int(batch.prefix.flat[row])
        filled = [[token] for token in tokens[:sep]]
        for place in np.flatnonzero(inside == 1):
            end = place + 1
            while end < 128 and inside[end] > 1:
                end += 1
            assert tokens[place] == IDS.sop and batch.labels.reshape(8, -1)[row][end - 1] == IDS.eop
            filled[positions[place]] = tokens[place + 1 : end].tolist()
        text = [token for piece in filled for token in piece]
        assert text == np.concatenate(compose.text(Texts(compose.plan.text_length - 1), row)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_resumes_see_the_same(kind):
    compose = batches(mix=MIX[kind], short_seq_prob=0.3)
    single = batch_of(compose, 16, size=8, micro=2)
    for rank in range(2):
        mine = batch_of(batches(mix=MIX[kind], short_seq_prob=0.3), 16, size=8, micro=2, rank=rank, ranks=2)
        for name in ("tokens", "labels", "loss_weights", "positions", "block_positions", "prefix", "documents", "kinds"):
            whole = getattr(single, name).reshape(8, -1)
            assert np.array_equal(getattr(mine, name).reshape(4, -1), whole[mine.places.flatten()]), name


def test_each_visit_masks_anew():
    compose = batches()
    text = compose.text(Texts(compose.plan.text_length - 1), 3)
    one, other = (compose.lay_out(Draws(5, 12, n), text, Drawn(0))[0] for n in (3, 103))
    assert not np.array_equal(one.tokens, other.tokens)
    again = batches(seed=6)
    assert not np.array_equal(batch_of(again).tokens, batch_of(compose).tokens)


def test_shares_of_the_objectives():
    mix = {"blank": 0.5, "sentence": 0.3, "document": 0.2}
    compose = batches(mix=mix)
    of_batches = np.array([batch_of(compose, 8 * n).kinds for n in range(400)])
    assert (of_batches == of_batches[..., :1]).all(), "one draw for a micro-batch"
    assert np.bincount(of_batches[..., 0].flatten()) / 800 == pytest.approx([0.5, 0.3, 0.2], abs=0.05)
    of_samples = np.array([batch_of(batches(mix=mix, objective_granularity="sample"), 8 * n).kinds for n in range(100)])
    assert (of_samples != of_samples[..., :1]).any()
    assert np.bincount(of_samples.flatten()) / 800 == pytest.approx([0.5, 0.3, 0.2], abs=0.05)


def test_weighted_batches_have_all_objectives():
    mix = ObjectiveMix(mode="weighted", blank=2.0, sentence=0.0, document=0.5)
    assert batch_of(batches(mix=mix)).kinds.flatten().tolist() == [0, 2] * 4


def test_normalised_within_micro_batches():
    batch = batch_of(batches(loss_norm="microbatch"))
    assert batch.loss_weights.sum((1, 2)) == pytest.approx([1, 1], abs=1e-6)
    mix = ObjectiveMix(mode="weighted", blank=1.0, sentence=0.0, document=1.0)
    batch = batch_of(batches(mix=mix, loss_norm="microbatch"))
    for kind in (0, 2):
        assert (batch.loss_weights * (batch.kinds == kind)[..., None]).sum((1, 2)) == pytest.approx([1, 1], abs=1e-6)


def test_length_of_the_long_blank():
    """One length for a micro-batch, uniform between half of the shortest text and all but 2 tokens of the longest."""
    compose = batches(mix=MIX["document"], document=DocumentConfig(suffix_prob=1.0))
    n = compose.plan.text_length
    lengths = []
    for number in range(300):
        batch = batch_of(compose, 8 * number)
        spans = batch.block_positions.max(-1)
        assert (spans == spans[:, :1]).all()
        lengths += spans[:, 0].tolist()
    assert min(lengths) == n // 2 and max(lengths) == n - 2
    assert np.mean(lengths) == pytest.approx((n // 2 + n - 2) / 2, rel=0.03)


def test_glm_130b():
    """30% of the samples have short blanks, 70% a suffix of uniform length, each its own."""
    document = DocumentConfig(min_ratio=0.0, max_ratio=1.0, suffix_prob=1.0, length_granularity="sample")
    mix = {"blank": 0.3, "sentence": 0.0, "document": 0.7}
    compose = batches(mix=mix, document=document, objective_granularity="sample", two_dimensional=False)
    kinds, lengths = [], []
    for number in range(150):
        batch = batch_of(compose, 8 * number)
        kinds += batch.kinds.flatten().tolist()
        long = batch.kinds == 2
        lengths += batch.block_positions[long].max(-1).tolist()
        assert (batch.tokens[long] == IDS.gmask).sum() == long.sum()
    assert np.mean(np.array(kinds) == 2) == pytest.approx(0.7, abs=0.05)
    n = compose.plan.text_length
    assert min(lengths) <= 3 and max(lengths) >= n - 4 and np.mean(lengths) == pytest.approx(n / 2, abs=4)
    batch = batch_of(batches(mix=MIX["document"], document=document, two_dimensional=False))
    used = int(batch.prefix[0, 0] + batch.block_positions[0, 0].max())
    assert batch.positions[0, 0, :used].tolist() == list(range(used)), "positions count on behind a [gMASK]"


def test_one_token_for_all_masks():
    ids = replace(IDS, gmask=92, smask=92)
    plan = replace(batches(mix=MIX["sentence"]).plan, ids=ids)
    assert (batch_of(GlmBatches(plan)).tokens == 92).any()


def test_a_sample_that_cannot_be_placed_has_no_loss():
    compose = batches(blank=BlankConfig(mask_ratio=0.6, min_gap=20), text_length=80)
    batch = batch_of(compose, document=16)
    unplaced = ~batch.loss_weights.any(-1)
    assert unplaced.any()
    row = batch.tokens[unplaced][0]
    assert row[0] == IDS.cls and not np.isin(row, [IDS.mask, IDS.sop]).any() and row.any()


def test_blanks_that_take_too_much_room_have_no_loss():
    compose = batches(text_length=126, blank=BlankConfig(mask_ratio=0.3, max_span=1))
    batch = batch_of(compose)
    assert not batch.loss_weights.any()


@pytest.mark.parametrize("kind", KINDS)
def test_room_is_left_for_nearly_every_draw(kind):
    compose = batches(512, mix=MIX[kind], sentence=SentenceConfig(mask_ratio=0.1))
    placed = [batch_of(compose, 8 * n).loss_weights.any(-1) for n in range(100)]
    assert np.mean(placed) > 0.995
    assert text_length(compose.plan.config, 512) > (430 if kind != "document" else 508)


def test_short_texts_lie_apart():
    compose = batches(256, short_seq_prob=1.0)
    batch = batch_of(compose)
    assert batch.documents.shape == batch.prefix.shape == batch.tokens.shape
    tokens, documents, prefix = batch.tokens[0, 0], batch.documents[0, 0], batch.prefix[0, 0]
    texts = int(documents.max())
    assert texts >= 1 and (np.diff(documents) >= 0).all()
    for number in range(texts):
        mine = np.flatnonzero(documents == number)
        assert tokens[mine[0]] == IDS.cls and batch.positions[0, 0, mine[0]] == 0
        assert (prefix[mine] == prefix[mine[0]]).all() and tokens[prefix[mine[0]]] in (IDS.sop, IDS.cls, 0)
    several = [batch_of(compose, 8 * n).documents.max() for n in range(40)]
    assert max(several) >= 5 and len(set(several)) > 3


def test_short_texts_end_with_sentences():
    compose = batches(256, short_seq_prob=1.0)
    text = np.concatenate([[IDS.cls], np.arange(200) % 90])
    pieces = compose._short_texts(text, 40)
    assert [piece[0] for piece in pieces] == [IDS.cls] * len(pieces)
    assert all(ENDS[piece[-1]] for piece in pieces)
    assert np.concatenate([piece[1:] for piece in pieces]).tolist() == text[1 : 1 + sum(p.size - 1 for p in pieces)].tolist()


def test_documents_are_isolated_where_asked_for():
    batch = batch_of(batches(isolate=True), document=40)
    documents = batch.documents[0, 0]
    assert documents.max() >= 2
    for number in range(int(documents.max())):
        mine = documents == number
        assert batch.tokens[0, 0][mine][0] == IDS.cls
        assert batch.loss_weights[0, 0][mine].any()


def test_documents_have_their_sentinels():
    open_ended, closed = (batches(closed=closed).text(Texts(100, 30), 0) for closed in (False, True))
    assert [d.size for d in open_ended[:3]] == [32, 32, 32] and all(d[-1] == IDS.eos for d in open_ended[:3])
    assert [d.size for d in closed[:3]] == [31, 31, 31]
    assert all(d[0] == IDS.cls for d in (*open_ended, *closed))


@pytest.mark.parametrize("kind", KINDS)
def test_speed(kind):
    """At least 100 thousand tokens a second on one core; this machine makes several times as many."""
    compose = batches(512, mix=MIX[kind])
    texts, places = Texts(compose.plan.text_length - 1), batch_places(64, 16, 0, 1)
    best = 0.0
    for attempt in range(5):
        began = time.process_time()
        compose(texts, 64 * attempt, places)
        best = max(best, 64 * 512 / (time.process_time() - began))
    assert best > 100_000, f"{best:,.0f} tokens/s"


class Pairs(Texts):
    """Prompts and answers; every third sample is text."""

    def pairs(self, n):
        short = [(np.arange(5), np.arange(10, 13)), (np.arange(20, 27), np.array([40, IDS.eos]))]
        return None if n % 3 == 2 else [*short, (np.arange(300), np.arange(9))]


def test_prompts_and_answers():
    compose = batches(64, mix=MIX["blank"])
    compose = GlmBatches(replace(compose.plan, answers=True))
    batch = compose(Pairs(compose.plan.text_length - 1), 0, batch_places(4, 4, 0, 1))
    assert batch.kinds.tolist() == [[2, 2, 0, 2]]
    tokens, labels, weights = batch.tokens[0, 0], batch.labels[0, 0], batch.loss_weights[0, 0]
    assert tokens[:11].tolist() == [IDS.cls, 0, 1, 2, 3, 4, IDS.gmask, IDS.sop, 10, 11, 12]
    assert labels[7:11].tolist() == [10, 11, 12, IDS.eos] and weights[:11].tolist() == [0] * 7 + [1] * 4
    assert tokens[11:22].tolist() == [IDS.cls, *range(20, 27), IDS.gmask, IDS.sop, 40]
    assert labels[20:22].tolist() == [40, IDS.eos]
    assert not tokens[22:].any(), "the third has no room left"
    assert batch.documents[0, 0, :23].tolist() == [0] * 11 + [1] * 11 + [2]
    assert batch.prefix[0, 0, :23].tolist() == [7] * 11 + [11 + 9] * 11 + [0]


def test_a_prompt_that_is_too_long_loses_its_beginning():
    compose = GlmBatches(replace(batches(64).plan, answers=True))
    (laid,) = compose.answered([(np.arange(300) % 90, np.arange(9))])
    assert len(laid) <= 64 and laid.tokens[laid.sep - 2] == 299 % 90 and laid.targets[-1] == IDS.eos


def test_pairs_of_two_stores(tmp_path):
    stores = []
    for name, sizes in (("prompts", [3, 5, 2, 4]), ("answers", [1, 2, 3, 2])):
        with TokenStoreWriter(tmp_path / name, np.uint16) as writer:
            for number, size in enumerate(sizes):
                writer.write(np.full(size, 10 * (name == "answers") + number, np.uint16))
                writer.end_documents(np.array([size]))
        stores.append(TokenStore(tmp_path / name))
    samples = PairSamples(*stores, 20, seed=1)
    assert samples.together == 2
    seen = [pair for n in range(2) for pair in samples.pairs(n)]
    assert sorted(int(prompt[0]) for prompt, _ in seen) == [0, 1, 2, 3]
    assert all(answer[0] == prompt[0] + 10 for prompt, answer in seen)
    epochs = [tuple(int(p[0]) for n in (2 * e, 2 * e + 1) for p, _ in samples.pairs(n)) for e in range(6)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {(0, 1, 2, 3)} and len(set(epochs)) > 2
    with TokenStoreWriter(tmp_path / "one", np.uint16) as writer:
        writer.write(np.ones(3, np.uint16))
        writer.end_documents(np.array([3]))
    with pytest.raises(TokenStoreError, match=r"holds 4 prompts and .* 1 answers"):
        PairSamples(stores[0], TokenStore(tmp_path / "one"), 20, seed=1)
