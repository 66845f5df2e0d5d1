"""The weights of corpora over a run: where each piece begins, and what it gives to whom."""

from fractions import Fraction

import pytest

from megatrain.config.load import from_dict
from megatrain.config.pieces import Weighting, as_written, begin_of, end_of, pieces_of


def config(schedule=(), train=("a", "b"), replay=None, **run):
    run = {"steps": 100, "global_batch_size": 8} | run
    if "tokens" in run:
        del run["steps"]
    data = {"train": list(train), "schedule": list(schedule), "replay": replay}
    return from_dict({"model": {"seq_length": 16}, "data": data, "train": run})


@pytest.mark.parametrize(
    ("place", "run", "sample"),
    [
        ({"from_share": 0}, {}, 0),
        ({"from_share": 0.9}, {}, 720),
        ({"from_share": 0.901}, {}, 728),  # a step that is begun is not done
        ({"from_share": 0.1}, {"steps": 30}, 24),  # three steps, not four: 0.1 is a tenth
        ({"from_step": 7}, {}, 56),
        ({"from_step": 7}, {"batch_ramp": [2, 2, 40]}, 14),
        ({"from_share": 0.5}, {"batch_ramp": [2, 2, 40]}, 338),  # 14 + 16 + 12 samples in 13 steps, and 37 of 8
        ({"from_tokens": 1000}, {}, 63),
        ({"from_share": 0.5}, {"tokens": 10_000}, 313),  # 5000 tokens
        ({"from_step": 7}, {"tokens": 10_000}, 56),
    ],
)
def test_where_a_piece_begins(place, run, sample):
    of = config([{**place, "weights": {"a": 1, "b": 1}}], **run)
    assert begin_of(of.data.schedule[0], of) == sample


def test_a_piece_ahead_is_counted_in_the_batches_ahead():
    """At step 10 the run went on with another batch: 90 steps of 16 are ahead."""
    of = config([{"from_step": 60, "weights": {"a": 1, "b": 1}}], global_batch_size=16)
    assert begin_of(of.data.schedule[0], of, step=10, consumed=80) == 80 + 50 * 16
    assert end_of(of, step=10, consumed=80) == 80 + 90 * 16
    assert begin_of(of.data.schedule[0], of, step=60, consumed=500) <= 500
    assert end_of(config(tokens=10_000)) == 632  # 625 samples, in whole batches
    assert end_of(of, step=101, consumed=900) == 900


def test_pieces_follow_each_other():
    of = config(
        [{"from_step": 0, "weights": {"a": 1, "b": 0}}, {"from_share": 0.5, "weights": {"b": 3, "a": 1}}],
        train=["a", {"path": "b"}, {"path": "c", "epochs": 2}],
    )
    assert pieces_of(of) == (Weighting(0, (1, 0, 0)), Weighting(400, (1, 3, 0)))
    assert pieces_of(config()) == (Weighting(0, (1, 1)),)
    assert pieces_of(of, step=70, consumed=560)[-1] == Weighting(400, (1, 3, 0))


def test_corpora_go_by_their_names_or_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    train = [{"path": "~/a"}, {"path": "b", "name": "wiki"}]
    of = config([{"from_share": 0.5, "weights": {"wiki": 2, "~/a": 1}}], train)
    assert pieces_of(of)[1].weights == (1, 2)


def test_replay_is_the_share_of_old_corpora_in_every_piece():
    train = [{"path": "a", "old": True, "weight": 3}, {"path": "b", "old": True}, {"path": "c", "weight": 5}, "d"]
    of = config([{"from_share": 0.5, "weights": {"a": 0, "b": 1, "c": 1, "d": 1}}], train, replay=0.2)
    first, second = (piece.weights for piece in pieces_of(of))
    assert first == pytest.approx((0.15, 0.05, 0.8 * 5 / 6, 0.8 / 6)) and second == pytest.approx((0, 0.2, 0.4, 0.4))
    alone = config([{"from_share": 0.5, "weights": {"a": 0, "b": 0, "c": 1, "d": 1}}], train, replay=0.2)
    assert pieces_of(alone)[1].weights == (0, 0, 1, 1), "where no old corpus has a weight, the others have all"


def test_numbers_are_read_as_written():
    assert as_written(0.1) == Fraction(1, 10) and as_written(2) == 2
