"""The log of requests and the file of thumbs: masked, rotated, whole lines."""

import errno
import json
import os
import shutil
import time

import jobs
import pytest

from megatrain.data.tokenizer import ByteTokenizer
from megatrain.inference.requests import Answer, Request, Scored
from megatrain.serving.bodies import FeedbackBody
from megatrain.serving.desk import Inbox
from megatrain.serving.fields import parsed
from megatrain.serving.meters import Timed
from megatrain.serving.orders import PromptOrder
from megatrain.serving.replies import ReplyHead
from megatrain.serving.styles import AnswerChoice
from megatrain.serving.traffic_log import TrafficLog, write_thumb

HEAD = ReplyHead("text_completion", "tiny", "cmpl-1", 5)


def put(log, prompt, text, asked=None):
    ids = tuple(prompt.encode())
    order = PromptOrder((Request(ids),), (), 1, {"seed": 5}, None)
    scored = [Scored(byte, -0.123456789, True) for byte in text.encode()]
    choice = AnswerChoice(scored, text, Answer(tuple(scored), text, "stop", None, (), 0))
    log.put(HEAD, asked or {"prompt": [prompt]}, order, [choice], Inbox({0: Timed(1.0, len(ids), 1.1, 1.25, 2.0)}), "done")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path):
    log = TrafficLog(tmp_path / "traffic.jsonl", 1 << 20, 2)
    log.know(ByteTokenizer())
    return log


def test_a_record_has_ids_probabilities_and_times(log):
    put(log, "Hi", "yes")
    log.close()
    (row,) = rows(log.path)
    assert (row["id"], row["asked"], row["masked"]) == ("cmpl-1", {"prompt": ["Hi"]}, 0)
    assert (row["prompts"], row["prompt_lengths"]) == ([[72, 105]], [2])
    (choice,) = row["choices"]
    assert (choice["text"], choice["tokens"], choice["logprobs"], choice["count"]) == (
        "yes",
        [121, 101, 115],
        [-0.12346] * 3,
        3,
    )
    assert choice["seconds"] == {"first_token": 0.25, "all": 1.0} and choice["finish_reason"] == "stop"


def test_personal_data_is_nowhere_in_it(log):
    mail, phone = "jane.doe@example.org", "13812345678"
    put(log, f"Write to {mail}", f"Call {phone}!")
    put(log, "x", "y", {"messages": [{"role": "user", "content": f"I am {mail}"}], "suffix": None})
    put(log, f"again {mail}", "y", {"prompt": [list(f"again {mail}".encode())]})  # a prompt of token ids
    log.close()
    text = log.path.read_text()
    first, second, third = rows(log.path)
    assert mail not in text and phone not in text and str(list(mail.encode()))[1:-1] not in text
    assert first["asked"] == {"prompt": ["Write to <EMAIL>"]} and first["prompts"] == [None] and first["prompt_lengths"] == [29]
    assert first["choices"][0]["text"] == "Call <PHONE>!" and "tokens" not in first["choices"][0] and first["masked"] == 2
    assert second["asked"]["messages"] == [{"role": "user", "content": "I am <EMAIL>"}] and second["prompts"] == [None]
    assert third["asked"] == {"prompt": ["again <EMAIL>"]} and third["choices"][0]["tokens"] == [121]


def test_a_full_log_is_put_aside(tmp_path):
    log = TrafficLog(tmp_path / "traffic.jsonl", 1500, 2)
    for number in range(12):
        put(log, f"prompt {number}", "x" * 20)
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["traffic.jsonl", "traffic.jsonl.1", "traffic.jsonl.2"]
    assert all(0 < path.stat().st_size <= 1500 for path in tmp_path.iterdir())
    kept = [row["asked"]["prompt"][0] for name in reversed(files) for row in rows(tmp_path / name)]
    assert kept == [f"prompt {number}" for number in range(12 - len(kept), 12)]  # the newest, each whole and once


def test_no_older_log_is_kept_where_none_is_wanted(tmp_path):
    log = TrafficLog(tmp_path / "traffic.jsonl", 700, 0)
    for number in range(5):
        put(log, f"prompt {number}", "x")
    log.close()
    assert [row["asked"]["prompt"] for row in rows(log.path)][-1] == ["prompt 4"]
    assert [path.name for path in tmp_path.iterdir()] == ["traffic.jsonl"]


def test_a_full_disk_loses_records_and_nothing_else(tmp_path, monkeypatch, capsys):
    def write(descriptor, data):  # as a full disk does: a part, and then nothing
        if os.fstat(descriptor).st_size > 700:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:300])

    log, real = TrafficLog(tmp_path / "traffic.jsonl", 1 << 20, 1), os.write
    monkeypatch.setattr(os, "write", write)
    for number in range(5):
        put(log, f"prompt {number}", "x")
    wait_for(lambda: log.dropped == 4)
    monkeypatch.undo()
    put(log, "prompt 5", "x")
    log.close()
    assert [row["asked"]["prompt"] for row in rows(log.path)] == [["prompt 0"], ["prompt 5"]]
    told = capsys.readouterr().err
    assert told.count("could not be written: No space left on device") == 1 and "4 requests are not in" in told


def test_a_log_that_cannot_be_put_aside_goes_on_later(tmp_path, monkeypatch):
    log = TrafficLog(tmp_path / "traffic.jsonl", 700, 1)
    put(log, "prompt 0", "x")
    wait_for(lambda: log.path.stat().st_size > 0)
    (tmp_path / "traffic.jsonl.1").mkdir()
    (tmp_path / "traffic.jsonl.1" / "in the way").touch()
    put(log, "prompt 1", "x")
    wait_for(lambda: log.dropped == 1)
    shutil.rmtree(tmp_path / "traffic.jsonl.1")
    put(log, "prompt 2", "x")
    log.close()
    assert [row["asked"]["prompt"] for row in rows(log.path)] == [["prompt 2"]] and log.dropped == 1


def test_a_thumb_that_cannot_be_written_is_whole_or_not_there(tmp_path, monkeypatch):
    body = parsed(FeedbackBody, {"messages": [{"role": "user", "content": "q"}], "answer": "a", "rating": "up"}, {})
    write_thumb(tmp_path / "f.jsonl", body)
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:20]) if len(data) > 60 else full())
    with pytest.raises(OSError, match="No space left"):
        write_thumb(tmp_path / "f.jsonl", body)
    assert [row["answer"] for row in rows(tmp_path / "f.jsonl")] == ["a"]


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wait_for(done):
    """Wait for the log's thread."""
    end = time.monotonic() + 10
    while not done() and time.monotonic() < end:
        time.sleep(0.001)


@pytest.mark.parametrize("option", ["--log", "--feedback"])
def test_a_file_that_cannot_be_is_told_at_the_beginning(tmp_path, option):
    for path, said in ((tmp_path / "nosuch" / "x", f"there is no folder {tmp_path / 'nosuch'}"), (tmp_path, "is a folder")):
        ended = jobs.here("nowhere", option, str(path), verb="serve")
        assert ended.code == 1 and said in ended.err


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link"):
        TrafficLog(tmp_path / "log", 100, 1)


def test_a_thumb_is_a_line_that_training_reads(tmp_path, server):
    body = {
        "messages": [{"role": "user", "content": "你好"}],
        "answer": "嗨",
        "rating": "down",
        "request": "chatcmpl-1",
        "model": "tiny",
    }
    write_thumb(tmp_path / "feedback.jsonl", parsed(FeedbackBody, body, {}))
    (row,) = rows(tmp_path / "feedback.jsonl")
    assert {key: row[key] for key in body} == body and "你好" in (tmp_path / "feedback.jsonl").read_text()
    assert server.ask("/feedback", body)[1] == {"saved": "feedback.jsonl"}
    assert rows(server.folder / "feedback.jsonl")[-1]["rating"] == "down"
    assert (
        server.ask("/feedback", {**body, "rating": "meh"})[1]["error"]["message"]
        == "rating: 'meh' is not 'up' or 'down'. Try 'up'."
    )
