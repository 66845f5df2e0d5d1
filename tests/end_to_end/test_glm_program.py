"""The programs on a GLM: trained, resumed to the bit, evaluated by objective, and its blanks filled."""

import json
import shutil

import jobs
import pytest

import megatrain
from megatrain.cli.main import main
from megatrain.config.source import ConfigError
from megatrain.data.prepare.tokenize import tokenize_files

WORDS = "def area(width, height): return width * height. for name in names: print(name)! while True: break; import os\n"


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": WORDS[n % 40 :] * (2 + n % 5), "prompt": f"say {n}", "answer": f"{n}!"}) for n in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    for name, key, closed in (
        ("train", "text", True),
        ("open", "text", False),
        ("prompts", "prompt", False),
        ("answers", "answer", True),
    ):
        tokenize_files([folder / "text.jsonl"], "bytes", folder / name, append_eod=closed, key=key)
    return folder


def run_of(stores, run, size=1, code=0, data=None, parallel=None, **model):
    tree = jobs.tiny(
        {
            "train": str(stores / "train"),
            "valid": str(stores / "train"),
            "tokenizer": "bytes",
            "objective": "glm",
            **(data or {}),
        },
        run,
        model={"family": "glm", "vocab_size": 264, "seq_length": 64, "dropout": 0.1, **model},
        train={"eval_every": 4, "eval_batches": 1},
        checkpoint={"save_every": 4, "keep": 0},
        parallel={"device": "cpu", **(parallel or {})},
    )
    config = jobs.write_config(run.with_suffix(".yaml"), tree)
    folder = run.with_name(run.name + "_job")
    ended = [jobs.here(str(config))] if size == 1 else jobs.train(folder, str(config), size=size, seconds=120)
    assert all(one.code == code for one in ended), ended[0].err
    return ended


def losses(run):
    return {step: (row["loss"], row["grad_norm"]) for step, row in jobs.rows(run).items()}


def test_a_run_goes_on_to_the_bit_and_layouts_agree(stores, tmp_path):
    run_of(stores, tmp_path / "whole")
    run_of(stores, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken/checkpoints/step_00000008")
    run_of(stores, tmp_path / "broken")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    run_of(stores, tmp_path / "tp", size=2, parallel={"tensor_parallel_size": 2, "sequence_parallel": True})
    for step, (loss, norm) in losses(tmp_path / "whole").items():
        assert losses(tmp_path / "tp")[step] == (pytest.approx(loss, rel=2e-5), pytest.approx(norm, rel=2e-4))
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "valid_loss" in row][-1]
    assert set(last["valid_losses"]) == {"blank", "sentence", "document"} and 0 <= last["cloze_accuracy"] <= 1


def test_evaluated_and_filled(stores, tmp_path, capsys):
    run_of(stores, tmp_path / "run")
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    rows = {row["set"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(rows) == {"blank", "sentence", "document"}
    assert all(row["loss"] > 0 and 0 <= row["cloze_accuracy"] <= 1 and row["bits_per_byte"] is None for row in rows.values())
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "blanks filled right" in capsys.readouterr().out
    for words in (["--greedy"], ["--beams", "3"], ["--temperature", "0.5"]):
        assert main(["generate", str(tmp_path / "run"), "--prompt", "def [MASK](a): [sMASK]", "--max-tokens", "5", *words]) == 0
        assert capsys.readouterr().out.startswith("def ")
    assert main(["generate", str(tmp_path / "run"), "--prompt", "a", "--beams", "3", "--top-k", "2"]) == 2
    model = megatrain.load(tmp_path / "run")
    assert model.marks is not None and model.marks.sop == 257


@pytest.mark.parametrize(
    ("data", "model"),
    [
        ({"isolate_documents": True}, {"position": "rope_2d", "norm_placement": "deepnorm"}),
        ({"glm": {"short_seq_prob": 0.5, "objective_mix": {"mode": "weighted"}}}, {}),
        ({"glm": {"blank": {"decoder_noise_prob": 0.1}, "task_masks": False, "shuffle_spans": False}}, {"position": "alibi"}),
        ({"train": "open", "valid": "open"}, {"position": "rope"}),
    ],
    ids=["isolated", "short, weighted", "one mask", "documents without an end"],
)
def test_other_ways_train_too(stores, tmp_path, data, model):
    data = {name: str(stores / value) if value == "open" else value for name, value in data.items()}
    run_of(stores, tmp_path / "run", data=data, **model)
    assert len(losses(tmp_path / "run")) == 8


def test_an_unusual_ratio_is_noted(stores, tmp_path):
    (ended,) = run_of(stores, tmp_path / "run", data={"glm": {"blank": {"mask_ratio": 0.3}}})
    assert "data.glm.blank.mask_ratio=0.3: GLMs are trained with 0.1 to 0.2" in ended.out


def test_prompts_with_answers(stores, tmp_path):
    pairs = {"path": str(stores / "prompts"), "answers": str(stores / "answers"), "weight": 0.5}
    run_of(stores, tmp_path / "run", data={"train": [str(stores / "train"), pairs]})
    assert len(losses(tmp_path / "run")) == 8


@pytest.mark.parametrize(
    ("data", "model", "said"),
    [
        ({"glm": {"tokens": {"mask": 258}}}, {}, "are both 258. Give each an id of its own"),
        ({"glm": {"tokens": {"mask": 5000}}}, {}, "smaller than the 5001 tokens of"),
        ({}, {"vocab_size": 260}, "smaller than the 264 tokens of data.tokenizer=bytes and of GLM's blanks"),
        ({}, {"seq_length": 8}, "leaves room for"),
        ({"train": ["train", "open"]}, {}, "do not. Tokenize all with --append-eod"),
        ({"tokenizer": None}, {}, "needs to know which tokens end a sentence"),
        (
            {"objective": "next_token", "glm": {"shuffle_spans": False}},
            {},
            "has no effect: it has one when data.objective is glm",
        ),
        ({"train": [{"path": "prompts", "answers": "train_none"}]}, {}, "train_none"),
    ],
)
def test_what_cannot_be_is_said(stores, tmp_path, data, model, said):
    def placed(value):
        if isinstance(value, dict):
            return {name: str(stores / text) for name, text in value.items()}
        return str(stores / value)

    if isinstance(data.get("train"), list):
        data = {**data, "train": [placed(value) for value in data["train"]]}
    (ended,) = run_of(stores, tmp_path / "run", code=1, data=data, **model)
    assert said in ended.err


def test_a_group_of_keys_in_overrides(tmp_path):
    from megatrain.config.load import load

    (tmp_path / "c.yaml").write_text("data: {train: x, objective: glm, glm: {blank: {mask_ratio: 0.2}}}\n")
    loaded = load(tmp_path / "c.yaml", ["data.glm.blank.max_span=7", "data.glm.objective_mix={blank: 1.0}"])
    glm = loaded.config.data.glm
    assert (glm.blank.mask_ratio, glm.blank.max_span, glm.objective_mix.blank) == (0.2, 7, 1.0)
    assert loaded.origins["data.glm.blank.max_span"] == "command line"
    assert loaded.origins["data.glm.blank.mask_ratio"].endswith("c.yaml:1")
    for wrong, message in (
        ("data.glm.blanks.max_span=7", "goes deeper than a key"),
        ("data.glm.blank.max_spam=7", "Did you mean data.glm.blank.max_span"),
        ("data.glm=3", "not a mapping"),
        ("data.glm.blank.max_span.x=7", "goes deeper than a key"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / "c.yaml", [wrong])
