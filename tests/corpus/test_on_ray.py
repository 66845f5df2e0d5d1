"""Workers on a Ray cluster make the same bytes: `pip install ray` (240 MB), then `python -m pytest -m slow tests/corpus/test_on_ray.py`."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatrain.corpus.on_ray import run_on_ray
from megatrain.corpus.work.pool import PoolError


class RayError(Exception):
    """As Ray's, with what a worker has raised as its cause."""

    cause = RuntimeError("a worker ended with exit code 1; what it said stands above")


def test_a_worker_that_fails_on_ray_is_an_error_of_one_line(monkeypatch):
    def get(_ended):
        raise RayError("many lines of a traceback")

    remote = SimpleNamespace(remote=lambda *words: words)
    ended = []
    ray = SimpleNamespace(
        init=lambda **_: None,
        remote=lambda **_: lambda _work: remote,
        wait=lambda waiting, timeout: (waiting, []),
        get=get,
        shutdown=lambda: ended.append(True),
        exceptions=SimpleNamespace(RayError=RayError),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(
        PoolError, match=r"^a worker on Ray failed: a worker ended with exit code 1; what it said stands above$"
    ):
        run_on_ray(lambda _words: 0, ["data", "read", "prepare.yaml"], 2, lambda: None)
    assert ended == [True]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_on_ray_make_the_same_bytes(tmp_path):
    pytest.importorskip("ray", reason="Ray is an extra that no other test needs")
    rows = [json.dumps({"text": f"Row {number} of many rows that are here to be read and counted."}) for number in range(2000)]
    (tmp_path / "raw.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "prepare.yaml").write_text(
        "read: {unit_bytes: 20000, sources: [{name: text, paths: [raw.jsonl], language: en, rules: []}]}\n"
        "dedup: {near: false, parts: 1}\ntokenize: {tokenizer: bytes}\n"
    )
    made = []
    for words in (["--on", "ray", "run.workers=2", "output.dir=prepared"], ["--worker", "output.dir=locally"]):
        command = [sys.executable, "-m", "megatrain", "data", "prepare", "prepare.yaml", *words]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=500)
        out = tmp_path / words[-1].partition("=")[2]
        paths = [path for path in sorted(out.rglob("*")) if path.is_file() and "work" not in path.relative_to(out).parts]
        made.append({str(path.relative_to(out)): path.read_bytes().replace(b"locally", b"prepared") for path in paths})
    assert made[0] == made[1] and {"text.bin", "REPORT.md"} <= set(made[0])
