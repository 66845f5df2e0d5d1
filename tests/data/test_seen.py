"""How often each document will be seen, told before a run begins, and what works where its corpora do not last."""

import re
from fractions import Fraction

import pytest

from megatrain.config.load import from_dict, load_overrides
from megatrain.data.blended import BlendedSamples
from megatrain.data.seen import Reached, Seen, dealt, report, warnings
from megatrain.data.terms import terms_of

BEGIN = Reached()


class Corpus:
    """A corpus of so many samples an epoch."""

    def __init__(self, samples, tokens=16):
        self.samples_per_epoch, self.tokens_per_sample = samples, tokens


def config(train, schedule=(), **run):
    run = {"steps": 100, "global_batch_size": 8} | run
    if "tokens" in run:
        del run["steps"]
    return from_dict({"model": {"seq_length": 16}, "data": {"train": train, "schedule": list(schedule)}, "train": run})


def blend(of, sizes, place=BEGIN):
    corpora = [Corpus(size) if isinstance(size, int) else Corpus(*size) for size in sizes]
    per_epoch = [corpus.samples_per_epoch for corpus in corpora]
    return BlendedSamples(corpora, terms_of(of, per_epoch, place.step, place.consumed))


def test_the_report():
    of = config(
        [
            {"path": "corpora/web", "weight": 0.7},
            {"path": "code", "weight": 0.3, "max_epochs": 2},
            {"path": "w", "name": "wiki", "epochs": 3},
        ],
        [{"from_share": 0.75, "weights": {"corpora/web": 1, "code": 3}}],
    )
    assert report(of, blend(of, [4000, 100, (Fraction(70, 3), 20)])) == [
        "corpus              samples              tokens    epochs  each document is seen",
        "corpora/web             530               8,480      0.13  0 or 1 times",
        "code                    200               3,200      2.00  2 times",
        "wiki                     70               1,400      3.00  3 times",
        "total                   800              13,080",
        "from step 1: corpora/web 63.9%, code 27.4%, wiki 8.8%",
        "from step 76: corpora/web 22.9%, code 68.6%, wiki 8.5%",
        "from step 82: corpora/web 91.2%, wiki 8.8%; code has been seen 2 times, and leaves",
    ]


def test_a_report_half_way_is_of_what_is_ahead():
    of = config(["a", "b"], [{"from_step": 50, "weights": {"a": 1, "b": 3}}, {"from_step": 90, "weights": {"a": 1, "b": 0}}])
    lines = report(of, blend(of, [1000, 1000]), Reached(60, 480))
    assert lines[-2:] == ["from step 61: a 25.0%, b 75.0%", "from step 91: a 100.0%"]
    assert lines[1].split() == ["a", "360", "5,760", "0.36", "0", "or", "1", "times"]


def test_a_long_path_is_shown_by_its_end():
    of = config([f"{'x' * 50}/web", "b"])
    assert report(of, blend(of, [9, 9]))[1].startswith(f"...{'x' * 33}/web ")


def test_how_often_in_words():
    assert [Seen("a", 0, 0, Fraction(times)).times for times in ("2", "1", "0.25", "7/2")] == [
        "2 times",
        "once",
        "0 or 1 times",
        "3 or 4 times",
    ]


def test_text_that_is_seen_too_often_is_told():
    of = config(["a", {"path": "b", "max_epochs": 6}, {"path": "c", "weight": 1}])
    assert warnings(of, blend(of, [50, 40, 70])) == [
        "warning: a is seen 5.6 times by the end; beyond 4 times repeated text teaches ever less (arXiv:2305.16264). Add text, give it a "
        "smaller weight or max_epochs, or train on fewer tokens"
    ]
    assert warnings(of, blend(of, [75, 75, 75])) == []


# --- what does not last: the advice is followed ---------------------------------------------------------------------------


def refusal(of, sizes, place=BEGIN):
    with pytest.raises(ValueError) as raised:
        dealt(of, blend(of, sizes, place), place)
    return str(raised.value)


def test_corpora_that_end_before_the_run():
    train = [{"path": "web", "max_epochs": 2}, {"path": "code", "epochs": 4}]
    of = config(train)
    assert refusal(of, [150, 60]) == (
        "the corpora of data.train end before the run does: at its sample 540 of 800, in step 68, web has been seen 2 times and code has "
        "been seen 4 times. Use train.steps=67, or epochs and max_epochs that are 1.49 times as large, or no max_epochs for one of them."
    )
    for works in (
        load_overrides(of, ["train.steps=67"]),
        config([{"path": "web", "max_epochs": 2.98}, {"path": "code", "epochs": 5.96}]),
        config([{"path": "web"}, {"path": "code", "epochs": 4}]),
    ):
        dealt(works, blend(works, [150, 60]))


def test_with_a_length_in_tokens_the_advice_is_in_tokens():
    of = config([{"path": "web", "epochs": 2}], tokens=12_000)
    said = refusal(of, [150])
    assert said.endswith("Use train.tokens=4736, or epochs and max_epochs that are 2.51 times as large."), said  # 37 steps
    shorter = config([{"path": "web", "epochs": 2}], tokens=4736)
    assert dealt(shorter, blend(shorter, [150])).terms.end == 296
    assert "Use epochs and max_epochs that are" in refusal(of, [3]), "no run is so short"


def test_where_the_schedule_leaves_out_those_that_last():
    of = config(["web", {"path": "code", "max_epochs": 1}], [{"from_share": 0.5, "weights": {"web": 0, "code": 1}}])
    assert refusal(of, [900, 250]) == (
        "the corpora of data.train end before the run does: at its sample 450 of 800, in step 57, code has been seen once, and the "
        "weights there have no other. Give web one there, or raise max_epochs."
    )


@pytest.mark.parametrize("length", [{"steps": 100}, {"tokens": 12_800}])
def test_epochs_that_leave_nothing_to_weights(length):
    of = config(["web", {"path": "code", "epochs": 4}], **length)
    said = refusal(of, [900, 201])
    longer = {"steps": "train.steps=101", "tokens": "train.tokens=12880"}[next(iter(length))]
    assert said == (
        "the epochs of data.train ask for 804 samples, and the run has 800 ahead, so that nothing is left for web, which has a weight. Use "
        f"{longer} or more, smaller epochs, or max_epochs in the place of epochs."
    )
    works = load_overrides(of, [re.search(r"train\.\w+=\d+", said)[0]])
    dealt(works, blend(works, [900, 201]))
