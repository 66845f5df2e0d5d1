"""A run that goes on: its corpora go on behind their last samples, whatever has changed."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.config.load import from_dict
from megatrain.data.blended import BlendedSamples
from megatrain.data.left_out import LeftOut
from megatrain.data.terms import Deal, endless, state_of, terms_of
from megatrain.resuming.dealing import deal_on


def config(data, **run):
    model = {"seq_length": run.pop("seq_length", 16)}
    return from_dict({"model": model, "data": data, "train": {"steps": 100, "global_batch_size": 8, **run}})


def identity(of):
    return {"data": [[f"1-2-{corpus.path}", corpus.weight] for corpus in of.data.train]}


def saved(of, terms, step, consumed, **more):
    """What a checkpoint keeps of a run."""
    length = of.model.seq_length
    return {"identity": identity(of), "deal": state_of(terms, length), "step": step, "tokens": consumed * length} | more


def gone_on(of, progress, windows=()):
    """The terms and the next sample of a run that has taken over a checkpoint."""
    corpora = [SimpleNamespace(samples_per_epoch=50, tokens_per_sample=16) for _ in of.data.train]
    left_out = LeftOut(BlendedSamples(corpora, terms_of(of, [50] * len(corpora))), windows)
    consumed = -(-progress["tokens"] // of.model.seq_length)
    job = SimpleNamespace(config=of, left_out=left_out, identity=identity(of), step=progress["step"], consumed_samples=consumed)
    deal_on(job, SimpleNamespace(progress=progress))
    return left_out.source.terms, left_out.number(consumed)


AB = {"train": ["a", "b"], "schedule": [{"from_share": 0.5, "weights": {"a": 1, "b": 3}}]}
BOUNDED = {"train": [{"path": "a"}, {"path": "b", "weight": 0.5, "max_epochs": 2}, {"path": "c", "epochs": 1.5}]}


@pytest.mark.parametrize("data", [{"train": ["a"]}, AB, BOUNDED])
@pytest.mark.parametrize("windows", [(), [(100, 124)], [(480, 488), (500, 520)]])
@pytest.mark.parametrize("step", [0, 20, 50, 60, 99, 100])
def test_without_a_change_the_terms_are_those_of_the_beginning(data, windows, step):
    of = config(data)
    whole = terms_of(of, [50] * len(of.data.train))
    assert gone_on(of, saved(of, whole, step, 8 * step), windows)[0] == whole


@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from([8, 16, 4]), st.sampled_from([0, 8])), max_size=4),
    st.sampled_from([AB, BOUNDED]),
)
@settings(max_examples=25)
def test_no_sample_is_lost_or_read_twice_through_any_changes(stops, data):
    """Another batch or length at each stop, and samples that are left out."""
    of, windows, step, consumed = config(data), [], 0, 0
    terms = terms_of(of, [50] * len(of.data.train))
    counts = [0] * len(of.data.train)
    n = 0
    for steps, size, window in (*stops, (5, 8, 0)):
        deal = Deal(terms)
        for read in range(n, n + steps * of.train.global_batch_size):
            corpus, place = deal.place(read)
            assert place == counts[corpus]
            counts[corpus] += 1
        step, consumed, n = step + steps, consumed + steps * of.train.global_batch_size, read + 1
        for left_out in range(n, n + window):
            counts[deal.place(left_out)[0]] += 1
        windows.append((n, n + window))
        progress = saved(of, terms, step, consumed)
        of = config(data, global_batch_size=size, steps=120 + step)
        terms, n = gone_on(of, progress, windows)
    assert n == windows[-1][1] and Deal(terms).counts(n) == tuple(counts)


def test_a_longer_run_keeps_what_is_done_and_moves_what_is_ahead():
    whole = terms_of(config(AB), [50, 50])
    longer = config(AB, steps=200)
    terms, n = gone_on(longer, saved(longer, whole, 60, 480))
    deal = Deal(terms)
    assert (n, terms.first, terms.before) == (480, 480, (220, 260))
    assert [(stretch.first, stretch.before) for stretch in deal.stretches] == [(480, (220, 260)), (800, (380, 420))]
    assert deal.counts(1600) == (580, 1020)


def test_epochs_are_of_the_whole_run_when_its_length_changes():
    of = config(BOUNDED)
    whole = terms_of(of, [50, 50, 50])
    longer = config(BOUNDED, steps=150)
    terms, _ = gone_on(longer, saved(of, whole, 40, 320))
    given_before = Deal(whole).counts(320)
    assert terms.before == given_before and given_before[2] == 30  # 75 samples of 800
    assert Deal(terms).counts(1200)[1:] == (100, 75)


def test_other_weights_hold_from_the_next_sample_on():
    was = config({"train": ["a", "b"]})
    now = config({"train": [{"path": "a", "weight": 1}, {"path": "b", "weight": 7}]})
    terms, _ = gone_on(now, saved(was, terms_of(was, [50, 50]), 10, 80))
    assert terms.before == (40, 40) and Deal(terms).counts(160) == (50, 110)
    assert Deal(terms).place(80)[1] == 40, "each text goes on behind its last sample"


def test_texts_go_on_by_what_they_are_and_others_begin():
    """For continued training: old text is replayed from where it was, in another place of the list, and new text begins."""
    was = config({"train": [{"path": "a", "weight": 3}, "b", "a"]})
    now = config({"train": ["new", {"path": "a", "old": True}, {"path": "b", "old": True}], "replay": 0.25})
    whole = endless([3, 1, 1])
    terms, _ = gone_on(now, saved(was, whole, 20, 160))
    assert Deal(whole).counts(160) == (96, 32, 32) and terms.before == (0, 96, 32)
    assert Deal(terms).counts(260) == (75, 109, 44)  # 13 and 12 of 25


def test_checkpoints_of_earlier_releases_have_weights_alone():
    of = config(AB)
    plain = config({"train": ["a", "b"]})
    progress = saved(of, endless([1, 1]), 20, 160)
    del progress["deal"]
    assert gone_on(plain, progress)[0].first == 0
    assert gone_on(of, progress)[0].before == (80, 80)
    first = {"step": 20, "tokens": 160 * 16}
    assert gone_on(of, first)[0] == terms_of(of, [50, 50]), "without an identity the config says it all"


def test_with_samples_of_another_length_as_many_tokens_are_behind():
    was, now = config({"train": ["a", "b"]}), config({"train": ["a", "b"]}, seq_length=32)
    terms, n = gone_on(now, saved(was, terms_of(was, [50, 50]), 10, 80))
    assert (n, terms.first, terms.before) == (40, 40, (20, 20))
