import json
from dataclasses import replace

import pytest

from megatrain.evaluation.contamination import ItemOverlap
from megatrain.evaluation.estimates import estimates_of
from megatrain.evaluation.intervals import proportion
from megatrain.evaluation.items import Item
from megatrain.evaluation.prompts import Manner
from megatrain.evaluation.questions import Question
from megatrain.evaluation.results import averages, document, item_ids, table, write_items, write_json
from megatrain.evaluation.tasks import load_tasks


@pytest.fixture(scope="module")
def results(gpt):
    """Of three shipped tasks, as a model with random weights answers them."""
    tasks = load_tasks(["quiz_zh", "topic_en", "text_en"], limit=4)
    quiz, topic, text = gpt.results(gpt.prepare(tasks, Manner(num_fewshot=1)))
    cut = tuple(replace(one, record={**one.record, "finish": "length"}) for one in topic.outcomes)
    return [quiz, replace(topic, outcomes=cut), text]


def test_a_table_with_what_is_to_be_said(results):
    lines = table(results).splitlines()
    assert lines[0].split() == ["task", "metric", "value", "95%", "interval", "items"]
    assert [line.split()[0] for line in lines[1:15] if not line.startswith(" ")] == ["quiz_zh", "topic_en", "text_en"]
    acc = results[0].estimates.metrics["acc"]
    assert lines[1].split() == ["quiz_zh", "acc", f"{acc.value:.4f}", f"{acc.low:.4f}", "-", f"{acc.high:.4f}", "4"]
    assert "topic_en: 4 of 4 answers were cut at the longest that was allowed (generation_kwargs.max_gen_toks)" in lines
    assert "topic_en: 4 of 4 answers are none of the classes; they count as wrong" in lines
    assert all(line == line.rstrip() for line in lines)


def test_tasks_of_one_metric_have_a_mean(results):
    assert averages(results) == {}
    other = replace(results[0], asked=replace(results[0].asked, task=replace(results[0].task, name="quiz_2")))
    both = [results[0], *results[1:], other]
    found = averages(both)
    assert list(found) == ["acc"]
    assert found["acc"].value == results[0].estimates.metrics["acc"].value
    assert (
        found["acc"].high - found["acc"].low
        < results[0].estimates.metrics["acc"].high - results[0].estimates.metrics["acc"].low
    )
    (line,) = [line for line in table(both).splitlines() if line.startswith("mean of 2 tasks  acc ")]
    assert f"{found['acc'].low:.4f} - {found['acc'].high:.4f}" in line
    assert document(both, {})["averages"]["acc"]["value"] == found["acc"].value
    losses = [results[2], replace(other, estimates=replace(results[2].estimates, metrics={"perplexity": found["acc"]}))] * 2
    assert list(averages(losses)) == ["bits_per_byte"]


def test_classes_have_intervals(results):
    row = document(results, {})["tasks"]["topic_en"]["confusion"]["per_class"]
    sports = row["sports"]
    assert (sports["recall"]["value"], sports["predicted"]) == (0.0, 0)
    assert sports["recall"]["high"] == pytest.approx(proportion(0, sports["support"]).high if sports["support"] else 1.0)


def test_clean_and_dirty_scores(results):
    quiz = replace(
        results[0], overlaps=(ItemOverlap(20, 8, 3), ItemOverlap(20, 8, 0), ItemOverlap(5, 0, 0), ItemOverlap(20, 8, 1))
    )
    clean, dirty = (estimates_of(quiz.task, quiz.outcomes, places).metrics["acc"] for places in ([1, 2], [0, 3]))
    said = (
        "quiz_zh: the training data has 13 words in a row of 2 of 4 items (50.0%); 1 are too short to tell; "
        f"acc of the clean ones {clean.value:.4f} ({clean.low:.4f} - {clean.high:.4f}), "
        f"acc of the dirty ones {dirty.value:.4f} ({dirty.low:.4f} - {dirty.high:.4f})"
    )
    assert table([quiz]).splitlines()[-1] == said
    found = document([quiz], {})["tasks"]["quiz_zh"]["contamination"]
    assert (found["dirty"], found["too_short"]) == (2, 1)
    assert (found["clean_scores"]["acc"]["value"], found["dirty_scores"]["acc"]["value"]) == (clean.value, dirty.value)
    every = replace(quiz, overlaps=(ItemOverlap(20, 8, 8),) * 4)
    assert "acc of the clean ones" not in table([every]) and "4 of 4 items (100.0%)" in table([every])


def test_what_makes_results_repeatable(results, tmp_path, gpt):
    write_json(tmp_path / "r.json", document(results, {"model": {"dtype": "float32"}}))
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["format"], found["model"]) == ("megatrain-eval-1", {"dtype": "float32"})
    quiz, topic, text = found["tasks"].values()
    assert quiz["hash"] == results[0].task.identity and (quiz["num_fewshot"], text["num_fewshot"]) == (1, 0)
    first = quiz["first"]
    assert (
        first["text"].endswith("问题：一年有多少个月？\n答案：") and first["answer"] == results[0].task.questions[0].choices[0]
    )
    assert gpt.codec.decode(first["tokens"]) == first["text"] + first["answer"]
    assert gpt.codec.decode(first["tokens"][first["scored_from"] :]) == first["answer"]
    assert gpt.codec.decode(topic["first"]["prompt_tokens"]) == topic["first"]["prompt"]
    assert text["first"]["document"] == results[2].task.questions[0].targets[0]
    assert list(quiz["per_item"]["values"]["acc"]) == [one.values["acc"] for one in results[0].outcomes]
    assert topic["confusion"]["counts"] == results[1].estimates.confusion.counts.tolist()
    assert (topic["answers_cut"], topic["truncated"], topic["joins_encoded_alone"]) == (4, 0, 0)


def test_a_line_for_each_item(results, tmp_path):
    write_items(tmp_path / "r.jsonl", results)
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(line["task"], line["item"]) for line in lines[3:5]] == [("quiz_zh", 3), ("topic_en", 0)]
    assert lines[0]["file"].endswith("quiz_zh.jsonl") and lines[0]["line"] == 1
    assert lines[0]["picked"]["acc"] == lines[0]["logprobs"].index(max(lines[0]["logprobs"]))
    assert lines[4]["targets"] == ["sports"] and lines[4]["answer"] == results[1].outcomes[0].record["answer"]


def test_equal_items_have_names_of_their_own(results):
    twice = Question(Item("f", 1, {"a": 1}), "q")
    task = replace(results[0].task, questions=(twice, twice, Question(Item("f", 3, {"a": 2}), "q")))
    first, second, third = item_ids(task)
    assert second == f"{first}#2" and third not in (first, second)
