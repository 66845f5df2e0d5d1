import math
import sys

import pytest

from megatrain.evaluation.estimates import as_json, estimates_of
from megatrain.evaluation.intervals import Estimate
from megatrain.evaluation.items import Item
from megatrain.evaluation.questions import Question
from megatrain.evaluation.task_keys import TaskKeys
from megatrain.evaluation.tasks import EvalTask
from megatrain.evaluation.wanted import Outcome


def task_of(kind, questions=4, clusters="", **keys):
    asked = [
        Question(Item("f", n, {}), "", targets=("今天下雨",), choices=("a", "b"), cluster=clusters[n : n + 1])
        for n in range(questions)
    ]
    return EvalTask("t", TaskKeys(output_type=kind, **keys), None, tuple(asked), ())


def values(**lists):
    return [Outcome(dict(zip(lists, row, strict=True)), {}) for row in zip(*lists.values(), strict=True)]


def test_right_and_wrong_have_wilsons_interval():
    found = estimates_of(task_of("cloze"), values(acc=[1.0, 0.0, 1.0, 1.0], nats=[1.0] * 4, tokens=[2.0] * 4))
    acc, perplexity = found.metrics["acc"], found.metrics["perplexity"]
    assert (acc.value, acc.units, acc.method) == (0.75, 4, "Wilson")
    assert (acc.low, acc.high) == pytest.approx((0.300642, 0.954413), abs=1e-6)
    assert perplexity.value == pytest.approx(math.exp(0.5))
    clustered = estimates_of(
        task_of("cloze", clusters="aabb", cluster="c"), values(acc=[1.0, 0.0, 1.0, 1.0], nats=[1.0] * 4, tokens=[2.0] * 4)
    )
    assert (clustered.metrics["acc"].value, clustered.metrics["acc"].units) == (0.75, 2)


def test_documents():
    found = estimates_of(
        task_of("loglikelihood_rolling", 2), values(nats=[8.0, 4.0], tokens=[4.0, 2.0], bytes=[10.0, 2.0], words=[3.0, 1.0])
    ).metrics
    assert found["bits_per_byte"].value == pytest.approx(1 / math.log(2))
    wanted = {"byte_perplexity": math.e, "word_perplexity": math.exp(3), "perplexity": math.exp(2)}
    assert {name: found[name].value for name in wanted} == pytest.approx(wanted)


def test_classes_and_some_of_the_items():
    outcomes = [Outcome({"acc": float(a == b)}, {}, a, b) for a, b in (("a", "a"), ("b", "a"), ("b", "b"), ("a", None))]
    found = estimates_of(task_of("classification"), outcomes)
    assert list(found.metrics) == ["accuracy", "macro_f1", "micro_f1", "weighted_f1", "kappa"]
    assert found.metrics["accuracy"].value == 0.5
    assert found.confusion.counts.tolist() == [[1, 0, 1], [1, 1, 0]]
    assert found.report.notes[0] == "1 of 4 answers are none of the classes; they count as wrong"
    assert estimates_of(task_of("classification"), outcomes, [0, 2]).metrics["accuracy"].value == 1.0


def test_translations(monkeypatch):
    outcomes = [Outcome({"exact_match": 1.0, "f1": 1.0}, {"answer": text}) for text in ("今天下雨", "今天下雪", "", "今天下雨")]
    found = estimates_of(task_of("generate_until", language="zh"), outcomes)
    assert list(found.metrics) == ["exact_match", "f1", "bleu", "chrf"]
    assert "tok:zh" in found.corpora["bleu"].signature
    assert 40 < found.metrics["bleu"].value < 80
    assert "tok:13a" in estimates_of(task_of("generate_until", language="en"), outcomes).corpora["bleu"].signature
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"pip install 'megatrain\[eval\]'"):
        estimates_of(task_of("generate_until"), outcomes)


def test_numbers_that_json_has_not():
    found = as_json(Estimate(math.inf, 1.0, math.inf, math.nan, 3, "Wilson"))
    assert found == {"value": None, "low": 1.0, "high": None, "stderr": None, "units": 3, "interval": "Wilson"}
