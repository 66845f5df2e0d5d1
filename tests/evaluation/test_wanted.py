import pytest

from megatrain.evaluation.items import Item
from megatrain.evaluation.prompts import Manner
from megatrain.evaluation.questions import Question
from megatrain.evaluation.scoring import Likelihood
from megatrain.evaluation.task_keys import TaskKeys
from megatrain.evaluation.tasks import EvalTask
from megatrain.evaluation.wanted import Wanted, Written, outcome, read_label, wanted


def task_of(kind, question, **keys):
    return EvalTask("t", TaskKeys(output_type=kind, **keys), None, (question,), ())


def question(**of):
    return Question(Item("f", 1, {}), "Q:", **of)


def sums(*totals, tokens=2, greedy=False):
    return [Likelihood(total, greedy, tokens) for total in totals]


CHOICES = question(choices=("be", "abcdef", "中"), right=(1,), targets=("abcdef",))
TWO = question(choices=("good", "bad"), right=(1,), targets=("bad",))


def test_multiple_choice_is_one_pass():
    task = task_of("multiple_choice", CHOICES, doc_to_choice="c")
    asked = wanted(task, CHOICES, "context Q:", Manner())
    assert asked == Wanted(
        (("context Q:", " be"), ("context Q:", " abcdef"), ("context Q:", "中"), ("", " be"), ("", " abcdef"), ("", "中"))
    )
    found = outcome(task, CHOICES, sums(-3.0, -6.0, -2.9, -3.5, -9.0, -3.0), None)
    # sums: 中; by characters -1.5, -1, -2.9: abcdef; by bytes -1.5, -1, -0.97: 中; by tokens as sums; gains .5, 3, .1: abcdef
    assert found.record["picked"] == {"acc": 2, "acc_norm": 1, "acc_bytes": 2, "acc_tokens": 2, "acc_pmi": 1}
    assert found.values == {"acc": 0.0, "acc_norm": 1.0, "acc_bytes": 0.0, "acc_tokens": 0.0, "acc_pmi": 1.0}


def test_several_right_answers():
    both = question(choices=("a", "b", "c"), right=(0, 2), targets=("a", "c"))
    found = outcome(task_of("multiple_choice", both), both, sums(-5, -3, -2, -1, -1, -1), None)
    assert found.values["acc"] == 1.0


def test_classification_by_likelihood_and_by_writing():
    task = task_of("classification", TWO, doc_to_choice=("good", "bad"))
    assert wanted(task, TWO, "c", Manner()).pairs == (("c", " good"), ("c", " bad"))
    found = outcome(task, TWO, sums(-3.0, -2.0), None)
    assert (found.label, found.predicted, found.values) == ("bad", "bad", {"acc": 1.0})
    writes = task_of("classification", TWO, doc_to_choice=("good", "bad"), answered_by="generation")
    assert wanted(writes, TWO, "c", Manner()) == Wanted(prompt="c")
    found = outcome(writes, TWO, [], Written("badly done", "stop", 2))
    assert (found.predicted, found.values) == (None, {"acc": 0.0})


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" Bad.", "bad"),
        ("**BAD** news", "bad"),
        ("badly", None),
        ("it is bad", None),
        ("", None),
        ("very bad", "very bad"),
        ("负面的", "负面"),
        ("：负面", "负面"),
        ("very", None),
    ],
)
def test_labels_in_what_is_written(text, label):
    assert read_label(text, ["bad", "very bad", "负面", "正面"]) == label


def test_cloze():
    plain = question(targets=("word",))
    task = task_of("cloze", plain)
    assert wanted(task, plain, "c", Manner()).pairs == (("c", " word"),)
    found = outcome(task, plain, sums(-2.5, tokens=3, greedy=True), None)
    assert found.values == {"acc": 1.0, "nats": 2.5, "tokens": 3.0}
    placed = question(choices=("吃", "写"), right=(0,), targets=("吃",), after="鱼。")
    task = task_of("loglikelihood", placed, doc_to_choice="c")
    assert wanted(task, placed, "小猫", Manner()).pairs == (("小猫", "吃鱼。"), ("小猫", "写鱼。"))
    assert outcome(task, placed, sums(-4.0, -3.0), None).values == {"acc": 0.0, "nats": 4.0, "tokens": 2.0}


def test_answers_in_words():
    asked = question(targets=("the Blue house", "巴黎市"))
    task = task_of("generate_until", asked)
    assert wanted(task, asked, "c", Manner()) == Wanted(prompt="c")
    assert outcome(task, asked, [], Written(" Blue house!", "stop", 3)).values == {"exact_match": 1.0, "f1": 1.0}
    found = outcome(task, asked, [], Written("巴黎", "length", 2))
    assert found.values == {"exact_match": 0.0, "f1": pytest.approx(0.8)}
    assert found.record == {"answer": "巴黎", "finish": "length"}
    blank = task_of("infilling", asked)
    assert wanted(blank, asked, "[MASK]", Manner()) == Wanted((("[MASK]", " the Blue house"),), "[MASK]")
    found = outcome(blank, asked, sums(-3.0, tokens=4), Written("blue", "stop", 1))
    assert found.values == {"exact_match": 0.0, "f1": pytest.approx(2 / 3), "acc": 0.0, "nats": 3.0, "tokens": 4.0}


def test_documents():
    text = question(targets=("two words, 汉字",))
    task = task_of("loglikelihood_rolling", text)
    assert wanted(task, text, "", Manner()) == Wanted(document="two words, 汉字")
    assert outcome(task, text, sums(-9.0, tokens=7), None).values == {"nats": 9.0, "tokens": 7.0, "bytes": 17.0, "words": 4.0}
