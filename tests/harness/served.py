"""A server as a process, over a tiny model with random weights, and what clients of it do."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs

MODEL = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 256,
    "vocab_size": 261,
    "init_std": 0.4,
}
"""Bytes are its tokens; four ids beyond have no text."""
TEMPLATE = """{% for m in messages %}{% if m.role not in ("system", "user", "assistant") %}{{ raise_exception("no such role") }}{% endif %}\
{{ m.role[0] }}:{{ m.content }}
{% endfor %}{% if add_generation_prompt %}{{ opening or "a:" }}{% endif %}"""


def save_model(folder: Path, **sections: Any) -> Path:
    """Save a model with random weights as a run's checkpoint; returns the run's folder."""
    import torch

    from megatrain.checkpoint.save import Contents, save
    from megatrain.config.load import dump, from_dict
    from megatrain.models.gpt import build_gpt
    from megatrain.models.layers import Build
    from megatrain.parallel.mesh import ParallelContext, Rows
    from megatrain.parallel.portion import Portion

    tree = {"model": MODEL, "data": {"tokenizer": "bytes"}, "train": {"precision": "fp32", "hang_timeout_seconds": 20.0}}
    config = from_dict({name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections}})
    ctx = ParallelContext.single()
    vocab_size = config.model.vocab_size or 0
    chunk = build_gpt(Build(Rows(ctx.tp), torch.float32, ctx.device, config.model, vocab_size, seed=7))[0]
    weights = {p.spec.name: Portion.whole(p.spec, p.detach()) for p in chunk.logical_parameters()}
    save(folder / "checkpoints", Contents(5, {}, dump(config)), {"weights": weights}, ctx)
    return folder


@dataclass
class Running:
    """A server that answers."""

    url: str
    folder: Path
    """Where it keeps its log and feedback."""
    job: jobs.Job

    def get(self, path: str) -> Any:
        """The JSON at a path, whatever the status."""
        return self.ask(path)[1]

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON, headers) of the answer to a GET, or to a POST of a body: bytes as they are, else as JSON."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json"} if data is not None else {}
        request = urllib.request.Request(self.url + path, data, {**given, **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, _value(reply.read()), dict(reply.headers)
        except urllib.error.HTTPError as error:
            return error.code, _value(error.read()), dict(error.headers)

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to every rank, as a launcher does."""
        import os

        for process in self.job.processes:
            os.kill(process.pid, number)

    def said(self, rank: int = 0) -> str:
        """What a rank has written on stderr."""
        return (self.job.folder / f"err_{rank}").read_text()


def _value(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")


@contextlib.contextmanager
def running(folder: Path, model: Path, *words: str, size: int = 1, ready: bool = True) -> Iterator[Running]:
    """`megatrain serve MODEL WORDS` as `size` ranks; killed at the end where it still runs. ready: wait until it answers."""
    port = jobs.free_port()
    logs = ["--log", str(folder / "traffic.jsonl"), "--feedback", str(folder / "feedback.jsonl")]
    command: Sequence[str] = [str(model), *words, "--port", str(port), *logs]
    folder.mkdir(parents=True, exist_ok=True)
    with jobs.start(folder / "job", command, size, verb="serve") as job:
        server = Running(f"http://127.0.0.1:{port}", folder, job)
        if ready:
            wait_until(lambda: _is_ready(server), 60.0, server)
        yield server


def _is_ready(server: Running) -> bool:
    if not server.job.alive():
        raise RuntimeError(server.said())
    with contextlib.suppress(OSError):
        return server.ask("/health")[0] == 200
    return False


def wait_until(holds: Any, seconds: float, server: Running | None = None) -> None:
    """Wait until something holds. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {'' if server is None else server.said()}")
        time.sleep(0.02)
