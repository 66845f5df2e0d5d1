"""`megatrain bench`: one line of JSON whose parts add up, alone and on two ranks; and its profile."""

import json
from pathlib import Path

import jobs
import pytest

from megatrain.config.load import from_dict, load
from megatrain.runtime.flops import model_flops_per_token
from megatrain.testing.trace import random_source
from megatrain.verbs.bench import export_trace

ARGUMENTS = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=2",
    "model.seq_length=32",
    "model.vocab_size=101",
]
ARGUMENTS += [
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.precision=fp32",
    "log.peak_tflops=0.5",
    "--steps",
    "3",
]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "bench.yaml"
    path.write_text("parallel: {device: cpu}\ntrain: {steps: 3}\noptim: {warmup_steps: 100}\n")  # which train would refuse
    return path


def test_one_line_whose_numbers_belong_together(config, tmp_path):
    trace = tmp_path / "trace.json"
    (ended,) = jobs.train(tmp_path / "job", str(config), *ARGUMENTS, "--profile", str(trace), verb="bench")
    assert ended.code == 0, ended.err  # the profiler writes there too
    (line,) = ended.out.splitlines()
    row = json.loads(line)
    assert {"tokens_per_second", "tflops_per_device", "mfu", "hfu", "memory", "phases"} <= set(row)
    assert row["tokens_per_second"] == pytest.approx(8 * 32 / row["step_seconds"])
    model = load(config, [a for a in ARGUMENTS if "=" in a]).config.model
    assert row["tflops_per_device"] == pytest.approx(model_flops_per_token(model, 101) * row["tokens_per_second"] / 1e12)
    assert row["mfu"] == row["hfu"] == pytest.approx(row["tflops_per_device"] / 0.5)
    assert list(row["phases"]) == ["data", "forward", "backward", "reduce", "optimizer"]
    assert all(seconds > 0 for seconds in row["phases"].values())
    assert sum(row["phases"].values()) < 3 * row["step_seconds"]
    assert row["memory"] > 10e6
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("_ColumnLinear" in name for name in names)


def test_under_a_launcher_rank_0_speaks_for_all(config, tmp_path):
    more = ["parallel.tensor_parallel_size=2", "train.recompute=full"]
    pair = jobs.train(tmp_path / "job", str(config), *ARGUMENTS, *more, size=2, verb="bench")
    assert [ended.code for ended in pair] == [0, 0]
    rows = [ended.out.splitlines() for ended in pair]
    assert sorted(map(len, rows)) == [0, 1]
    row = json.loads(max(rows, key=len)[0])
    assert row["world_size"] == 2 and row["layout"]["tensor_parallel_size"] == 2
    assert row["hfu"] > row["mfu"]


def test_a_trace_that_was_not_written_is_told(tmp_path):
    path = tmp_path / "t.json"
    export_trace(lambda to: Path(to).write_text('{"traceEvents": []\n}\n'), path)
    for half in ("", '{"traceEvents": ['):
        with pytest.raises(OSError, match=r"No space left on device \(while writing\): '.*t\.json'"):
            export_trace(lambda to, half=half: Path(to).write_text(half), path)
    with pytest.raises(FileNotFoundError):
        export_trace(lambda to: None, tmp_path / "none" / "t.json")


def test_a_vocabulary_that_blanks_use_up_is_told():
    tree = {"model": {"family": "glm", "vocab_size": 8}, "data": {"train": "x", "tokenizer": "bytes", "objective": "glm"}}
    with pytest.raises(ValueError, match=r"model.vocab_size=8 leaves no token for text .* Use model.vocab_size=9 or more"):
        random_source(from_dict(tree), 8)
    random_source(from_dict(tree), 9)
