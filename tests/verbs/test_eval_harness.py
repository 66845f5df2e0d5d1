"""`megatrain eval --harness` (megatrain.cli.harness_arguments): tables and files, nothing fetched, the same under every layout."""

import json
import os
import sys

import jobs
import pytest
from harness_tasks import close, write_model, write_tasks
from tokenizer_models import bilingual

from megatrain.extras import MissingPackageError
from megatrain.verbs.eval_harness import OFFLINE, HarnessOptions, main, table_of

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness' own


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    write_model(folder / "model", bilingual())
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture
def offline(monkeypatch):
    """The variables that the verb sets are taken back."""
    for name in OFFLINE:
        monkeypatch.setenv(name, "0")


def test_tables_results_and_items(here, offline, capsys):
    options = HarnessOptions(("choices", "r*"), here / "tasks", limit=3, json=here / "results.json", items=here / "items.jsonl")
    assert main(str(here / "model"), options) == 0
    assert [os.environ[name] for name in OFFLINE] == ["1", "1"]
    results = json.loads((here / "results.json").read_text())
    acc = results["results"]["choices"]["acc,none"]
    shown = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown[:-1]]
    assert rows[0] == ["task", "version", "filter", "n-shot", "metric", "", "value", "stderr"]
    assert rows[2][:7] == ["choices", "Yaml", "none", "0", "acc", "\u2191", f"{acc:.4f}"]
    assert [row[4] for row in rows[2:]] == ["acc", "acc_bytes", "acc_mutual_info", "acc_norm", "bits_per_byte"]
    assert shown[-1] == "27 requests, 0 truncated, 0 spanned" and results["config"]["counts"]["requests"] == 27
    items = [json.loads(line) for line in (here / "items.jsonl").read_text().splitlines()]
    assert [item["task"] for item in items] == ["choices"] * 3 + ["rolls"] * 3
    assert acc == sum(item["acc"] for item in items[:3]) / 3


def test_groups_are_a_table_of_their_own():
    found = {
        "groups": {"all": {"alias": "all of them", "acc,none": 0.25, "acc_stderr,none": "N/A", "name": "all", "sample_len": 3}},
        "versions": {"all": 2},
        "n-shot": {"all": 5},
        "higher_is_better": {"all": {"acc": True}},
    }
    assert table_of(found, "groups").splitlines() == [
        "| group       | version | filter | n-shot | metric |   | value  | stderr |",
        "| ----------- | ------- | ------ | ------ | ------ | - | ------ | ------ |",
        "| all of them | 2       | none   | 5      | acc    | \u2191 | 0.2500 | N/A    |",
    ]


def unreachable(**_how):
    raise ConnectionError("no hub")


def test_what_is_not_there(here, offline, monkeypatch):
    tasks = here / "tasks"
    with pytest.raises(
        ValueError, match=r"--harness choises: there is no such task\. There are 3, such as choices.* --include-path"
    ):
        main(str(here / "model"), HarnessOptions(("rolls", "choises"), tasks))
    with pytest.raises(ValueError, match=r"--include-path .*nowhere is no folder"):
        main(str(here / "model"), HarnessOptions(("rolls",), here / "nowhere"))
    monkeypatch.setattr("lm_eval.simple_evaluate", unreachable)
    with pytest.raises(
        ValueError, match=r"no hub; nothing is fetched without --hub\. .* save the set as \.jsonl, and give it by"
    ):
        main(str(here / "model"), HarnessOptions(("rolls",), tasks))
    with pytest.raises(ValueError, match=r"no hub\. Where the hub cannot be reached"):
        main(str(here / "model"), HarnessOptions(("rolls",), tasks, hub=True))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingPackageError, match=r"needs lm_eval: pip install 'megatrain\[harness\]'"):
        main(str(here / "model"), HarnessOptions(("rolls",), tasks))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--harness", "rolls", "--tasks", "quiz_en"], "--harness and --tasks are two evaluations. Leave one of them out."),
        (["--harness", "rolls", "--long", "cut"], "--long is about --tasks. Leave it out, or --harness."),
        (["--hub"], "--hub is about tasks of lm-evaluation-harness. Name some: --harness TASKS."),
        (["--gen-kwargs", "top_p=1"], "--gen-kwargs is about tasks of lm-evaluation-harness. Name some: --harness TASKS."),
        (["--harness", "rolls", "--json"], "--json: with --tasks say where results go: --json FILE."),
    ],
)
def test_options_that_do_not_go_together(words, message):
    ended = jobs.here("model", *words, verb="eval")
    assert (ended.code, ended.err) == (2, f"megatrain: error: {message}\n")


def test_the_command_line_asks_in_the_models_chat_template(here, offline):
    write_model(here / "converses", bilingual(True), opening=True)
    tasks = ["--include-path", str(here / "tasks"), "--items", str(here / "chats"), "--limit", "1"]
    line = [str(here / "converses"), "--harness", "writes", *tasks, "--chat", "--system-instruction", "中国"]
    assert jobs.here(*line, "--gen-kwargs", "max_gen_toks=2", verb="eval").code == 0
    (item,) = [json.loads(text) for text in (here / "chats").read_text().splitlines()]
    context, arguments = item["arguments"][0]
    assert context == ("<s><|im_start|>system\n中国<|im_end|>\n<|im_start|>user\nAns 0 中国<|im_end|>\n<|im_start|>assistant\n")
    assert arguments["max_gen_toks"] == 2


def run_here(here, name, size=1, words=()):
    """The items of all tasks, by real processes."""
    line = [str(here / "model"), "--harness", "choices,rolls,writes", "--include-path", str(here / "tasks")]
    ended = jobs.train(here / f"job_{name}", *line, "--items", str(here / name), *words, size=size, verb="eval")
    assert [end.code for end in ended] == [0] * size, ended
    assert [bool(end.out) for end in ended] == [True, *([False] * (size - 1))]
    return [json.loads(text) for text in (here / name).read_text().splitlines()]


@pytest.mark.slow  # processes import the harness, each on a core of its own if there is one: 40 s a layout on two
def test_real_processes_give_the_same(here):
    one = run_here(here, "one")
    for name, size in (("tensor", 4), ("pipeline", 2)):  # the first with two replicas
        several = run_here(here, name, size, [f"parallel.{name}_parallel_size=2"])
        assert len(one) == len(several) == 16
        for item, other in zip(one, several, strict=True):
            assert item["doc"] == other["doc"]
            close([answer for (answer,) in item["resps"]], [answer for (answer,) in other["resps"]])
