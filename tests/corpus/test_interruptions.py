"""A preparation that is stopped, or meets what it cannot use: nothing is published half, an error says what to do, the next run goes on."""

import os
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import jobs
import psutil
import pytest
import yaml
from small_corpus import made, rows_alone

from megatrain.cli.main import main
from megatrain.corpus import conduct
from megatrain.corpus.work.leases import Leases


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows_alone(tmp_path)
    return tmp_path


def half(folder):
    """What is left of writing that has not ended."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*.part")]


@contextmanager
def files_of_at_most(size):
    """Writing more to a file fails, as on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_publishes_nothing_half_and_the_next_run_goes_on(here, capsys):
    for size in (300, 2_000, 20_000):  # a shard, the facts of a unit, a token store
        with files_of_at_most(size):
            assert main(["data", "prepare", "prepare.yaml", "--worker"]) == 1
        assert "File too large (while writing): 'out/work/" in capsys.readouterr().err
        assert half(here) == [] and list((here / "out/work/leases").iterdir()) == []
        assert set(made(here)) == set()
    assert main(["data", "prepare", "prepare.yaml", "--worker"]) == 0
    assert {"a.bin", "b.bin", "REPORT.md"} <= set(made(here))


@pytest.mark.timeout(120)
def test_a_run_that_is_told_to_stop_leaves_nothing_behind(here):
    with jobs.Job(here / "job") as job:
        job.fork(["data", "prepare", "prepare.yaml", "run.workers=2"], jobs.environment())
        (process,) = job.processes
        while not list((here / "out").glob("work/documents-*")):
            assert process.poll() is None
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        (ended,) = job.finish()
    assert ended.code == 130 and ended.err.endswith("megatrain: interrupted\n"), ended
    assert len(workers) == 2 and not any(worker.is_running() for worker in workers)
    assert half(here) == [] and list((here / "out/work/leases").iterdir()) == [] and made(here) == {}
    assert main(["data", "prepare", "prepare.yaml", "--worker"]) == 0


def test_workers_read_the_config_as_it_was_when_they_were_asked_for(here, monkeypatch):
    def run(words, count, look):
        (here / "prepare.yaml").write_text("read: nonsense")
        assert main([*words]) == 0

    monkeypatch.setattr(conduct, "_run_here", run)
    assert main(["data", "prepare", "prepare.yaml", "tokenize.held_out=0"]) == 0
    assert "a.bin" in made(here) and "a_valid.bin" not in made(here)


def test_input_that_is_another_when_workers_begin_is_told(here, monkeypatch, capsys):
    def run(words, *_):
        with (here / "raw/a.jsonl").open("a") as file:
            file.write('{"text": "One more row that came late."}\n')
        assert main([*words]) == 0

    monkeypatch.setattr(conduct, "_run_here", run)
    assert main(["data", "prepare", "prepare.yaml"]) == 1
    assert capsys.readouterr().err.endswith(
        "megatrain: error: all workers have ended well, and what this command began with is not done: files of the input, or files that "
        "the config names, were changed meanwhile, and the workers have prepared what they found. Run the same command again.\n"
    )
    monkeypatch.setattr(conduct, "_run_here", lambda *_: pytest.fail("nothing is left to do"))
    assert main(["data", "prepare", "prepare.yaml"]) == 0
    assert "121 documents" in (here / "out/REPORT.md").read_text()


def test_without_its_work_a_preparation_is_done_all_the_same(here, monkeypatch, capsys):
    monkeypatch.setattr(conduct, "_run_here", lambda words, *_: main([*words]))
    assert main(["data", "prepare", "prepare.yaml", "output.keep_work=false"]) == 0
    before = made(here)
    assert not [path for path in (here / "out/work").iterdir() if path.is_dir()]
    monkeypatch.setattr(conduct, "_run_here", lambda *_: pytest.fail("nothing is left to do"))
    assert main(["data", "prepare", "prepare.yaml"]) == 0  # nothing is left to do
    assert main(["data", "prepare", "prepare.yaml", "--worker"]) == 0
    assert made(here) == before
    (here / "out/a.bin").unlink()
    assert main(["data", "prepare", "prepare.yaml", "--worker"]) == 0
    assert made(here) == before


def test_what_a_run_writes_is_no_input_of_it(here, capsys):
    (here / "prepare.yaml").write_text(
        yaml.safe_dump(
            {"read": {"sources": [{"name": "all", "paths": ["**/*.jsonl*"], "rules": []}]}, "output": {"dir": "raw/out"}}
        )
    )
    assert main(["data", "read", "prepare.yaml", "--worker"]) == 0
    assert main(["data", "read", "prepare.yaml", "output.sheet=7", "--worker"]) == 0
    assert "120 documents" in (here / "raw/out/REPORT.md").read_text()
    capsys.readouterr()
    assert main(["data", "read", "prepare.yaml", "output.dir=.", "--worker"]) == 1
    said = capsys.readouterr().err
    assert "all: **/*.jsonl* has its files in output.dir=., where results go. Set output.dir to a folder without input." in said


def test_a_folder_that_cannot_be_made_is_named(here, capsys):
    assert main(["data", "prepare", "prepare.yaml", "output.dir=prepare.yaml/out"]) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_another_config_waits_for_its_turn(here, capsys):
    with Leases(here / "out/work/leases", 60.0, "0" * 32).held("documents-0.unit_000000", None):
        for words in (["--worker"], []):
            assert main(["data", "prepare", "prepare.yaml", *words]) == 1
            said = capsys.readouterr().err
            assert (
                f"out/work is being worked at for another config, or other files than there are now, by process {os.getpid()}"
                in said
            )
    assert main(["data", "prepare", "prepare.yaml", "--worker"]) == 0


def test_a_unit_that_is_gone_is_made_again_and_a_damaged_one_is_named(here, capsys):
    assert main(["data", "prepare", "prepare.yaml", "--worker"]) == 0
    before = made(here)
    (unit,) = here.glob("out/work/documents-*/unit_000000")
    (here / "out/REPORT.md").unlink()
    (unit / "done.json").write_text("{}")
    for phase in ("report", "kept"):
        for done in here.glob(f"out/work/{phase}-*/*"):
            done.rename(here / f"{phase}-{done.name}")
    assert main(["data", "prepare", "prepare.yaml", "--worker"]) == 1
    assert f"{unit.relative_to(here)}/done.json is damaged or gone. Remove {unit.relative_to(here)}" in capsys.readouterr().err
    for path in unit.iterdir():
        path.unlink()
    unit.rmdir()
    assert main(["data", "prepare", "prepare.yaml", "--worker"]) == 0
    assert made(here) == before


def test_sources_of_which_nothing_stays(here):
    (here / "raw/a.jsonl").write_text("")
    words = [
        "tokenize.held_out=0",
        "read.sources=[{name: a, paths: [raw/a.jsonl]}, {name: b, paths: [raw/b.jsonl], rules: [fineweb2_zh]}]",
    ]
    assert main(["data", "prepare", "prepare.yaml", *words, "--worker"]) == 0
    names = set(made(here))
    assert not any(name.endswith((".bin", ".idx")) or name == "blend.yaml" for name in names)
    report = (here / "out/REPORT.md").read_text()
    assert "60 documents" in report and "- source a has no document that can be read" in report
    assert "- source b loses 100% of its documents (60 of 60), most of them in filter (60)" in report
    assert Path("out/documents/a-000000.jsonl.zst").exists()


def test_a_tokenizer_is_not_trained_on_nothing_and_the_report_says_why_there_is_nothing(here):
    (here / "raw/a.jsonl").write_text('{"text": "One document."}\n')
    words = [
        "tokenize.tokenizer=null",
        "tokenize.vocab_size=300",
        "read.sources=[{name: a, paths: [raw/a.jsonl], language: en}, {name: b, paths: [raw/b.jsonl], key: body}]",
    ]
    assert main(["data", "prepare", "prepare.yaml", *words, "--worker"]) == 0
    report = (here / "out/REPORT.md").read_text()
    assert "1 documents (13 B) became 0 (0.0%" in report and "- source b has no document that can be read" in report
    assert "- source a loses 100% of its documents (1 of 1), most of them in filter (1)" in report
    assert not Path("out/tokenizer.json").exists()
