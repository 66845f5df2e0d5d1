import pytest

from megatrain.evaluation.items import Item, TaskError
from megatrain.evaluation.questions import delimiter, question_of
from megatrain.evaluation.task_keys import TaskKeys


def asked(fields, **keys):
    given = {"output_type": "multiple_choice", "doc_to_text": "q", "doc_to_choice": "c", "doc_to_target": "a", **keys}
    return question_of(TaskKeys(**given), Item("f.jsonl", 7, fields))


@pytest.mark.parametrize(
    ("answer", "right"), [(1, (1,)), ("y", (1,)), ("0", (0,)), (True, (1,)), ([0, "y"], (0, 1)), ([1], (1,))]
)
def test_right_answers_by_place_and_by_text(answer, right):
    found = asked({"q": "why", "c": ["x", "y"], "a": answer})
    assert (found.right, found.targets) == (right, tuple("xy"[place] for place in right))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q": "", "c": ["x", "y"]}, "f.jsonl:7: there is no field 'a'. The item has q, c."),
        ({"q": "", "c": ["x", "y"], "a": 2}, "f.jsonl:7: doc_to_target is 2, which is none of the 2 choices ['x', 'y']. Give the text"),
        ({"q": "", "c": ["x", "y"], "a": "9" * 5000}, "doc_to_target is '9999"),
        ({"q": "", "c": [float("nan"), "y"], "a": 1}, "choice 0 is nan. Give each choice a text that is not empty."),
        ({"q": float("nan"), "c": ["x", "y"], "a": 0}, "f.jsonl:7: 'q' is nan, and must be text."),
        ({"q": "", "c": ["x", "y"], "a": -1}, "doc_to_target is -1, which is none of"),
        ({"q": "", "c": ["x", "y"], "a": None}, "doc_to_target is None, which is none of"),
        ({"q": "", "c": ["x", "y"], "a": []}, "doc_to_target is an empty list."),
        ({"q": "", "c": ["x"], "a": 0}, "doc_to_choice is ['x']. Give a list of two choices or more."),
        ({"q": "", "c": "xy", "a": 0}, "doc_to_choice is 'xy'. Give a list of two choices or more."),
        ({"q": "", "c": ["x", ""], "a": 0}, "choice 1 is ''. Give each choice a text that is not empty."),
        ({"q": "", "c": ["x", None], "a": 0}, "choice 1 is None."),
        ({"q": "", "c": ["x", "x"], "a": 0}, "the choice 'x' is given twice."),
        ({"q": None, "c": ["x", "y"], "a": 0}, "f.jsonl:7: 'q' is null, and must be text."),
    ],
)  # fmt: skip
def test_items_that_cannot_be_asked(fields, message):
    with pytest.raises(TaskError) as caught:
        asked(fields)
    assert message in str(caught.value)


def test_kinds_without_choices():
    plain = {"doc_to_choice": None}
    assert asked({"q": "why", "a": ["x", "y"]}, output_type="generate_until", **plain).targets == ("x", "y")
    assert asked({"q": "2+2=", "a": 4}, output_type="cloze", **plain).targets == ("4",)
    with pytest.raises(
        TaskError, match=r"f\.jsonl:7: doc_to_target is ''\. Give a text that is not empty, or a list of such texts\."
    ):
        asked({"q": "why", "a": ""}, output_type="cloze", **plain)
    filled = asked({"q": "a [MASK] b", "a": "x"}, output_type="infilling", **plain)
    assert (filled.text, filled.targets) == ("a [MASK] b", ("x",))
    for text, count in (("a b", 0), ("[MASK] [gMASK]", 2)):
        with pytest.raises(TaskError, match=rf"doc_to_text has {count} blanks, and infilling fills one"):
            asked({"q": text, "a": "x"}, output_type="infilling", **plain)


def test_a_cloze_with_choices_has_a_blank():
    found = asked({"q": "小猫____鱼。", "c": ["吃", "写"], "a": "吃"}, output_type="cloze")
    assert (found.text, found.after, found.right) == ("小猫", "鱼。", (0,))
    with pytest.raises(TaskError, match=r"doc_to_text has 0 blanks, and a cloze with choices has one\. Write one ___"):
        asked({"q": "小猫", "c": ["吃", "写"], "a": "吃"}, output_type="cloze")


def test_what_is_asked_when_all_is_done_is_looked_at_before():
    with pytest.raises(TaskError, match=r"f\.jsonl:7: there is no field 'nosuch'\. The item has q, c, a\."):
        asked({"q": "why", "c": ["x", "y"], "a": 0}, doc_to_decontamination_query="nosuch")


def test_choices_that_are_written_in_the_task():
    found = asked({"q": "why", "n": 3, "a": "3"}, doc_to_choice=("{{n}}", "n"))
    assert (found.choices, found.right) == (("3", "n"), (0,))


@pytest.mark.parametrize(
    ("answer", "between"),
    [("Paris", " "), ("巴黎", ""), ("ひらがな", ""), ("《红楼梦》", ""), ("，", ""), ("é", " "), ("한국", " ")],
)
def test_no_blank_stands_before_han_and_kana(answer, between):
    assert delimiter(TaskKeys(), answer) == between
    assert delimiter(TaskKeys(target_delimiter="\n"), answer) == "\n"
