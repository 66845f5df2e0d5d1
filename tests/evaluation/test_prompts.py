import pytest

from megatrain.evaluation.items import Item
from megatrain.evaluation.prompts import Manner, answer_of, context_of, contexts_of
from megatrain.evaluation.questions import Question, question_of
from megatrain.evaluation.task_keys import TaskKeys
from megatrain.evaluation.tasks import load_tasks

KEYS = TaskKeys(output_type="multiple_choice", doc_to_text="q", doc_to_choice="c", doc_to_target="a", description="Answer.\n\n")


class Brackets:
    """A chat template for tests."""

    ends, stops = frozenset(), ()

    def prompt(self, messages):
        return "".join(f"[{role}: {text}]" for role, text in messages) + "[assistant: "

    def encode(self, text):
        return list(text.encode())


def of(q, right, *others, keys=KEYS):
    return question_of(keys, Item("f", 1, {"q": q, "c": [right, *others], "a": 0}))


def test_description_examples_and_question():
    shots = [of("Capital of France?", "Paris", "Rome"), of("法国的首都？", "巴黎", "罗马")]
    asked = of("Capital of Spain?", "Madrid", "Rome")
    assert context_of(KEYS, asked, shots, None) == (
        "Answer.\n\nCapital of France? Paris\n\n法国的首都？巴黎\n\nCapital of Spain?"
    )
    assert [answer_of(KEYS, asked, one, None) for one in ("Madrid", "马德里")] == [" Madrid", "马德里"]


def test_examples_are_turns_of_a_chat():
    shots = [of("Capital of France?", "Paris", "Rome")]
    asked = of("Capital of Spain?", "Madrid", "Rome")
    assert context_of(KEYS, asked, shots, Brackets()) == (
        "[system: Answer.][user: Capital of France?][assistant: Paris][user: Capital of Spain?][assistant: "
    )
    assert answer_of(KEYS, asked, "Madrid", Brackets()) == "Madrid"


def test_blanks():
    cloze = TaskKeys(output_type="cloze", doc_to_text="q", doc_to_choice="c", doc_to_target="a")
    shots, asked = [of("The cat ___ fish.", "eats", "reads", keys=cloze)], of("A dog ___.", "barks", "meows", keys=cloze)
    assert context_of(cloze, asked, shots, None) == "The cat eats fish.\n\nA dog "
    assert answer_of(cloze, asked, "barks", None) == "barks."
    assert answer_of(cloze, of("A dog ___", "barks", "meows", keys=cloze), "barks", None) == "barks"
    assert context_of(cloze, asked, [], Brackets()) == "[user: A dog ___.][assistant: "
    assert answer_of(cloze, asked, "barks", Brackets()) == "barks"
    infilling = TaskKeys(output_type="infilling", doc_to_text="q", doc_to_target="a")
    shot, question = (Question(Item("f", n, {}), f"{n} [MASK]!", targets=("\\1",)) for n in range(2))
    assert context_of(infilling, question, [shot], None) == "0 \\1!\n\n1 [MASK]!"


@pytest.mark.parametrize(("asked", "shots"), [(None, 1), (0, 0), (4, 4)])
def test_how_many_examples(asked, shots):
    (task,) = load_tasks(["qa_en"])
    context = contexts_of(task, Manner(num_fewshot=asked))[0]
    assert context.count("Passage: ") == shots + 1
    assert context.endswith("Question: When was the mill built?\nAnswer:")


def test_documents_have_no_examples():
    (task,) = load_tasks(["text_en"])
    assert set(contexts_of(task, Manner(num_fewshot=4))) == {""}
