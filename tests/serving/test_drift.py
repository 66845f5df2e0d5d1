"""The use of a model beside its evaluation: files, measures, the index, the picture.

Over the command it tests megatrain.serving.drift_picture and megatrain.verbs.serve_report.
"""

import json
import math

import jobs
import pytest

from megatrain.serving.drift import DriftError, Exchange, bin_edges, drifts, exchange_of_item, psi, read_evaluation, read_log


def record(number, prompt, text, logprob=-1.0, ended="done", **asked):
    choice = {"text": text, "tokens": [1, 2], "logprobs": [logprob, logprob], "count": 2}
    return {"id": f"cmpl-{number}", "ended": ended, "asked": asked or {"prompt": [prompt]}, "choices": [choice]}


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_the_index_is_the_formulas():
    used, evaluated = [10, 30, 60], [20, 40, 40]
    p, q = [(n + 0.5) / 101.5 for n in used], [(n + 0.5) / 101.5 for n in evaluated]
    assert psi(used, evaluated) == pytest.approx(sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert psi(evaluated, evaluated) == 0 and psi([0, 100], [100, 0]) == pytest.approx(2 * 100 / 101 * math.log(201))


def test_bins_are_the_tenths_of_the_evaluation():
    assert bin_edges(list(range(101))) == pytest.approx((10, 20, 30, 40, 50, 60, 70, 80, 90))
    assert bin_edges([3, 3, 3]) == (3,) and bin_edges([]) == ()


def test_the_same_use_is_no_shift_and_another_is():
    evaluated = [Exchange("q" * (n % 40), "The answer", -1 - (n % 10) / 10) for n in range(400)]
    same = {drift.measure.name: drift for drift in drifts(evaluated[:200], evaluated)}
    assert {drift.verdict for drift in same.values()} == {"the same"}
    other = [Exchange("问" * (50 + n), "抱歉，我不能回答", -5.0, rating="down") for n in range(200)]
    found = {drift.measure.name: drift for drift in drifts(other, evaluated)}
    shifted = ("characters of the prompt", "log-probability of a token", "script of the prompt", "refuses")
    assert all(found[name].verdict == "shifted" and found[name].psi > 1 for name in shifted)
    assert found["thumb"].psi is None and found["thumb"].verdict == "one side has none"
    lengths = found["characters of the prompt"]
    assert lengths.by_chance == pytest.approx((len(lengths.shares) - 1) * (1 / 200 + 1 / 400))


def test_a_log_is_read_with_its_older_parts_and_thumbs(tmp_path):
    write(tmp_path / "t.jsonl.1", [record(1, "old", "a")])
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "你好"}]
    write(tmp_path / "t.jsonl", [record(2, "", "b", messages=messages), record(3, "gone", "c", ended="gone")])
    write(tmp_path / "feedback.jsonl", [{"request": "cmpl-2", "rating": "down"}])
    assert read_log(tmp_path / "t.jsonl", tmp_path / "feedback.jsonl") == [
        Exchange("old", "a", -1.0, [1, 2], None),
        Exchange("你好", "b", -1.0, [1, 2], "down"),
    ]
    with pytest.raises(DriftError, match="no answers that were finished"):
        read_log(write(tmp_path / "none.jsonl", [record(1, "x", "y", ended="failed")]))


def test_logs_that_were_cut_or_are_none(tmp_path):
    log = write(tmp_path / "t.jsonl", [record(1, "x", "y"), record(2, "x", "z", logprob=math.nan)])
    with log.open("a") as file:
        file.write('{"id": "cmpl-3", "ended": "do')  # the server writes on
    write(tmp_path / "feedback.jsonl", [{"request": ["cmpl-1"], "rating": "up"}, {"request": "cmpl-2", "rating": ["up"]}])
    assert read_log(log, tmp_path / "feedback.jsonl") == [
        Exchange("x", "y", -1.0, [1, 2], None),
        Exchange("x", "z", None, [1, 2], None),
    ]
    whole = record(1, "x", "y")
    broken = [{"ended": "done"}, {**whole, "choices": 5}, {**whole, "choices": [{}]}, {**whole, "asked": []}]
    for row in [*broken, {**whole, "choices": [{"text": "", "logprobs": ["a"]}]}]:
        with pytest.raises(DriftError, match=r"t\.jsonl:2 is no record of `megatrain serve --log`, or a part of one \("):
            read_log(write(log, [whole, row]))
    log.write_bytes(b'{"a": ' + b"[" * 100_000 + b"\n")
    with pytest.raises(DriftError, match=r"t\.jsonl:1 is no line of JSON: it is nested too deep\."):
        read_log(log)
    for value in ({"tasks": []}, {"tasks": {"t": 1}}, {"tasks": {"t": {"per_item": {"values": {"logprob": 1, "tokens": 2}}}}}):
        (tmp_path / "r.json").write_text(json.dumps(value))
        with pytest.raises(DriftError, match=r"r\.json is no file of results"):
            read_evaluation(tmp_path / "r.json")
    (tmp_path / "r.json").write_text('[1, {"messages": [5], "question": "q"}]')
    assert read_evaluation(tmp_path / "r.json") == [Exchange("")]


@pytest.mark.parametrize(
    ("item", "exchange"),
    [
        ({"question": "Why?", "answer": "So."}, Exchange("Why?", "So.")),
        ({"prompt": "2+2=", "targets": ["4"], "logprob": -3.0, "tokens": 2}, Exchange("2+2=", "4", -1.5)),
        ({"context": "c", "choices": ["x", "y"], "answer": 1}, Exchange("c", "y")),
        ({"messages": [{"role": "user", "content": "q"}], "answer": "a", "rating": "up"}, Exchange("q", "a")),
        ({"values": {"logprob": -4.0, "tokens": 4.0}}, Exchange(None, None, -1.0)),
    ],
    ids=str,
)
def test_items_of_evaluations(item, exchange):
    assert exchange_of_item(item) == exchange


def test_evaluations_are_lines_or_lists_or_results(tmp_path):
    items = [{"question": "Why?", "answer": "So."}]
    (tmp_path / "list.json").write_text(json.dumps(items))
    results = {"tasks": {"t": {"per_item": {"values": {"logprob": [-2.0, -3.0], "tokens": [2, 1], "acc": [1, 0]}}}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert (
        read_evaluation(write(tmp_path / "t.jsonl", items))
        == read_evaluation(tmp_path / "list.json")
        == [Exchange("Why?", "So.")]
    )
    assert read_evaluation(tmp_path / "results.json") == [Exchange(logprob=-1.0), Exchange(logprob=-3.0)]
    assert read_evaluation(write(tmp_path / "log.jsonl", [record(1, "a", "b")])) == [Exchange("a", "b", -1.0, [1, 2])]
    for text, said in (("{\n", "1 is no line of JSON"), ('{"a": 1}\n', "has no items with a text")):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(DriftError, match=said):
            read_evaluation(tmp_path / "bad.jsonl")


def test_the_report_is_a_table_and_a_picture(tmp_path):
    write(tmp_path / "t.jsonl", [record(n, "你好" * (n % 9 + 1), "嗨", -2.0) for n in range(60)])
    write(tmp_path / "feedback.jsonl", [{"request": "cmpl-1", "rating": "up"}])
    against = write(tmp_path / "eval.jsonl", [{"question": "What is " + "x" * (n % 7), "answer": "so"} for n in range(50)])
    ended = jobs.here(str(tmp_path / "t.jsonl"), "--against", str(against), verb="serve-report")
    assert ended.code == 0, ended.err
    lines = {line.split("  ")[0]: line for line in ended.out.splitlines()}
    assert lines["script of the prompt"].endswith("shifted") and "han 100% of 60" in lines["script of the prompt"]
    assert "up 100% of 1" in lines["thumb"] and lines["thumb"].endswith("one side has none")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "t.png").stat().st_size > 20_000
    ended = jobs.here(
        str(tmp_path / "t.jsonl"), "--against", str(against), "--json", "--png", str(tmp_path / "p.png"), verb="serve-report"
    )
    found = {each["measure"]: each for each in json.loads(ended.out)}
    assert found["script of the prompt"]["verdict"] == "shifted" and found["refuses"]["used"] == 60
