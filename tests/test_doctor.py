"""`megatrain doctor` alone and on several ranks, as a person starts it."""

import json

import jobs

CONFIG = {"model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 101}, "data": {"train": "x"}}


def test_alone_and_on_two_ranks(tmp_path):
    config = jobs.write_config(
        tmp_path / "c.yaml", {**CONFIG, "checkpoint": {"dir": str(tmp_path / "checkpoints")}, "parallel": {"device": "cpu"}}
    )
    (alone,) = jobs.train(tmp_path / "one", str(config), verb="doctor")
    assert alone.code == 0 and alone.out.splitlines()[-1] == "a job would run", alone.err
    first, second = jobs.train(tmp_path / "two", str(config), "--json", size=2, verb="doctor")
    assert first.code == second.code == 0 and not second.out, first.err
    said = json.loads(first.out)
    assert said["ok"] and [rank["rank"] for rank in said["ranks"]] == [0, 1]
    assert all(rank["all_reduce_mb_per_second"] > 0 and rank["sees_token"] for rank in said["ranks"])


def test_without_a_config(tmp_path):
    (ended,) = jobs.train(tmp_path / "job", verb="doctor")
    assert ended.code == 0 and "kernels: plain PyTorch" in ended.out


def test_a_job_that_would_fail(tmp_path):
    (tmp_path / "file").write_text("")
    config = jobs.write_config(tmp_path / "c.yaml", {**CONFIG, "checkpoint": {"dir": str(tmp_path / "file/below")}})
    (ended,) = jobs.train(tmp_path / "job", str(config), verb="doctor")
    assert ended.code == 1 and "FAIL: rank 0 on" in ended.out and "cannot write checkpoint.dir" in ended.out
    assert ended.out.splitlines()[-1] == "a job would fail: 1 reason"


def test_ranks_that_see_other_directories(tmp_path):
    config = jobs.write_config(tmp_path / "c.yaml", {**CONFIG, "parallel": {"device": "cpu"}})
    words = [[str(config), f"checkpoint.dir={tmp_path}/{rank}"] for rank in range(2)]
    (answers,) = jobs.commands(tmp_path / "job", [[["doctor", *of] for of in words]], size=2)
    assert [answer.code for answer in answers] == [1, 1]
