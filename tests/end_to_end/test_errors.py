"""Input that cannot work ends a run at once, on every rank, with exit code 1 and a message that says what to change."""

import os
import socket
import subprocess
import time
from pathlib import Path

import jobs
import pytest

IMMEDIATELY = 50.0
"""Seconds on a busy machine; a rank left waiting would wait for train.hang_timeout_seconds, which is longer in these tests."""

HANG_TIMEOUT = "train.hang_timeout_seconds=100"

PROGRAM = """
import os, sys
from megatrain.cli.main import main
from megatrain.transport import store
{}
sys.exit(main())
"""
"""The command, with a line before it."""

# name: what is changed, what every rank must say
WRONG = {
    "unknown key": (["model.hidden_sise=32"], "Did you mean model.hidden_size?"),
    "value of another type": (["train.steps=many"], "train.steps is the text 'many'; expected integer"),
    "heads": (
        ["parallel.tensor_parallel_size=2", "model.num_attention_heads=1"],
        "model.num_attention_heads=1 cannot be split over parallel.tensor_parallel_size=2. Use 1",
    ),
    "world": (
        ["parallel.tensor_parallel_size=4"],
        "a world of size {world} cannot be split over parallel.tensor_parallel_size=4",
    ),
    "batch": (["train.global_batch_size=6"], "train.global_batch_size=6 is not a multiple of train.micro_batch_size=4"),
    "missing data": (["data.train=nowhere/at/all"], "nowhere/at/all"),
    "missing held-out data": (["data.valid=nowhere/at/all"], "nowhere/at/all"),
    "vocabulary smaller than the tokenizer's": (
        ["data.tokenizer=bytes"],
        "model.vocab_size=101 is smaller than the 257 tokens of data.tokenizer=bytes",
    ),
    "vocabulary smaller than the data's": (["model.vocab_size=50"], "model.vocab_size"),
    "ZeRO": (["parallel.zero_stage=4"], "parallel.zero_stage is the integer 4; expected one of 0, 1, 2, 3."),
    "GLM": (
        ["data.glm.shuffle_spans=false"],
        "data.glm.shuffle_spans=false has no effect: it has one when data.objective is glm",
    ),
    "layers": (
        ["parallel.virtual_pipeline_size=3", "parallel.schedule=interleaved"],
        "model.num_layers=2 cannot be split over",
    ),
    "chunks": (["parallel.virtual_pipeline_size=2"], "parallel.schedule=1f1b cannot have parallel.virtual_pipeline_size=2"),
    "layer split": (["parallel.layer_split=[1]"], "parallel.layer_split=[1] has 1 layers on 1 virtual stages"),
    "log.dir": (["log.dir=FILE/run", "checkpoint.dir=CASE"], "cannot be written"),
    "checkpoint.dir": (["checkpoint.dir=FILE/checkpoints"], "checkpoint.dir=FILE/checkpoints cannot be written"),
    "no checkpoint there": (["checkpoint.resume=nowhere"], "nowhere"),
    "checkpoint of another shape": (
        ["checkpoint.resume=SAVED", "checkpoint.weights_only=true", "model.hidden_size=64"],
        "the checkpoint has [101, 32], the config gives [101, 64]",
    ),
    "checkpoint of another depth": (
        ["checkpoint.resume=SAVED", "checkpoint.weights_only=true", "model.num_layers=1"],
        "and the config does not give, 16 of 36 tensors of weights: layers.1.",
    ),
    "damaged checkpoints": (["checkpoint.dir=DAMAGED"], "begin anew in another checkpoint.dir"),
}
ON_TWO_RANKS = {
    "another model": (["checkpoint.resume=SAVED", "model.norm_eps=1e-3"], "checkpoint.accept_changes=[model]"),
    "another order of the data": (["checkpoint.resume=SAVED", "train.seed=99"], "checkpoint.accept_changes=[data]"),
    "NCCL on CPUs": (["parallel.backend=nccl"], "parallel.backend=nccl needs"),
}
ON_ONE_RANK = {
    "optimizer of another kind": (["checkpoint.resume=SAVED", "optim.name=sgd"], "optim.name"),
    "another tokenizer": (
        ["checkpoint.resume=SAVED", "data.tokenizer=bytes", "model.vocab_size=261"],
        "accept_changes=[tokenizer]",
    ),
}


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A folder with data, a config, a checkpoint of one process, and folders that are broken in some way."""
    folder = tmp_path_factory.mktemp("errors")
    jobs.write_store(folder / "data")
    jobs.write_config(folder / "config.yaml", jobs.tiny(folder / "data", folder / "run", train={"steps": 3}))
    (ended,) = jobs.train(folder / "saving", str(folder / "config.yaml"), f"log.dir={folder / 'saved'}")
    assert ended.code == 0, ended.err
    (folder / "file").write_text("a file, so that no folder can be made below it")
    damaged = folder / "damaged"
    subprocess.run(["cp", "-r", str(folder / "saved/checkpoints"), str(damaged)], check=True)
    for file in damaged.glob("step_*/*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    return folder


def line_of(house: Path, name: str, overrides: list[str]) -> list[str]:
    """The command line of a case, in a run directory of its own."""
    own = house / "runs" / f"{name.replace(' ', '_')}_{os.urandom(4).hex()}"
    words = {
        "FILE": house / "file",
        "SAVED": house / "saved/checkpoints/step_00000003",
        "DAMAGED": house / "damaged",
        "CASE": own,
    }
    for word, path in words.items():
        overrides = [override.replace(word, str(path)) for override in overrides]
    given = [override.partition("=")[0] for override in overrides]
    own_dir = [] if "log.dir" in given else [f"log.dir={own}"]
    return ["train", str(house / "config.yaml"), HANG_TIMEOUT, *own_dir, *overrides]


def check(house: Path, size: int, name: str, expected: str, answers: list[jobs.Answer]) -> None:
    """Every rank says the message in a line, and at once."""
    expected = expected.replace("{world}", str(size)).replace("FILE", str(house / "file"))
    for rank, answer in enumerate(answers):
        what = f"{name}, rank {rank}: {answer}"
        assert answer.code == 1, what
        message = answer.err.splitlines()[-1]
        assert message.startswith("megatrain: error: "), what
        assert expected in message, what
        assert "Traceback" not in answer.err, what
        assert answer.seconds < IMMEDIATELY, what


@pytest.mark.parametrize("size", [1, 2])
def test_wrong_input_is_refused_on_every_rank(house, tmp_path, size):
    cases = {**WRONG, **(ON_TWO_RANKS if size == 2 else ON_ONE_RANK)}
    lines = [line_of(house, name, overrides) for name, (overrides, _) in cases.items()]
    not_yaml = house / "not.yaml"
    not_yaml.write_bytes(bytes(range(256)) * 16)
    broken = house / "broken.yaml"
    broken.write_text("model: [1, 2\n")
    lines += [["train", str(not_yaml)], ["train", str(broken)], ["train", str(house / "nowhere.yaml")]]
    files = {"a binary file": "not.yaml", "broken YAML": "broken.yaml:", "no file": "nowhere.yaml: no such file"}
    expected = {name: message for name, (_, message) in cases.items()} | files
    answers = jobs.commands(tmp_path, lines, size)
    assert len(answers) == len(expected)
    for (name, message), each in zip(expected.items(), answers, strict=True):
        check(house, size, name, message, each)


def test_ranks_with_different_input_all_say_so(house, tmp_path):
    """What only one rank can know, all of them say: another config."""
    plain = line_of(house, "differ", [])
    answers = jobs.commands(tmp_path, [[[*plain, "train.seed=1"], [*plain, "train.seed=2"]]], 2)
    check(house, 2, "seeds", "The config differs between ranks: line ", answers[0])
    assert all("seed: 1" in answer.err and "seed: 2" in answer.err for answer in answers[0])


def test_data_missing_on_one_rank(house, tmp_path):
    line = [*line_of(house, "one rank", []), "data.train=here"]
    jobs.write_store(tmp_path / "has/here")
    (tmp_path / "has_not").mkdir()
    port = jobs.free_port()
    with jobs.Job(tmp_path / "job") as job:
        for rank, folder in enumerate(("has", "has_not")):
            script = tmp_path / f"{folder}.py"
            script.write_text(PROGRAM.format(f"os.chdir({str(tmp_path / folder)!r})"))
            job.fork([str(script), *line], jobs.environment(rank, 2, port))
        ended = job.finish()
    assert [e.code for e in ended] == [1, 1], ended
    assert "megatrain: error: rank 1 failed while opening the data: " in ended[0].err and "here" in ended[0].err
    assert "megatrain: error: token store here: there is no file here.idx" in ended[1].err
    assert not any("Traceback" in e.err for e in ended)


def test_under_torchrun_the_message_comes_from_every_rank(house, tmp_path):
    """The real launcher, its output as a person sees it."""
    _, *words = line_of(house, "torchrun", ["train.global_batch_size=6"])
    for turn in range(
        4
    ):  # torchrun ends the others a tenth of a second after the first: on a busy machine one may not have begun to speak
        with jobs.torchrun(tmp_path / str(turn), 2, *words) as job:
            (ended,) = job.finish()
        assert ended.code == 1
        said = ended.err.count("megatrain: error: train.global_batch_size=6 is not a multiple")
        if said == 2:
            break
        assert said == 1 and "closing signal SIGTERM" in ended.err, ended.err
    assert said == 2, ended.err


@pytest.mark.parametrize(
    "answers", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["nobody answers", "another program answers"]
)
def test_port_in_use(house, tmp_path, answers):
    """Rank 0 cannot serve it; rank 1 reaches whoever has it, and must not wait for the answer."""
    _, *words = line_of(house, "port", [])
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.1)
        port = server.getsockname()[1]
        script = tmp_path / "hasty.py"
        script.write_text(PROGRAM.format("store.ANSWER_SECONDS = 2.0"))
        with jobs.Job(tmp_path) as job:
            for rank in range(2):
                job.fork([str(script), "train", *words], jobs.environment(rank, 2, port))
            deadline = time.monotonic() + jobs.SECONDS
            while answers and job.alive() and time.monotonic() < deadline:
                talk_http(server)
            ended = job.finish()
    assert [e.code for e in ended] == [1, 1], ended
    assert f"rank 0 cannot serve port {port} on 127.0.0.1: it is in use" in ended[0].err
    assert f"rank 1 found something at 127.0.0.1:{port} that is not the store of this job" in ended[1].err
    for end in ended:
        assert f"Choose another MASTER_PORT, for example {port + 1}." in end.err
        assert "Traceback" not in end.err


def talk_http(server: socket.socket) -> None:
    """Answer one connection, if there is one, as a web server would."""
    try:
        connection, _ = server.accept()
    except TimeoutError:
        return
    with connection:
        connection.settimeout(0.5)
        try:
            if connection.recv(16):
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        except OSError:
            return


def test_a_rank_that_never_comes_is_named(house, tmp_path):
    _, *words = line_of(house, "alone", [])
    words[words.index(HANG_TIMEOUT)] = "train.start_timeout_seconds=2"
    with jobs.Job(tmp_path) as job:
        job.fork(["train", *words], jobs.environment(0, 2, jobs.free_port()))
        (ended,) = job.finish()
    assert ended.code == 1
    assert "megatrain: error: rank 0 waited 2 s, but of 2 ranks [1] did not come." in ended.err
    assert "Traceback" not in ended.err
