import json
import math

import pytest

from megatrain.evaluation.compared import compared, comparison_table, differences_of_manner, read_results, verdicts
from megatrain.evaluation.comparison import UnpairedError
from megatrain.evaluation.items import TaskError


def result(metrics, per_item, **more):
    count = len(next(iter(per_item["values"].values())))
    items = {"ids": [f"i{n}" for n in range(count)], "statistics": {}, **per_item}
    return {"hash": "h", "num_fewshot": 0, "metrics": {name: {} for name in metrics}, "per_item": items, **more}


def of(**tasks):
    return {"format": "megatrain-eval-1", "asked": {"seed": 1, "limit": None}, "tasks": tasks}


def right(*values):
    return of(quiz=result(["acc"], {"values": {"acc": list(values)}}))


def test_right_and_wrong_are_paired_by_item():
    before, after = right(*[1.0] * 10, *[0.0] * 30), right(*[1.0] * 10, *[1.0] * 12, *[0.0] * 18)
    (one,) = compared(before, after)
    assert (one.task, one.metric) == ("quiz", "acc")
    difference = one.difference
    assert (difference.first, difference.second, difference.value) == (0.25, 0.55, pytest.approx(0.3))
    assert difference.seen and difference.p == pytest.approx(2.0**-12)  # mid-p of 12 to 0
    assert difference.test == "McNemar's mid-p"
    shown = comparison_table([one]).splitlines()
    assert shown[0].split()[:4] == ["task", "metric", "first", "second"]
    assert shown[1].split()[:5] == ["quiz", "acc", "0.2500", "0.5500", "+0.3000"] and " ** " in shown[1]
    assert shown[2].startswith("1 of 1 differences is more than chance would explain")


def test_what_is_seen_alone_may_be_chance_among_many():
    before, after = ({"acc": [*values], "acc_norm": [1.0] * 6} for values in ([0.0] * 6, [1.0] * 6))
    found = compared(
        of(quiz=result(["acc", "acc_norm"], {"values": before})), of(quiz=result(["acc", "acc_norm"], {"values": after}))
    )
    assert [one.difference.p for one in found] == pytest.approx([2.0**-6, 1.0])
    assert "+1.0000 **" in comparison_table(found)
    assert "+1.0000 * " in comparison_table(found + found[1:] * 2)


def test_a_sentence_for_the_first_metric_of_each_task():
    found = compared(right(*[1.0] * 9, 0.0), right(*[0.0] * 9, 0.0))
    (said,) = verdicts(found)
    assert said.startswith("quiz acc: the first is better than the second: the second less the first is -0.9 (95%: -")


def test_the_order_of_items_does_not_matter():
    before, after = right(1.0, 0.0, 0.0, 1.0), right(1.0, 0.0, 0.0, 1.0)
    items = after["tasks"]["quiz"]["per_item"]
    items["ids"], items["values"]["acc"] = items["ids"][::-1], items["values"]["acc"][::-1]
    assert compared(before, after)[0].difference.p == 1.0


def test_sums_classes_and_translations():
    documents = {
        "values": {"nats": [2.0, 4.0, 6.0], "bytes": [2.0, 2.0, 2.0], "tokens": [1.0, 2.0, 3.0], "words": [1.0, 1.0, 1.0]}
    }
    worse = {"values": {**documents["values"], "nats": [3.0, 5.0, 7.0]}}
    names = ["bits_per_byte", "perplexity", "word_perplexity"]
    found = {one.metric: one.difference for one in compared(of(t=result(names, documents)), of(t=result(names, worse)))}
    assert (found["bits_per_byte"].first, found["bits_per_byte"].second) == pytest.approx((2 / math.log(2), 2.5 / math.log(2)))
    assert found["word_perplexity"].second == pytest.approx(math.exp(5))
    labels, said = ["a", "b", "a", "b"], ["a", "a", "a", "b"]
    classes = [
        result(
            ["accuracy", "macro_f1"],
            {"values": {"acc": [1.0] * 4}, "labels": labels, "predicted": one},
            confusion={"classes": ["a", "b"]},
        )
        for one in (labels, said)
    ]
    found = {one.metric: one.difference for one in compared(of(t=classes[0]), of(t=classes[1]))}
    assert (found["macro_f1"].first, found["macro_f1"].second) == pytest.approx((1.0, (0.8 + 2 / 3) / 2))
    counts = [[4.0, 4.0, *[4.0, 3.0, 2.0, 1.0], *[4.0, 3.0, 2.0, 1.0]]] * 2
    same = result(["bleu"], {"values": {"f1": [1.0, 1.0]}, "statistics": {"bleu": counts}})
    assert compared(of(t=same), of(t=same))[0].difference.first == pytest.approx(100.0)


def test_clusters_and_means():
    before = result(["f1"], {"values": {"f1": [0.2, 0.4, 0.6, 0.8]}, "clusters": ["a", "a", "b", "b"]})
    after = result(["f1"], {"values": {"f1": [0.3, 0.6, 0.6, 0.9]}, "clusters": ["a", "a", "b", "b"]})
    (one,) = compared(of(t=before), of(t=after))
    assert (one.difference.units, one.difference.test) == (2, "paired t over clusters")


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(TaskError, match="the results have no task in common: quiz and other"):
        compared(right(1.0), of(other=result(["acc"], {"values": {"acc": [1.0]}})))
    with pytest.raises(UnpairedError, match=r"the two results are of 1 and 2 items"):
        compared(right(1.0), right(1.0, 0.0))
    other = right(1.0)
    other["tasks"]["quiz"]["hash"] = "g"
    with pytest.raises(UnpairedError, match="the two results are of different tasks"):
        compared(right(1.0), other)
    for broken in (
        {},
        [],
        {"hash": "h", "metrics": {"acc": {}}, "per_item": {"ids": ["i0"]}},
        {**right(1.0)["tasks"]["quiz"], "per_item": None},
    ):
        with pytest.raises(TaskError, match="quiz: a part of the results is missing or of another kind"):
            compared(right(1.0), of(quiz=broken))
    path = tmp_path / "r.json"
    with pytest.raises(TaskError, match=r"r\.json: no such file of results"):
        read_results(path)
    for text in ("{", "[]", '{"format": "other"}'):
        path.write_text(text)
        with pytest.raises(TaskError, match=r"r\.json is no file of results"):
            read_results(path)
    path.write_text(json.dumps(right(1.0)))
    assert read_results(path) == right(1.0)


def test_how_they_were_asked_differently():
    other = right(1.0)
    other["asked"]["seed"] = 2
    other["tasks"]["quiz"]["num_fewshot"] = 3
    assert list(differences_of_manner(right(1.0), other)) == [
        "they were not asked alike: seed is 1 and 2",
        "quiz: not asked alike, with 0 and 3 examples",
    ]
    assert list(differences_of_manner(other, other)) == []
