"""`megatrain serve` as processes: one and two ranks, signals, deaths, wrong use (megatrain.cli.serving_verbs)."""

import json
import os
import signal
import socket
import threading
import time

import jobs
import pytest
import served

BODY = {"prompt": "abc", "max_tokens": 12, "seed": 5}
LONG = {"prompt": "abc", "max_tokens": 240, "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return served.save_model(tmp_path_factory.mktemp("tiny") / "tiny", parallel={"backend": "gloo", "device": "cpu"})


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """The text of one process, which is told to stop while it writes a long one: it finishes that."""
    with served.running(tmp_path_factory.mktemp("alone"), model, "--grace", "30") as server:
        text = server.ask("/v1/completions", BODY)[1]["choices"][0]["text"]
        events = []
        reader = threading.Thread(target=lambda: events.append(server.ask("/v1/completions", {**LONG, "stream": True, "n": 8})))
        reader.start()
        served.wait_until(lambda: server.get("/health")["open"] == 8, 10, server)
        server.signal(signal.SIGTERM)
        served.wait_until(lambda: refused(server), 5, server)
        reader.join()
        (ended,) = server.job.finish()
    return text, events[0], ended, [json.loads(line) for line in (server.folder / "traffic.jsonl").read_text().splitlines()]


def refused(server):
    """Whether nobody listens any more."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) != 0


def test_open_answers_are_finished_after_a_signal(alone):
    _, (status, text, _), ended, _ = alone
    assert status == 200 and text.endswith("data: [DONE]\n\n") and text.count('"finish_reason":"length"') == 8
    assert ended.code == 0 and "SIGTERM: stopping: 8 texts are still being written, for 30 s at most" in ended.err
    assert "Traceback" not in ended.err


def test_all_of_it_is_in_the_log(alone):
    first, second = alone[3]
    assert first["choices"][0]["text"] == alone[0] and first["ended"] == second["ended"] == "done"
    assert len(second["choices"]) == 8 and {len(choice["tokens"]) for choice in second["choices"]} == {240}


def test_two_ranks_write_the_same_text_and_end_together(model, alone, tmp_path):
    with served.running(tmp_path, model, "parallel.tensor_parallel_size=2", "--grace", "0", size=2) as server:
        assert server.get("/health")["layout"] == "tp 2, pp 1"
        assert server.ask("/v1/completions", BODY)[1]["choices"][0]["text"] == alone[0]
        stopped = server.ask("/v1/completions", {**BODY, "stop": alone[0][4:6], "logprobs": 2, "n": 2, "stop_token_ids": [3]})[
            1
        ]
        assert stopped["choices"][0]["text"] == alone[0][:4]
        assert server.ask("/v1/completions", {**BODY, "logit_bias": {"120": 100}})[1]["choices"][0]["text"] == "x" * 12
        events = []
        reader = threading.Thread(target=lambda: events.append(server.ask("/v1/completions", {**LONG, "stream": True, "n": 8})))
        reader.start()
        served.wait_until(lambda: server.get("/health")["open"] == 8, 10, server)
        server.signal(signal.SIGINT)
        ended = server.job.finish()
        reader.join()
    assert [end.code for end in ended] == [0, 0], ended
    status, text, _ = events[0]
    assert (status == 200 and '"code":"stopping"' in text and not text.endswith("[DONE]\n\n")) or status == 503


def test_a_rank_that_dies_ends_all(model, tmp_path):
    with served.running(tmp_path, model, "parallel.pipeline_parallel_size=2", size=2) as server:
        answers = []
        reader = threading.Thread(target=lambda: answers.append(server.ask("/v1/completions", {**LONG, "n": 8})))
        reader.start()
        served.wait_until(lambda: server.get("/health")["open"] == 8, 10, server)
        began = time.monotonic()
        os.kill(server.job.processes[1].pid, signal.SIGKILL)
        reader.join()
        ended = server.job.finish()
    assert time.monotonic() - began < 20
    status, error, _ = answers[0]
    assert status == 500 and error["error"]["code"] == "dead" and "the engine has died" in error["error"]["message"]
    assert ended[0].code == 1 and "Traceback" not in ended[0].err


def test_replicas_are_refused_with_advice(model, tmp_path):
    with served.running(tmp_path, model, size=2, ready=False) as server:
        ended = server.job.finish()
    assert [end.code for end in ended] == [1, 1]
    said = "2 ranks are 2 replicas of a model on 1, and a server has one. Use 1, or parallel.tensor_parallel_size=2"
    assert all(said in end.err for end in ended)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--host", "0.0.0.0"], 2, "lets other machines in, and whoever reaches it could use the model. Give --api-key KEY"),
        (["--port", "70000"], 2, "70000 is no port: use 0 to 65535"),
        (["model.num_layers=3"], 1, "only the layout can be chosen here"),
        (["--chat-template", "nowhere"], 1, "there is no such template and no such file"),
        (["--tokenizer", "nowhere.json"], 1, "there is no such file here"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(model, words, code, said):
    ended = jobs.here(str(model), "--port", "0", *words, verb="serve")
    assert ended.code == code and said in ended.err


def test_a_port_that_is_taken_is_told(model):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = jobs.here(str(model), "--port", str(port), verb="serve")
    assert ended.code == 1
    assert (
        f"127.0.0.1:{port} cannot be listened at (Address already in use). Use another --port (0: any that is free)"
        in ended.err
    )
