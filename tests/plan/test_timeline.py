"""`megatrain plan`: the figures and the timeline of one step, as text and as a picture."""

import time
from dataclasses import replace

import pytest
import yaml

from megatrain.cli.main import main
from megatrain.config.schema import Config, CorpusConfig, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megatrain.config.source import ConfigError
from megatrain.parallel.schedules import Schedule
from megatrain.parallel.simulator import Costs, simulate
from megatrain.plan.picture import draw_timeline
from megatrain.plan.timeline import as_text, costs_of, describe, plan_timeline

MODEL = ModelConfig(num_layers=8, hidden_size=64, num_attention_heads=4, seq_length=32, vocab_size=101)


def config_of(**parallel):
    train = TrainConfig(global_batch_size=8, micro_batch_size=1)
    return Config(model=MODEL, parallel=ParallelConfig(**parallel), train=train, data=DataConfig(train=(CorpusConfig("x"),)))


def test_text_of_1f1b():
    text = as_text(simulate(Schedule("1f1b", 2, 1, 4)))
    assert text.splitlines() == [
        "stage   0 |F0 F1 .  .  B0 B0 F2 B1 B1 F3 B2 B2 .  B3 B3",
        "stage   1 |.  F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 .  .",
    ]


def test_text_that_does_not_fit_has_letters_alone_and_small_ones_for_later_chunks():
    rows = as_text(simulate(Schedule("zb_v", 2, 2, 3)), width=20).splitlines()
    assert all(set(row.split("|")[1]) <= set("FBWfbw.") and len(row.split("|")[1]) <= 20 for row in rows)
    assert "f" in rows[0] and "F" in rows[0]


def test_costs_follow_the_flops():
    config = config_of(pipeline_parallel_size=2, layer_split=(2, 6))
    costs = costs_of(config, 101)
    assert sum(costs.forward) == pytest.approx(2.0), "in units of the mean forward"
    assert costs.backward_weight[1] == pytest.approx(3 * costs.backward_weight[0])
    for f, b, w in zip(costs.forward, costs.backward_input, costs.backward_weight, strict=True):
        assert b + w == pytest.approx(2 * f) and b > f > w, "attention has no weights"


def test_more_replicas_leave_fewer_micro_batches():
    config = config_of(pipeline_parallel_size=2)
    assert [plan_timeline(config, devices).schedule.micro_batches for devices in (2, 4, 16)] == [8, 4, 1]
    with pytest.raises(ConfigError, match="a world of size 3 cannot be split"):
        plan_timeline(config, 3)
    with pytest.raises(ConfigError, match=r"schedule=zb_v cannot have parallel\.virtual_pipeline_size=1"):
        plan_timeline(config_of(pipeline_parallel_size=2, schedule="zb_v"), 2)


def test_description_has_the_figures_of_the_simulator():
    timeline = simulate(Schedule("1f1b", 2, 1, 4), Costs())
    text = describe(timeline, [range(5), range(5, 6)])
    assert "1f1b: 2 stages x 1 chunks, 4 micro-batches" in text and "step bubble: 20.0%" in text
    assert text.splitlines()[-2].split() == ["0", "0-4", "80.0%", "20.0%", "2"]
    assert text.splitlines()[-1].split() == ["1", "5", "80.0%", "0.0%", "1"]


def test_the_verb_prints_and_draws(tmp_path, capsys):
    config = replace(config_of(), train=TrainConfig(global_batch_size=8, micro_batch_size=1))
    tree = {
        "model": {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "vocab_size": 101},
        "data": {"train": "x"},
        "train": {"global_batch_size": 8, "micro_batch_size": config.train.micro_batch_size},
    }
    path, png = tmp_path / "c.yaml", tmp_path / "t.png"
    path.write_text(yaml.safe_dump(tree))
    words = ["plan", str(path), "--timeline", str(png), "parallel.pipeline_parallel_size=4", "parallel.schedule=zb_h1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "zb_h1: 4 stages x 1 chunks, 8 micro-batches" in out and out.count("stage   ") == 4 and str(png) in out
    assert "copies in memory" not in out and main([*words[:2], "checkpoint.in_memory_every=5"]) == 0
    assert "copies in memory every 5 steps: a rank saves 0.00457 GiB, up to two" in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert main([*words[:3], str(tmp_path / "no" / "t.png")]) == 1
    assert "there is no directory" in capsys.readouterr().err


def test_a_picture_needs_a_name_and_many_instructions_are_drawn_too(tmp_path):
    timeline = simulate(Schedule("zb_v", 4, 2, 400))
    with pytest.raises(IsADirectoryError, match=r"is a directory: give the picture a name, such as .*timeline\.png"):
        draw_timeline([("x", timeline)], tmp_path)
    began = time.monotonic()
    draw_timeline([("x", timeline)], tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 10_000 and time.monotonic() - began < 20
    assert all(len(row.split("|")[1]) <= 100 for row in as_text(timeline, 100).splitlines())
