"""Every verb of a run works without each package that it does not need, and says in one line what it lacks."""

import json
import subprocess
import sys

import jobs
import pytest

WORKER = """
import os, sys, threading
import numpy, torch, tokenizers, safetensors.torch  # what no run does without; imported once, before the processes part
from pathlib import Path

class Missing:
    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def verbs(package, words):
    packages = package.split(",")
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
    sys.meta_path.insert(0, Missing(packages))
    torch.set_num_threads(1)
    from megatrain.cli.main import main
    config, run = words[1], Path(words[2], package)
    codes = [
        main(["train", config, f"log.dir={run}", "log.to=[tensorboard]"]),
        main(["bench", config, f"log.dir={run}", "--steps", "1", "--warmup", "1"]),
        main(["generate", str(run / "checkpoints"), "--prompt", "a", "--max-tokens", "2"]),
    ]
    print("CODES", codes, flush=True)

for package in sys.argv[3:]:
    print("WITHOUT", package, flush=True)
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.dup2(1, 2)
        try:
            verbs(package, sys.argv)
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(child, 0)
"""
LOST = {
    "zstandard": [],
    "pyarrow": [],
    "triton": [],
    "numba": [],
    "rich": [],
    "tensorboard": [
        "warning: no tensorboard, since tensorboard cannot be imported (pip install tensorboard); training goes on"
    ],
    "matplotlib": ["warning: no loss.png, since matplotlib cannot be imported (pip install matplotlib); training goes on"],
}
ALL = ",".join(LOST)


@pytest.fixture
def said(tmp_path, request):
    """What train, bench and generate said, one after the other, without packages."""
    house, without = tmp_path, request.param
    data = {"train": str(jobs.write_store(house / "store")), "tokenizer": "bytes"}
    config = jobs.write_config(
        house / "config.yaml", jobs.tiny(data, house, model={"vocab_size": 257}, train={"steps": 2}, optim={"warmup_steps": 1})
    )
    script = house / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(config), str(house / "runs"), *without],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("WITHOUT ")[1:]
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in parts}


@pytest.mark.parametrize("said", [[ALL], pytest.param([*LOST], marks=pytest.mark.slow)], ids=["all", "each"], indirect=True)
def test_a_run_goes_on_without(said):
    """Without all of them at once; `slow`, without each, as that takes seven times three verbs that import anew."""
    for package, text in said.items():
        assert "CODES [0, 0, 0]" in text, text
        lost = [line for name in package.split(",") for line in LOST[name]]
        assert sorted(line for line in text.splitlines() if line.startswith("warning")) == sorted(lost)
        bench = next(json.loads(line) for line in text.splitlines() if line.startswith('{"'))
        assert bench["tokens_per_second"] > 0


def test_a_verb_that_needs_a_package_says_which(capsys, monkeypatch):
    from megatrain.cli import main as cli

    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "megatrain.plan.picture", raising=False)
    assert cli.main(["plan", "launch/configs/gpt_pipeline.yaml", "data.train=x", "data.tokenizer=bytes"]) == 0
    assert (
        cli.main(["plan", "launch/configs/gpt_pipeline.yaml", "data.train=x", "data.tokenizer=bytes", "--timeline", "t.png"])
        == 1
    )
    assert "megatrain: error: matplotlib, which this needs, is not installed: pip install matplotlib" in capsys.readouterr().err


def test_where_a_person_watches_a_run_without_rich_has_no_bar(tmp_path, capsys, monkeypatch):
    from megatrain.records.log import LogDisplay, RunLog

    monkeypatch.setitem(sys.modules, "rich.console", None)
    with RunLog(tmp_path, LogDisplay(writers=(), watched=True), total_steps=3, sequence_length=8) as log:
        log.say("hello")
    said = capsys.readouterr()
    assert said.out == "hello\n"
    assert said.err == "warning: no progress bar, since rich cannot be imported (pip install rich); training goes on\n"
