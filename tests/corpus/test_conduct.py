"""A preparation from raw files to stores: the same bytes whoever does the work, and whatever happens to them."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml
from forked import Forked
from small_corpus import config, corpus, refused_by, text
from small_corpus import made as made_of

from megatrain.cli.main import main
from megatrain.cli.preparation import VERBS
from megatrain.corpus import conduct, final, foresight, mapping, phases, preview
from megatrain.corpus.document import Document, Tally
from megatrain.corpus.duplicates.parameters import DedupConfig, LeakConfig, LeakSet
from megatrain.corpus.revision import files_in
from megatrain.corpus.shards import documents_of
from megatrain.data.indexed import TokenStore
from megatrain.data.tokenizer import load_tokenizer
from megatrain.data.tokenizers.fitting import train_tokenizer


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, files that users see) of a preparation by one worker in this process."""
    folder = tmp_path_factory.mktemp("prepared")
    corpus(folder / "raw")
    config(folder, "raw")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["data", "prepare", "prepare.yaml", "--worker"]) == 0
    finally:
        os.chdir(before)
    return folder, made_of(folder)


def test_what_is_made(done):
    folder, made = done
    names = set(made)
    assert {
        "REPORT.md",
        "blend.yaml",
        "prepared.json",
        "web.bin",
        "web.idx",
        "packed.bin",
        "code.bin",
        "web_valid.bin",
    } <= names
    assert sorted(name for name in names if name.startswith("documents/packed")) == ["documents/packed-000000.jsonl.zst"]
    counts = {name: TokenStore(folder / "out" / name).documents for name in ("web", "web_valid", "packed", "code")}
    kept = counts["web"] + counts["web_valid"]
    assert kept == 150 - 10 + 1  # without copies, the near one and the short one; ten are in both, and packed comes first
    assert counts["code"] + counts.get("code_valid", 0) == 4
    assert json.loads(made["prepared.json"])["files"] == sorted(names - {"prepared.json"})
    blend = yaml.safe_load(made["blend.yaml"])["data"]
    assert blend["train"] == [
        {"path": "out/code", "weight": 1.0},
        {"path": "out/packed", "weight": 0.5},
        {"path": "out/web", "weight": 1.0},
    ]
    assert blend["tokenizer"] == "bytes" and "out/web_valid" in blend["valid"]
    report = made["REPORT.md"].decode()
    assert "gopher.words.least" in report and "duplicates.exact" in report and "duplicates.near" in report
    assert " tokens)." in report
    assert "tokens in" in report and "lost in dedup" in report
    assert "(in its place: raw/" in made["removed.md"].decode()  # the document that a copy is a copy of
    assert re.search(
        r"\([89]\d% of raw/a\.jsonl:\d+\)", made["removed.md"].decode()
    )  # the document that a near copy is near to
    assert b"someone@example.org" not in made["web.bin"] + made["web_valid.bin"]


def test_a_second_run_has_nothing_to_do_and_gives_names_again(done, monkeypatch, capsys):
    folder, made = done
    monkeypatch.chdir(folder)
    (folder / "out/REPORT.md").unlink()
    (folder / "out/web.idx").unlink()
    work = sorted((folder / "out/work").rglob("done.json"))
    times = [path.stat().st_mtime_ns for path in work]
    assert main(["data", "prepare", "prepare.yaml", "--worker"]) == 0
    assert made_of(folder) == made
    assert [path.stat().st_mtime_ns for path in work] == times


def test_any_number_of_workers_and_any_order_of_files_give_the_same_bytes(done, tmp_path):
    _, made = done
    corpus(tmp_path / "raw")
    for path in sorted((tmp_path / "raw").iterdir(), reverse=True):  # another order in the folder
        shutil.copy2(path, tmp_path / "moved")
        path.unlink()
        (tmp_path / "moved").rename(path)
    config(tmp_path, "raw")
    run(tmp_path, "run.workers=4")
    assert made_of(tmp_path) == made


def run(folder, *words):
    command = [sys.executable, "-m", "megatrain", "data", "prepare", "prepare.yaml", *words]
    return subprocess.run(command, cwd=folder, check=True, timeout=120, capture_output=True, text=True)


COUNTING = """
import os, signal, sys
from pathlib import Path
from megatrain.cli.main import main
from megatrain.corpus.work.chores import Published

log, last, publish = Path("begun.txt"), int(sys.argv[1]), Published.publish

def counted(self, phase, chore, progress):
    with log.open("a") as file:
        file.write(f"{phase.title} {chore.name}\\n")
    begun = log.read_text().count("\\n")
    publish(self, phase, chore, progress if begun != last else lambda count: os.kill(os.getpid(), signal.SIGKILL))

Published.publish = counted
sys.exit(main(["data", "prepare", "prepare.yaml", "--worker"]))
"""
"""A worker that writes down which chores it begins, and is killed in the midst of one of them, by its number among all that were begun."""


def forked_workers(folder, *last):
    """Workers at the same time, each killed in the chore of its number, 0: not at all; their exit codes."""
    (folder / "worker.py").write_text(COUNTING)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    names = [folder / f"worker_{number}.txt" for number in range(len(last))]
    workers = [
        Forked([str(folder / "worker.py"), str(number)], environment, name, name)
        for number, name in zip(last, names, strict=True)
    ]
    return [worker.wait(120) for worker in workers]


def begun_in(folder):
    """How often each chore was begun."""
    return Counter((folder / "begun.txt").read_text().splitlines())


@pytest.mark.timeout(200)
def test_two_workers_do_each_chore_once(done, tmp_path, monkeypatch):
    corpus(tmp_path / "raw")
    config(tmp_path, "raw")
    monkeypatch.chdir(tmp_path)
    assert forked_workers(tmp_path, 0, 0) == [0, 0]
    begun = begun_in(tmp_path)
    assert set(begun.values()) == {1} and {"documents unit_000000", "report all"} <= set(begun)
    assert made_of(tmp_path) == done[1]


@pytest.mark.timeout(200)
def test_each_of_three_kills_costs_the_chore_that_it_fell_into(done, tmp_path, monkeypatch):
    corpus(tmp_path / "raw")
    config(tmp_path, "raw")
    monkeypatch.chdir(tmp_path)
    moments = (3, 22, 40)
    for moment in moments:
        assert forked_workers(tmp_path, moment) == [-signal.SIGKILL]
        assert made_of(tmp_path) == {}
    order = (tmp_path / "begun.txt").read_text().splitlines()
    killed = [order[moment - 1] for moment in moments]
    assert forked_workers(tmp_path, 0, 0) == [0, 0]
    begun = begun_in(tmp_path)
    assert begun == Counter(dict.fromkeys(begun, 1)) + Counter(killed)
    assert [chore.split()[0] for chore in killed] == ["documents", "compared", "encoded"]
    assert made_of(tmp_path) == done[1]


@pytest.mark.timeout(200)
@pytest.mark.fault(
    injection="kill -9 of workers of `data prepare` at three random moments",
    promise="each redoes at most the unit it was at; the same bytes",
    layout="2 workers",
)
def test_killed_workers_change_nothing(done, tmp_path, measured):
    _, made = done
    corpus(tmp_path / "raw")
    config(tmp_path, "raw")
    command = [sys.executable, "-m", "megatrain", "data", "prepare", "prepare.yaml", "run.workers=2"]
    draw = random.Random(5)
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        killed = 0
        while killed < 3 and process.poll() is None:
            try:
                process.wait(draw.uniform(0.5, 2.5))
            except subprocess.TimeoutExpired:
                workers = psutil.Process(process.pid).children()
                if workers:
                    draw.choice(workers).send_signal(signal.SIGKILL)
                    killed += 1
        said = process.communicate()[1]
    assert process.returncode == 0 and killed > 0, said
    assert made_of(tmp_path) == made


def test_a_dry_run_says_what_each_rule_would_remove_and_writes_nothing(done, tmp_path, monkeypatch, capsys):
    corpus(tmp_path / "raw")
    config(tmp_path, "raw")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", "prepare.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("# What the rules would remove") and "A dry run over the beginnings of" in said
    assert "](" not in said  # no file lies beside it
    assert "| gopher.words.least | 1 | 0.5% |" in said
    monkeypatch.setattr(preview, "SAMPLE_LETTERS", 3)
    assert main(["data", "read", "prepare.yaml", "--dry-run"]) == 0
    assert re.search(r"^[78] documents \(.*\) became [78] \(", capsys.readouterr().out, re.MULTILINE)  # one of each unit
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepare.yaml", "raw"]


def test_every_verb_is_known():
    assert VERBS.keys() | {"filter"} == phases.LAST.keys()


def test_what_says_auto_takes_the_rules_of_kind_and_language(tmp_path):
    corpus(tmp_path / "raw")
    told = conduct.load_config(str(config(tmp_path, "raw")), ["read.sources=[{name: web, paths: [raw/a.jsonl], language: en}]"])
    assert told.read.sources[0].rules == ("auto",)
    stages = mapping.stages_of(told, told.read.sources[0], "filter")
    assert [name for name, _ in stages] == ["clean", "filter"]
    document, tally = Document("Too short.", "web", "raw/a.jsonl", 0, "text", "en"), Tally()
    refused = set(refused_by(stages[1][1], document, tally))
    assert {"gopher.words.least", "c4.sentences"} <= refused
    wrapped = Document("A long line that is wrapped\nat a fixed width it is.", "web", "raw/a.jsonl", 0, "text", "en")
    refused_by(stages[1][1], wrapped, tally)
    assert wrapped.text == "A long line that is wrapped\nat a fixed width it is."
    chinese = Document("太短。", "web", "raw/a.jsonl", 0, "text", "zh")
    assert any(name.startswith("fineweb2_zh.") for name in refused_by(stages[1][1], chinese, tally))


@pytest.mark.parametrize(
    ("verb", "stages"), [("read", ["read"]), ("clean", ["read", "clean"]), ("filter", ["read", "clean", "filter"])]
)
def test_a_verb_ends_at_its_stage(tmp_path, monkeypatch, capsys, verb, stages):
    corpus(tmp_path / "raw")
    config(tmp_path, "raw")
    monkeypatch.chdir(tmp_path)
    assert main(["data", verb, "prepare.yaml", "--worker"]) == 0
    report = (tmp_path / "out/REPORT.md").read_text()
    rows = [
        line.split(" | ")[0].removeprefix("| ")
        for line in report.split("## Stages")[1].split("##")[0].splitlines()
        if "%" in line
    ]
    assert rows == stages
    text = "".join(document.text for path in (tmp_path / "out/documents").iterdir() for document in documents_of(path))
    assert ("someone@example.org" in text) == (verb == "read")
    assert ("too short" in text) == (verb != "filter")


def test_annotating_keeps_all_with_their_scores(tmp_path, monkeypatch):
    corpus(tmp_path / "raw")
    config(tmp_path, "raw")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "filter", "prepare.yaml", "filter.mode=annotate", "--worker"]) == 0
    kept = [document for path in (tmp_path / "out/documents").glob("web-*") for document in documents_of(path)]
    assert len(kept) == 155
    short = next(document for document in kept if document.text == "too short")
    assert short.scores["gopher.words"] == 2.0 and short.marks["url"] == "http://x/153"
    assert "gopher.words.least" in short.marks["breaks"] and "breaks" not in kept[0].marks


def test_a_changed_rule_is_another_preparation_and_what_is_no_more_goes(tmp_path, monkeypatch):
    corpus(tmp_path / "raw")
    config(tmp_path, "raw")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", "prepare.yaml", "--worker"]) == 0
    assert (tmp_path / "out/web_valid.bin").exists()
    assert main(["data", "prepare", "prepare.yaml", "tokenize.held_out=0", "filter.mode=annotate", "--worker"]) == 0
    assert not (tmp_path / "out/web_valid.bin").exists()
    assert TokenStore(tmp_path / "out/web").documents == 142


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["read.sources=[{name: a/b, paths: [x]}]"], r"read.sources[0].name='a/b' becomes a name of files"),
        (["read.sources=[{name: web_valid, paths: [x]}]"], "not with _valid at the end"),
        (
            ["read.sources=[{name: web, paths: [raw/a.jsonl], keep: [url, breaks]}]"],
            "read.sources[0].keep has 'breaks', which is the name of a mark that a preparation sets itself",
        ),
        (["tokenize.vocab_size=300"], "a tokenizer is either given or trained"),
        (
            ["run.on=slurm"],
            "run.on=slurm, and this is no SLURM job. Submit one (sbatch --array 0-63 launch/prepare.sbatch CONFIG.yaml)",
        ),
        (
            ["clean.words.mask=x"],
            "clean.words.mask=x has no effect: it has one when clean.words.lists is given, and clean.words.action is mask",
        ),
        (["augment.noise=0.1"], "augment.noise=0.1 has no effect: it has one when augment.copies is above 0"),
        (
            ["augment.copies=1", "augment.sources=[wob]"],
            "augment.sources has 'wob', which is none of read.sources: web, packed, code. Use one of these.",
        ),
        (["dedup.agreement=0.8", "dedup.near=false"], "dedup.agreement=0.8 has no effect: it has one when dedup.near is true"),
        (["dedup.line_letters=9"], "dedup.line_letters=9 has no effect: it has one when dedup.lines is lines or paragraphs"),
        (["dedup.leaks.words=9"], "dedup.leaks.words=9 has no effect: it has one when dedup.leaks.sets is given"),
        (["perplexity.sample=9"], "perplexity.sample=9 has no effect: it has one when perplexity.models is given"),
        (["tokenize.sample=9"], "tokenize.sample=9 has no effect: it has one when tokenize.vocab_size is given"),
        (
            ["tokenize.tokenizer=null", "tokenize.threads=2"],
            "tokenize.threads=2 has no effect: it has one when tokenize.tokenizer or tokenize.vocab_size is given",
        ),
        (["read.sources=[{name: a, paths: [x], weight: 0}]"], "read.sources[0].weight=0.0 must be greater than 0"),
        (["read.sources=[{name: a, paths: [x], weight: .nan}]"], "read.sources[0].weight is nan; expected a finite number."),
        (["read.sources=[{name: a, paths: [x], thresholds: {gopher.hashes: .nan}}]"], "read.sources[0].thresholds"),
        (["dedup.agrement=0.5"], "Did you mean dedup.agreement?"),
        (["read.sources=[{name: web, paths: [none/*.jsonl]}]"], "none/*.jsonl matches no file"),
        (["read.sources=[{name: web, paths: [raw/a.jsonl], rules: [gophre]}]", "--worker"], "there is no rule 'gophre'"),
    ],
)
def test_configs_that_cannot_be_meant(tmp_path, monkeypatch, capsys, words, said):
    corpus(tmp_path / "raw")
    config(tmp_path, "raw")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["data", "prepare", "prepare.yaml", *words]) == 1
    assert said in capsys.readouterr().err


def test_filter_without_a_config_needs_its_options(capsys):
    assert main(["data", "filter", "--keep", "head"]) == 2
    assert "data filter without a CONFIG.yaml needs --input, --output, --ngram." in capsys.readouterr().err
    for option in (["--worker"], ["--on", "slurm"], ["--dry-run"]):
        assert main(["data", "filter", *option]) == 2
        named = " ".join(option)
        assert f"data filter {named} needs a CONFIG.yaml: megatrain data filter prepare.yaml {named}" in capsys.readouterr().err
    assert main(["data", "filter", "c.yaml", "--ngram", "m.bin"]) == 2
    assert "data filter takes a CONFIG.yaml (c.yaml) or --ngram, not both: leave one of them out." in capsys.readouterr().err


def test_a_job_array_without_a_config_is_told_so():
    script = [str(Path(__file__).parents[2] / "launch/prepare.sbatch"), "filter"]
    environment = {**os.environ, "SLURM_JOB_ID": "1", "MEGATRAIN_ROOT": str(Path(__file__).parents[2])}
    found = subprocess.run(["bash", *script], check=False, env=environment, capture_output=True, text=True, timeout=60)
    said = "prepare.sbatch: filter of what? Name a CONFIG.yaml: sbatch --array 0-N launch/prepare.sbatch filter CONFIG.yaml\n"
    assert (found.returncode, found.stderr) == (2, said)


def test_a_changed_shard_is_named(tmp_path, monkeypatch, capsys):
    corpus(tmp_path / "raw")
    config(tmp_path, "raw")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "read", "prepare.yaml", "--worker"]) == 0
    (shard,) = (tmp_path / "out/work").glob(f"documents-*/unit_000000/{mapping.DOCUMENTS}")
    with shard.open("ab") as file:
        file.write(b"x")
    (tmp_path / "out/REPORT.md").unlink()
    assert main(["data", "read", "prepare.yaml", "--worker"]) == 1
    assert "was changed after it was written. Remove " in capsys.readouterr().err


def test_files_that_the_config_names_decide_too(tmp_path):
    leaks = tmp_path / "leaks.txt"
    leaks.write_text("one")
    settings = DedupConfig(leaks=LeakConfig(sets=(LeakSet("a", (str(leaks),)),)))
    before = files_in(settings)
    assert list(before) == [str(leaks)]
    leaks.write_text("two")
    assert files_in(settings) != before


def test_passages_of_an_evaluation_set_are_refused(tmp_path, monkeypatch):
    corpus(tmp_path / "raw")
    config(tmp_path, "raw")
    (tmp_path / "leak.txt").write_text(text(7))
    monkeypatch.chdir(tmp_path)
    assert main(["data", "filter", "prepare.yaml", "dedup.leaks.sets=[{name: quiz, files: [leak.txt]}]", "--worker"]) == 0
    assert "| leaks.quiz | 1 |" in (tmp_path / "out/REPORT.md").read_text()
    words = ["dedup.leaks.sets=[{name: quiz, files: [leak.txt]}]", "filter.mode=annotate", "--worker"]
    assert main(["data", "filter", "prepare.yaml", *words]) == 0
    said = "- 1 documents have passages of the evaluation set quiz and stay with filter.mode=annotate (web 1): leave out those whose mark"
    assert said in (tmp_path / "out/REPORT.md").read_text()


def test_changed_copies_are_trained_on_and_not_held_out(tmp_path, monkeypatch):
    corpus(tmp_path / "raw")
    config(tmp_path, "raw")
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            ["data", "dedup", "prepare.yaml", "augment.copies=2", "augment.sources=[web]", "tokenize.held_out=0.1", "--worker"]
        )
        == 0
    )
    kept = [document for path in sorted((tmp_path / "out/documents").iterdir()) for document in documents_of(path)]
    held_out = [document for path in sorted((tmp_path / "out/held_out").iterdir()) for document in documents_of(path)]
    web = [document for document in kept if document.source == "web"]
    assert len(web) == 3 * len({document.name for document in web}) and all(
        "augmented" not in document.marks for document in held_out
    )
    assert [document.marks.get("augmented") for document in web[:3]] == [None, 1, 2]
    size = sum(len(document.text.encode()) for document in web if "augmented" in document.marks)
    told = f"{2 * len(web) // 3:,} changed copies ({size / 1000:.2f} kB)"
    assert f" Beside them stand {told}: web {told.replace(' changed copies', '')}." in (tmp_path / "out/REPORT.md").read_text()


def test_documents_are_judged_by_an_n_gram_model(tmp_path, monkeypatch):
    corpus(tmp_path / "raw")
    config(tmp_path, "raw")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("\n".join(text(seed) for seed in range(30)))
    fit = ["ngram", "fit", "--order", "2", "--input", "text", "--arpa", "en.arpa", "--discount-fallback", "--memory", "64M"]
    assert main([*fit, "--workers", "1"]) == 0
    models = "perplexity.models=[{language: en, path: en.arpa}]"
    assert main(["data", "dedup", "prepare.yaml", models, "perplexity.keep=[head]", "--worker"]) == 0
    thresholds = json.loads((tmp_path / "out/thresholds.json").read_text())["languages"]
    assert thresholds.keys() == {"en"} and thresholds["en"]["documents"] == 171  # text of web and packed
    kept = [document for path in (tmp_path / "out/documents").iterdir() for document in documents_of(path)]
    kept += [document for path in (tmp_path / "out/held_out").iterdir() for document in documents_of(path)]
    judged = [document for document in kept if document.kind == "text"]
    assert len(judged) == round(0.3 * 171) and {document.marks["perplexity_part"] for document in judged} == {"head"}
    assert all(document.scores["perplexity"] < thresholds["en"]["middle"] for document in judged)
    assert sum(document.kind == "code" for document in kept) == 5  # no model: they stay
    report = (tmp_path / "out/REPORT.md").read_text()
    assert "## Rules of perplexity" in report and "perplexities.png" in report


def test_the_tokens_around_documents_are_those_of_the_config(tmp_path, monkeypatch, capsys):
    corpus(tmp_path / "raw")
    config(tmp_path, "raw")
    monkeypatch.chdir(tmp_path)
    assert (
        main(["data", "prepare", "prepare.yaml", "tokenize.eod=10", "tokenize.bos=33", "tokenize.held_out=0", "--worker"]) == 0
    )
    tokens = TokenStore(tmp_path / "out/code").document(0)
    assert (tokens[0], tokens[-1]) == (33, 10)
    assert yaml.safe_load((tmp_path / "out/blend.yaml").read_text())["data"]["eod"] == 10
    assert main(["data", "prepare", "prepare.yaml", "tokenize.eod=999", "--worker"]) == 1
    assert "999" in capsys.readouterr().err


def test_a_rule_that_auto_leaves_off_is_on_where_it_is_named(tmp_path):
    corpus(tmp_path / "raw")
    text = "A long line that is wrapped\nat a fixed width it is."
    for rules, left in (("[auto]", text), ("[auto, c4]", "at a fixed width it is.")):
        source = f"read.sources=[{{name: web, paths: [raw/a.jsonl], language: en, rules: {rules}}}]"
        told = conduct.load_config(str(config(tmp_path, "raw")), [source])
        document = Document(text, "web", "raw/a.jsonl", 0, "text", "en")
        refused_by(mapping.stages_of(told, told.read.sources[0], "filter")[1][1], document, Tally())
        assert document.text == left


def test_files_beside_the_tokenizer_decide_too(tmp_path, monkeypatch):
    corpus(tmp_path / "raw")
    path = str(config(tmp_path, "raw"))
    monkeypatch.chdir(tmp_path)
    train_tokenizer(["raw/c0.py"], 300, tmp_path / "tokenizer.json")
    words = ["tokenize.tokenizer=tokenizer.json"]
    keys = []
    for end in ("<|endoftext|>", "a"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        keys.append(conduct.preparation_of(path, words, "prepare")[1].key)
    assert keys[0] != keys[1]
    loads = []
    monkeypatch.setattr(foresight, "load_tokenizer", lambda *asked: loads.append(asked) or load_tokenizer(*asked))
    conduct.preparation_of(path, words, "prepare")
    assert loads == [("tokenizer.json", None, None)]  # once: a large vocabulary takes seconds


def test_a_worker_that_is_frozen_while_it_names_results_holds_nobody_up(done, monkeypatch):
    folder, made = done
    monkeypatch.chdir(folder)
    monkeypatch.setattr(final, "LOCK_SECONDS", 0.3)
    (folder / "out/REPORT.md").unlink()
    with (folder / "out/work/.placed.json.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["data", "prepare", "prepare.yaml", "--worker"]) == 0
    assert made_of(folder) == made
