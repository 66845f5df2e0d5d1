"""The picture of a run's tasks, and which rows of metrics.jsonl it is of."""

import json

from matplotlib.image import imread

from megatrain.records.log import LogDisplay, RunLog, tasks_line
from megatrain.records.rows import TasksRow, read_tasks
from megatrain.records.tasks_plot import draw_tasks


def row(step, value, **more):
    tasks = {"quiz": {"acc": value, "acc_norm": 0.5}, "text": {"bits_per_byte": None}}
    low, high = ({**tasks, "quiz": {"acc": end, "acc_norm": end}} for end in (0.1, 0.9))
    return {"tasks_of_step": step, "tasks": tasks, "tasks_low": low, "tasks_high": high, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\n{broken")
    return path


def test_what_a_run_has_gone_back_from_does_not_count(tmp_path):
    steps = [{"step": step, "loss": 1.0} for step in range(1, 7)]
    rows = [steps[0], row(1, 0.1), *steps[1:4], row(4, 0.4), {"step": 4, "valid_loss": 1.0}, steps[4], steps[2], row(3, 0.3)]
    path = write(tmp_path / "metrics.jsonl", rows)
    assert [(of["tasks_of_step"], of["tasks"]["quiz"]["acc"]) for of in read_tasks(path)] == [(1, 0.1), (3, 0.3)]


def test_each_task_has_a_panel(tmp_path):
    sizes = []
    for rows in ([], [row(1, 0.3)], [row(step, step / 10) for step in range(1, 9)]):
        draw_tasks(write(tmp_path / "metrics.jsonl", rows), tmp_path / "tasks.png")
        sizes.append(imread(tmp_path / "tasks.png").shape[:2])
    assert sizes == [(288, 384), (288, 768), (288, 768)]
    assert [path.name for path in tmp_path.glob("*.png")] == ["tasks.png"]


def test_the_log_has_the_tasks_everywhere(tmp_path, capsys):
    tasks = {"quiz": {"acc": 0.5, "acc_norm": 0.25}, "text": {"bits_per_byte": None}}
    of = TasksRow(
        5, 640, tasks, {"quiz": {"acc": 0.38}, "text": {"bits_per_byte": None}}, {**tasks, "quiz": {"acc": 0.6225}}, {}, 1.26
    )
    line = "tasks at step 5 | quiz: acc 0.5 (0.38 to 0.6225) | text: bits_per_byte not finite (not finite to not finite) | seconds: 1.3 |"
    assert tasks_line(of) == line
    with RunLog(tmp_path, LogDisplay(1, ("tensorboard",), False), total_steps=9, sequence_length=16) as log:
        log.tasks(of, lambda: {"format": "x", "tasks": {}})
    assert capsys.readouterr().out == line + "\n"
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    file = tmp_path / "tasks/step_00000005.json"
    assert (event["event"], event["step"], event["file"]) == ("tasks", 5, str(file)) and json.loads(file.read_text())[
        "format"
    ] == "x"
    assert [one["tasks"] for one in read_tasks(tmp_path / "metrics.jsonl")] == [tasks]
    (curves,) = (tmp_path / "tensorboard").iterdir()
    assert b"eval/quiz/acc_norm" in curves.read_bytes() and b"eval/text" not in curves.read_bytes()
