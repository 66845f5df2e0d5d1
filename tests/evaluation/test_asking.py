import sys
import time

import pytest

from megatrain.evaluation.asking import answers_of, ask, prepare
from megatrain.evaluation.items import Item, TaskError
from megatrain.evaluation.prompts import Manner
from megatrain.evaluation.questions import Question
from megatrain.evaluation.scoring import sums_of
from megatrain.evaluation.task_keys import TaskKeys, Writing
from megatrain.evaluation.tasks import EvalTask, load_tasks
from megatrain.inference.requests import Request, Sampling

PLACES = ("Paris", "Rome", "the old town of Salamanca", "北京")


def choices_of(context, count=3):
    asked = [Question(Item("f", n, {"n": n}), f"{context}{n}?", PLACES, (n % 4,), (PLACES[n % 4],)) for n in range(count)]
    return EvalTask("t", TaskKeys(doc_to_choice="c", doc_to_target="a"), None, tuple(asked), tuple(asked))


def test_numbers_do_not_depend_on_what_is_asked_beside(gpt, make_subject):
    task = choices_of("Where is it that people go in number ", 3)
    whole = ask(prepare(task, Manner(), gpt.texts(Manner()), 256), gpt.engine, gpt.ctx)
    one_by_one = make_subject({"seq_length": 256}, {}, most_running=1, prefix_cache=False)
    again = ask(prepare(task, Manner(), gpt.texts(Manner()), 256), one_by_one.engine, gpt.ctx)
    for found, alone in zip(whole, again, strict=True):
        assert found.record["logprobs"] == pytest.approx(alone.record["logprobs"], rel=1e-6)
        assert found.record["unconditional"] == pytest.approx(alone.record["unconditional"], rel=1e-6)
        assert found.values == alone.values


def test_what_is_too_long_is_cut_and_counted_or_refused(gpt):
    task = choices_of("word " * 60)
    asked = prepare(task, Manner(), gpt.texts(Manner()), 256)
    assert (asked.truncated, asked.spanned) == (3, 0)
    assert prepare(choices_of("short "), Manner(), gpt.texts(Manner()), 256).truncated == 0
    with pytest.raises(
        TaskError, match=r"f:0: the item is longer than the model, which has 256 positions\. Use --long cut, fewer examples"
    ):
        prepare(task, Manner(refuse_long=True), gpt.texts(Manner()), 256)


def test_requests_are_counted_once_each_and_progress_is_told(gpt):
    asked = prepare(choices_of("Where is "), Manner(), gpt.texts(Manner()), 256)
    told = []
    ask(asked, gpt.engine, gpt.ctx, told.append)
    assert asked.size == 16 == sum(told)  # 3 questions of 4 choices, and the 4 without a context, which are the same for all


def test_drawn_answers_are_a_function_of_seed_and_item(gpt):
    def texts(seed, order=slice(None)):
        asked = [Question(Item("f", n, {"n": n}), f"Say {n}:", targets=("x",)) for n in range(4)][order]
        keys = TaskKeys(output_type="generate_until", generation_kwargs=Writing((), 6, do_sample=True, temperature=0.9))
        task = EvalTask("t", keys, None, tuple(asked), ())
        manner = Manner(seed=seed)
        found = ask(prepare(task, manner, gpt.texts(manner), 256), gpt.engine, gpt.ctx)
        return {question.text: one.record["answer"] for question, one in zip(asked, found, strict=True)}

    first = texts(1)
    assert texts(1, slice(None, None, -1)) == first != texts(2)
    assert len(set(first.values())) == 4
    assert texts(1, slice(1, 2)) == {"Say 1:": first["Say 1:"]}


def test_answers_end_where_the_task_says(gpt):
    (greedy,) = gpt.engine.run([Request(tuple(b"Say"), 20, Sampling(greedy=True), text=True)])
    stop = next(letter for letter in greedy.text[3:] if letter.isascii())
    keys = TaskKeys(output_type="generate_until", generation_kwargs=Writing(stop, 20))
    question = Question(Item("f", 1, {}), "Say", targets=("x",))
    (found,) = ask(prepare(EvalTask("t", keys, None, (question,), ()), Manner(), gpt.texts(Manner()), 256), gpt.engine, gpt.ctx)
    assert found.record["answer"] == greedy.text.partition(stop)[0]
    assert found.record["finish"] == "stop"


def test_answers_come_in_order(gpt):
    requests = [Request(tuple(b"abc"[: n % 3 + 1]), n % 5 + 1) for n in range(12)]
    told = []
    assert [len(one.tokens) for one in answers_of(gpt.engine, requests, told.append)] == [n % 5 + 1 for n in range(12)]
    assert sum(told) == 12


def test_an_answer_without_a_token_names_its_item(gpt):
    question = Question(Item("f.jsonl", 3, {}), "Q", (" ", "b"), (0,), (" ",))
    task = EvalTask("t", TaskKeys(doc_to_choice="c", target_delimiter=""), None, (question,), ())

    class Silent:
        def pairs(self, pairs):
            raise ValueError("no token of it")

    with pytest.raises(TaskError, match=r"f\.jsonl:3: no token of it"):
        prepare(task, Manner(), Silent(), 256)


def test_what_a_metric_needs_is_told_before_anything_runs(gpt, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(
        ImportError,
        match=r"the task translate_en_zh \(its metrics bleu and chrf\) needs sacrebleu: pip install 'megatrain\[eval\]'",
    ):
        gpt.prepare(load_tasks(["translate_en_zh"]), Manner())
    gpt.prepare(load_tasks(["qa_zh"], limit=2), Manner())


@pytest.mark.alone
def test_four_choices_of_a_long_context_take_less_than_half_of_each_alone(make_subject):
    subject = make_subject({"seq_length": 1152, "hidden_size": 64}, {})
    each = make_subject({"seq_length": 1152, "hidden_size": 64}, {}, prefix_cache=False)
    task = choices_of("Once upon a time there was a town. " * 29, 1)  # 1,016 bytes, a token each
    asked = prepare(task, Manner(), subject.texts(Manner()), 1152)
    parts = [one.windows for of in asked.scored for one in of[:4]]

    def together():
        subject.engine.new_weights()  # nothing is kept of the run before
        return sums_of(subject.engine, parts)

    def alone():
        return [total for part in parts for total in sums_of(each.engine, [part])]

    def timed(work):
        began = time.process_time()
        found = work()
        return time.process_time() - began, found

    both = [min((timed(work) for _ in range(2)), key=lambda one: one[0]) for work in (together, alone)]
    (fast, found), (slow, wanted) = both
    print(f"together {fast:.2f} s, each alone {slow:.2f} s, {slow / fast:.1f} times")
    assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], rel=1e-6)
    assert slow > 2 * fast
