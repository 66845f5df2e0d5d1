"""Small training jobs as real processes: the command itself, alone or as ranks that are started by hand and meet over gloo.

Importing torch takes each process 2 to 4 seconds, so they are forks of one that has (`forked.py`), and `commands` also runs many
command lines, one after the other, in one process (or one pair of them): each goes through `megatrain.cli.main.main`, and each joins
its world anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from forked import Forked

SECONDS = 60.0
"""Limit of one process, its start on a busy machine included."""

FORKS = sys.platform == "linux" and not Path("/dev/nvidiactl").exists()
"""Whether processes may begin as forks of one that has imported everything; a GPU's driver does not survive that."""

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM_")


def write_store(prefix: Path, vocab_size: int = 101, documents: int = 100, length: int = 40) -> Path:
    """A token store of random documents in which every second token follows from the one before it."""
    from megatrain.data.indexed import TokenStoreWriter

    tokens = np.random.default_rng(7).integers(0, vocab_size, documents * length)
    tokens[1::2] = (tokens[::2] * 7 + 3) % vocab_size
    with TokenStoreWriter(prefix, np.uint16) as writer:
        writer.add_documents(tokens, [length] * documents)
    return prefix


def tiny(data: Path | Mapping[str, str], run: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A config that takes a step in about 20 ms, changed by `section={key: value}`; `data`: a store, or the section."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size": 101},
        "parallel": {"device": "cpu"},
        "data": dict(data) if isinstance(data, Mapping) else {"train": str(data)},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2},
        "train": {
            "steps": 8,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "precision": "fp32",
            "eval_every": 0,
            "hang_timeout_seconds": 50.0,
            "start_timeout_seconds": 60.0,
        },
        "log": {"dir": str(run), "to": [], "peak_tflops": 1.0},
    }
    if "tokens" in sections.get("train", {}):
        del tree["train"]["steps"]
    return {section: {**tree.get(section, {}), **sections.get(section, {})} for section in {**tree, **sections}}


def write_config(path: Path, tree: Mapping[str, Any]) -> Path:
    """Write a config as YAML."""
    path.write_text(yaml.safe_dump(dict(tree)))
    return path


def _ports() -> Iterator[int]:
    """A thousand ports for each worker of pytest-xdist, over and over; other runs of the tests may be about."""
    first = 20_000 + 1000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8)
    start = random.SystemRandom().randrange(1000)
    return itertools.cycle(first + (start + i) % 1000 for i in range(1000))


_PORTS = _ports()
_GIVEN = os.open(Path(tempfile.gettempdir(), f"megatrain-tests-ports-{os.getuid()}"), os.O_RDWR | os.O_CREAT, 0o600)
"""A file whose byte number N is locked by the process that gave away port N, until it ends."""


def free_port() -> int:
    """A port that nobody listens on, that no other run of the tests gives away, and no system that is asked for any port, as by gloo."""
    for port in _PORTS:
        with socket.socket() as server, contextlib.suppress(OSError):
            fcntl.lockf(_GIVEN, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
            server.bind(("127.0.0.1", port))
            return port
    raise AssertionError("the ports never end")


def full_pipe() -> tuple[int, int]:
    """(reading end, writing end) of a pipe that takes no further byte until somebody reads."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(theirs, b"." * 4096)
    os.set_blocking(theirs, True)
    return ours, theirs


def environment(rank: int = 0, size: int = 1, port: int = 0) -> dict[str, str]:
    """What a launcher would give this rank; nothing where `size` is 1."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    env.update(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    if size > 1:
        env.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    return env


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str


@dataclass
class Job:
    """Processes of one job, whose output goes to files; none outlives the `with` block."""

    folder: Path
    processes: list[subprocess.Popen[bytes] | Forked] = field(default_factory=list)

    def start(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start one more process, in a session of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(self.processes)
        with self._file("out", number).open("wb") as out, self._file("err", number).open("wb") as err:
            process = subprocess.Popen(
                command, env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        self.processes.append(process)

    def fork(self, words: Sequence[str], env: Mapping[str, str]) -> None:
        """Start `megatrain WORDS`, or a file of Python with its arguments, as a process that has everything imported."""
        if not FORKS:
            module = [] if words[0].endswith(".py") else ["-m", "megatrain"]
            return self.start([sys.executable, *module, *words], env)
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(self.processes)
        self.processes.append(Forked(words, env, self._file("out", number), self._file("err", number)))

    def finish(self, seconds: float = SECONDS) -> list[Ended]:
        """Wait for all. Raises subprocess.TimeoutExpired with what they have said on stderr."""
        deadline = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            said = "\n".join(self._file("err", i).read_text()[-2000:] for i in range(len(self.processes)))
            raise subprocess.TimeoutExpired(error.cmd, seconds, stderr=said) from error
        return [self.ended(number) for number in range(len(self.processes))]

    def ended(self, number: int) -> Ended:
        """How one process, which is over, ended."""
        texts = [self._file(kind, number).read_text(errors="replace") for kind in ("out", "err")]
        return Ended(self.processes[number].returncode, *texts)

    def alive(self) -> bool:
        """Whether any process still runs."""
        return any(process.poll() is None for process in self.processes)

    def _file(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}_{number}"

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
            process.wait()


def start(
    folder: Path, words: Sequence[str] | Sequence[Sequence[str]], size: int = 1, port: int | None = None, verb: str = "train"
) -> Job:
    """Start `megatrain VERB WORDS` with `size` ranks; `words` may be a list for each rank."""
    each = [list(words)] * size if all(isinstance(word, str) for word in words) else [list(w) for w in words]
    port = free_port() if port is None else port
    job = Job(folder)
    for rank in range(size):
        job.fork([verb, *each[rank]], environment(rank, size, port))
    return job


def train(folder: Path, *words: str, size: int = 1, seconds: float = SECONDS, verb: str = "train") -> list[Ended]:
    """Run `megatrain train WORDS` (or another verb) with `size` ranks to its end."""
    with start(folder, words, size, verb=verb) as job:
        return job.finish(seconds)


def here(*words: str, verb: str = "train") -> Ended:
    """Run `megatrain train WORDS` (or another verb) in this very process, which has imported everything, and so takes no start."""
    from megatrain.cli import main as cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([verb, *words])
    return Ended(code, out.getvalue(), err.getvalue())


def torchrun(folder: Path, size: int, *words: str) -> Job:
    """Start `torchrun --nproc-per-node SIZE -m megatrain train WORDS`."""
    job = Job(folder)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "-m", "megatrain", "train", *words]
    job.start([sys.executable, *command], environment())
    return job


# --- many command lines in one process ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What one rank made of one command line."""

    code: int | None
    """Exit code; None where an unexpected exception left `main`."""
    err: str
    """stderr, or the unexpected exception."""
    seconds: float


def commands(folder: Path, lines: Sequence[Sequence[str] | Sequence[Sequence[str]]], size: int = 1) -> list[list[Answer]]:
    """Run `megatrain WORDS` for every line, in turn, in the same `size` processes: [line][rank]. A line may differ by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = [free_port() for _ in lines]
    tasks = folder / "tasks.json"
    tasks.write_text(json.dumps({"lines": lines, "ports": ports}))
    with Job(folder) as job:
        for rank in range(size):
            words = [str(Path(__file__).resolve()), str(tasks), str(folder / f"answers_{rank}")]
            job.fork(words, environment(rank, size, ports[0]))
        ended = job.finish(SECONDS + 10 * len(lines))
    for end in ended:
        if end.code != 0:
            raise RuntimeError(f"the process that runs the command lines failed: {end}")
    by_rank = [json.loads((folder / f"answers_{rank}").read_text()) for rank in range(size)]
    return [[Answer(*answer) for answer in answers] for answers in zip(*by_rank, strict=True)]


def _serve(tasks: Path, answers: Path) -> None:
    """One rank of `commands`."""
    from megatrain.cli import main as cli

    given = json.loads(tasks.read_text())
    rank, results = int(os.environ.get("RANK", "0")), []
    for line, port in zip(given["lines"], given["ports"], strict=True):
        words = line if isinstance(line[0], str) else line[rank]
        if "RANK" in os.environ:
            os.environ["MASTER_PORT"] = str(port)
        said, began = io.StringIO(), time.monotonic()
        try:
            with contextlib.redirect_stderr(said):
                code: int | None = cli.main(words)
        except Exception as error:
            code = None
            said.write(f"{type(error).__name__}: {error}")
        results.append([code, said.getvalue(), time.monotonic() - began])
        answers.write_text(json.dumps(results))  # a later line may end the process


# --- what a run leaves behind -----------------------------------------------------------------------------------------------

EXACT = ("loss", "token_accuracy", "grad_norm", "learning_rate", "tokens", "skipped")
"""What must be the same in every row of two equal runs; the rest is times and memory."""


def rows(run: Path) -> dict[int, dict[str, Any]]:
    """Step -> what was computed there, from metrics.jsonl; the last row of a step counts."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {key: row[key] for key in EXACT} for row in lines if "loss" in row}


def events(run: Path) -> list[dict[str, Any]]:
    """The run's events, in order."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def checkpoint_bytes(run: Path, step: int) -> dict[str, bytes]:
    """File name -> content of every tensor file of a checkpoint."""
    files = sorted((run / "checkpoints" / f"step_{step:08d}").glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no tensors of step {step} in {run}")
    return {file.name: file.read_bytes() for file in files}


def same(run: Path, other: Path, steps: int) -> None:
    """Assert that two runs of `steps` steps were the same to the bit."""
    ours, theirs = rows(run), rows(other)
    assert sorted(ours) == sorted(theirs) == list(range(1, steps + 1))
    different = {step: (ours[step], theirs[step]) for step in ours if ours[step] != theirs[step]}
    assert not different, f"first at step {min(different)}: {different[min(different)]}"
    assert checkpoint_bytes(run, steps) == checkpoint_bytes(other, steps)


def undisturbed(house: Path, size: int) -> Path:
    """Train `house`/config.yaml in `size` processes to its end; the run's directory."""
    run = house / "undisturbed"
    ended = train(house / "job", str(house / "config.yaml"), f"log.dir={run}", size=size, seconds=2 * SECONDS)
    if any(end.code != 0 for end in ended):
        raise RuntimeError(f"the undisturbed run failed: {ended}")
    return run


def await_rows(run: Path, count: int, said: Callable[[], str], seconds: float = 90.0) -> None:
    """Wait until `count` steps are recorded. Raises TimeoutError with what the job has said."""
    deadline = time.monotonic() + seconds
    while row_count(run) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{count} steps were not recorded within {seconds:g} s: {said()[-3000:]}")
        time.sleep(0.01)


def row_count(run: Path) -> int:
    """How many steps were recorded so far, repeated ones counted again."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b'"grad_norm"')
    except FileNotFoundError:
        return 0


def wait_for_rows(job: Job, run: Path, count: int, seconds: float = SECONDS) -> bool:
    """Wait until `count` steps are recorded; False if the job ends before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = job.alive()
        if row_count(run) >= count:
            return True
        if not alive:
            return False
        time.sleep(0.002)
    raise TimeoutError(f"{count} steps were not recorded within {seconds:g} s")


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))
