"""What each change does to a run that goes on: the table of docs/resuming.md, tried row by row."""

import re
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import jobs
import numpy as np
import pytest
import torch

import megatrain
from megatrain.checkpoint.manifest import MANIFEST, read_manifest
from megatrain.checkpoint.together import CheckpointError
from megatrain.config.budget import warmup_of
from megatrain.config.keys import knobs
from megatrain.config.load import ConfigError, from_dict
from megatrain.data.identity import identity_of, store_identity
from megatrain.resuming.changed import TABLE, change_line, change_of, table
from megatrain.resuming.resume import _warmup_then, shared_identity
from megatrain.runtime.distributed import RemoteError, Session
from megatrain.runtime.launch import Launch
from megatrain.testing import simulate
from megatrain.training import train_step
from megatrain.transport.wrappers import Recorder

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, AT = 8, 4
MODEL = {"position": "rope"}
BEFORE = {
    "": {},
    "bf16": {"train": {"precision": "bf16"}},
    "fp16": {"train": {"precision": "fp16", "loss_scale": 64.0, "loss_scale_window": 3}},
    "fp16 by default": {"train": {"precision": "fp16"}},
    "tokens": {"train": {"tokens": 16.0 * 8 * STEPS}},
    "embedding": {"model": {"embedding_grad_scale": 0.5}},
    "decay": {"optim": {"weight_decay_end": 0.5}},
}
"""Runs that go on, by what they differ in."""


def tree_of(house, run, *sections):
    """The config of a run, changed by sections one after the other."""
    tree = jobs.tiny(house / "data", run, model=MODEL)
    for more in sections:
        tree = {name: {**tree.get(name, {}), **more.get(name, {})} for name in {**tree, **more}}
    if "tokens" in tree["train"]:
        del tree["train"]["steps"]
    return tree


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed")
    jobs.write_store(folder / "data")
    jobs.write_store(folder / "elsewhere" / "same")
    jobs.write_store(folder / "valid", documents=5)
    store = jobs.write_store(folder / "other")
    tokens = np.fromfile(store.with_suffix(".bin"), np.uint16)
    tokens[1234] ^= 1
    tokens.tofile(store.with_suffix(".bin"))  # one token is another one; index and sizes are the same
    return folder


class After:
    """A run that goes on after AT steps, with a change, and its next step."""

    def __init__(self, house, before="", change=None, run="after"):
        saved = house / f"before-{before}" / "checkpoints" / f"step_{AT:08d}"
        if not saved.is_dir():
            job = megatrain.build(tree_of(house, saved.parents[1], BEFORE[before], {"checkpoint": {"save_every": AT}}))
            megatrain.train(job)
            job.close()
        where = {"checkpoint": {"resume": str(saved), "dir": str(house / run / "checkpoints")}}
        job = megatrain.build(tree_of(house, house / run, BEFORE[before], where, change or {}))
        try:
            self.steps, self.lr, self.decay, self.began = job.total_steps, job.lr, job.weight_decay, job.consumed_samples
            self.scale, self.told = float(job.loss_scale.scale), job.changes
            self.report = train_step(job)
            self.weights = torch.cat([tensor.double().flatten() for _, tensor in job.optimizer.tensors()["weights"].values()])
        finally:
            job.close()


@pytest.fixture(scope="module")
def plain(house):
    """Runs that go on unchanged, by what they differ in."""
    found = {}

    def of(before):
        return found.setdefault(before, After(house, before, run=f"plain-{before}"))

    return of


def test_the_page_has_the_table_and_the_table_has_every_key():
    page = (Path(__file__).parents[2] / "docs/resuming.md").read_text()
    assert table() in page
    for knob in knobs():
        change_of(knob.key)
    used = {id(change_of(knob.key)) for knob in knobs()}
    assert all(id(row) in used for row in TABLE)
    assert {
        id(change_of(key)) for keys in (KEPT, TOLD, BENT, REFUSED) for _, change, *_ in keys for key in _keys(change)
    } == used


def _keys(change):
    return [f"{section}.{key}" for section, values in change.items() for key in values]


KEPT = [
    ("", {"parallel": {"bucket_size": 3000}}),
    ("", {"train": {"micro_batch_size": 2}}),
    ("bf16", {"optim": {"master": "split"}}),
    ("", {"train": {"recompute": "full"}}),
    ("", {"train": {"loss_chunk": 16}}),
    ("", {"train": {"eval_batches": 3}}),
    ("", {"train": {"audit_every": 7}}),
    ("", {"train": {"on_spike": "skip", "spike_history": 16, "max_skipped_in_row": 0}}),
    ("", {"model": {"init_from": "BEFORE"}}),
    ("", {"data": {"train": "elsewhere/same"}}),
    ("", {"data": {"cache_dir": "cache"}}),
    ("", {"log": {"every": 2}}),
    ("", {"checkpoint": {"keep_every": 4}}),
]


def placed(house, change):
    """A change whose paths lie in the house."""
    change = {section: dict(values) for section, values in change.items()}
    for section, key in (("data", "train"), ("data", "valid"), ("data", "cache_dir"), ("model", "init_from")):
        value = change.get(section, {}).get(key)
        if isinstance(value, str):
            change[section][key] = str(house / value.replace("BEFORE", f"before-/checkpoints/step_{AT:08d}"))
    return change


@pytest.mark.parametrize(("before", "change"), KEPT, ids=str)
def test_what_is_kept(house, plain, before, change):
    assert all(change_of(key).then == "kept" or key == "data.train" for key in _keys(change))
    same, now = plain(before), After(house, before, placed(house, change))
    assert (now.steps, now.lr, now.decay, now.began) == (STEPS, same.lr, same.decay, 32)
    assert now.report.loss == pytest.approx(same.report.loss, rel=1e-5)
    assert now.weights.numpy() == pytest.approx(same.weights.numpy(), abs=2e-5)
    assert not any("from here" in line for line in now.told)
    assert not any("(" in line and "(the same in another place)" not in line for line in now.told)


RATES = "the learning rate is 7.750E-03 in the next step and 1.603E-03 in the last"
TOLD = [
    (
        "decay",
        {"train": {"global_batch_size": 16}},
        8,
        f"from here 4 steps are left, 5 to 8, with 1,024 tokens, 1,536 in all; {RATES}",
    ),
    ("", {"train": {"batch_ramp": [4, 4, 80]}}, 8, f"from here 4 steps are left, 5 to 8, with 256 tokens, 768 in all; {RATES}"),
    ("tokens", {"train": {"global_batch_size": 4}}, 12, "from here 8 steps are left, 5 to 12, with 512 tokens, 1,024 in all; "),
    ("tokens", {"train": {"global_batch_size": 16}}, 6, "from here 2 steps are left, 5 to 6, with 512 tokens, 1,024 in all; "),
    (
        "fp16",
        {"train": {"loss_scale": 8.0}},
        8,
        "train.loss_scale: 64.0 -> 8.0 (no effect: the scale goes on from where it was)",
    ),
    ("", {"data": {"valid": "valid"}}, 8, "data.valid is another text; losses of before and after do not compare"),
]


@pytest.mark.parametrize(("before", "change", "steps", "line"), TOLD, ids=str)
def test_what_is_told_and_bends_nothing(house, plain, before, change, steps, line):
    assert all(change_of(key).then == "told" for key in _keys(change))
    same, now = plain(before), After(house, before, placed(house, change))
    assert (now.steps, now.lr, now.decay, now.began) == (steps, same.lr, same.decay, 32)
    assert now.scale == same.scale
    assert any(line in told for told in now.told), now.told


BENT = [
    ("", {"train": {"steps": 14}}, {"steps": 14, "lr": 9.397e-3}),
    ("", {"train": {"tokens": 16.0 * 8 * 14}}, {"steps": 14, "lr": 9.397e-3}),
    ("", {"optim": {"lr": 2e-2}}, {"lr": 1.525e-2}),
    ("", {"optim": {"min_lr": 5e-3}}, {"lr": 8.75e-3}),
    ("", {"optim": {"lr_schedule": "linear"}}, {"lr": 7e-3}),
    ("", {"optim": {"lr_schedule": "wsd", "decay_fraction": 0.75}}, {"lr": 7e-3}),
    ("", {"optim": {"warmup_steps": 6}}, {"lr": 8.333e-3}),
    ("tokens", {"optim": {"warmup_steps": 6}}, {"lr": 8.333e-3}),
    ("", {"optim": {"weight_decay": 0.3}}, {"decay": 0.3}),
    ("", {"optim": {"weight_decay_end": 0.8}}, {"decay": 0.5}),
    ("", {"optim": {"betas": [0.5, 0.9]}}, {}),
    ("", {"optim": {"eps": 1e-2}}, {}),
    ("", {"optim": {"clip_grad": 0.01}}, {}),
    ("", {"optim": {"name": "adam"}}, {}),
    ("", {"train": {"precision": "fp16"}}, {"scale": 65536.0}),
    ("bf16", {"train": {"precision": "fp16"}}, {"scale": 65536.0}),
    ("fp16 by default", {"train": {"precision": "bf16"}}, {"scale": 1.0}),
    ("fp16", {"train": {"loss_scale_min": 256.0}}, {"scale": 256.0}),
    ("", {"train": {"label_smoothing": 0.1}}, {"loss": True}),
    ("", {"train": {"z_loss": 1e-2}}, {"loss": True}),
    ("", {"train": {"skip_steps": [2, 5]}}, {"skipped": True}),
]


@pytest.mark.parametrize(("before", "change", "right"), BENT, ids=str)
def test_what_is_bent_from_the_next_step_on(house, plain, before, change, right):
    assert all(change_of(key).then == "bent" for key in _keys(change))
    right = dict(right)
    same, now = plain(before), After(house, before, placed(house, change))
    assert now.began == 32 and now.steps == right.pop("steps", STEPS)
    assert now.lr == pytest.approx(right.pop("lr", same.lr), rel=1e-3)
    assert now.decay == pytest.approx(right.pop("decay", same.decay))
    assert now.scale == right.pop("scale", same.scale)
    assert now.report.skipped is right.pop("skipped", False)
    assert (now.report.loss == pytest.approx(same.report.loss, rel=2e-3)) is not right.pop("loss", False)
    assert not right and (now.weights.numpy() != pytest.approx(same.weights.numpy(), abs=1e-9))
    for key in _keys(change):
        assert any(line.startswith(f"changed since then: {key}: ") for line in now.told), now.told
    rates = {"optim.lr", "optim.min_lr", "optim.lr_schedule", "optim.warmup_steps", "train.steps", "train.tokens"}
    if rates & set(_keys(change)):
        assert f"learning rate is {now.lr:.3E} in the next step" in now.told[-1]


def test_values_are_shown_as_yaml_has_them():
    assert change_line("train.compile", None, True) == "train.compile: null -> true"
    assert change_line("parallel.layer_split", [5, None], [{"path": "a", "ids": [1, False]}]) == (
        "parallel.layer_split: [5, null] -> [{path: a, ids: [1, false]}]"
    )
    assert change_line("data.train", "a", "b", same=True) == "data.train: a -> b (the same in another place)"


REFUSED = [
    ({"train": {"seed": 7}}, "data", "train.seed: 1234 -> 7"),
    ({"model": {"seq_length": 32}}, "model", "model.seq_length: 16 -> 32"),
    ({"model": {"embedding_grad_scale": 0.5}}, "model", "model.embedding_grad_scale: 1.0 -> 0.5"),
    ({"model": {"dropout": 0.1}}, "model", "model.dropout: 0.0 -> 0.1"),
    ({"data": {"train": "other"}}, "data", "data.train[0]=HOUSE/other is another text: 2042-8000-"),
    ({"data": {"train": ["data", "data"]}}, "data", "data.train has 2 corpora, and had 1"),
    ({"data": {"train": [{"path": "data", "weight": 2.0}]}}, "data", "data.train[0].weight: 1.0 -> 2.0"),
    ({"data": {"tokenizer": "bytes"}, "model": {"vocab_size": 300}}, "tokenizer", "data.tokenizer=bytes: null -> bytes"),
    ({"data": {"train": [{"path": "data", "max_epochs": 9}]}}, "data", "data.train[0].max_epochs: null -> 9.0"),
    (
        {"data": {"schedule": [{"from_step": 6, "weights": {"d": 2}}], "train": [{"path": "data", "name": "d"}]}},
        "data",
        "data.schedule: [] -> [{from_step: 6, weights: {d: 2.0}}]",
    ),
    ({"data": {"isolate_documents": True}}, "data", "data.isolate_documents: false -> true"),
]
REFUSED = [("", *row) for row in REFUSED]
ACCEPTED = {subject: {"checkpoint": {"accept_changes": [subject]}} for subject in ("model", "data")}


def in_house(house, change):
    """A change whose corpora lie in the house."""
    values = change.get("data", {}).get("train")
    if not isinstance(values, list):
        return placed(house, change)
    corpora = [{**v, "path": str(house / v["path"])} if isinstance(v, dict) else str(house / v) for v in values]
    return {"data": change["data"] | {"train": corpora}}


@pytest.mark.parametrize(("before", "change", "subject", "what"), REFUSED, ids=str)
def test_what_is_refused(house, plain, before, change, subject, what):
    assert change_of(_keys(change)[0]).then == "refused"
    same, given = plain(before), in_house(house, change)
    with pytest.raises(CheckpointError) as raised:
        After(house, before, given)
    assert f"is of another {subject} than this config: {what.replace('HOUSE', str(house))}" in str(raised.value)
    assert f"to go on with the change, checkpoint.accept_changes=[{subject}]" in str(raised.value)
    if subject == "tokenizer":  # its other size is one of the model
        return
    now = After(house, before, given | ACCEPTED[subject])
    assert (now.steps, now.lr) == (STEPS, same.lr)
    assert now.began == (16 if what.startswith("model.seq_length") else 32)  # 512 tokens


def test_a_batch_so_large_that_the_warm_up_would_be_the_whole_run(house, plain):
    """It has passed before: its two updates were of 8 sequences. A run that begins so is refused."""
    plain("tokens")
    now = After(house, "tokens", {"train": {"global_batch_size": 32}})
    assert (now.steps, now.lr) == (5, plain("tokens").lr)
    fresh = tree_of(house, house / "fresh", BEFORE["tokens"], {"train": {"global_batch_size": 32}})
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps=2 is not less than the 2 steps of train\.tokens=1024"):
        megatrain.build(fresh)


def test_states_of_another_optimizer_and_tensors_of_another_shape_are_refused(house, plain):
    plain("")
    with pytest.raises(CheckpointError, match=r"but no momentum\. Was it saved with another optim\.name"):
        After(house, "", {"optim": {"name": "sgd"}})
    with pytest.raises(CheckpointError, match="tensors"):
        After(house, "", {"model": {"num_layers": 1}} | ACCEPTED["model"])


def test_a_table_of_other_positions_is_refused_with_what_to_set(house):
    learned = {"model": {"position": "learned"}}
    job = megatrain.build(tree_of(house, house / "learned", learned, {"train": {"steps": 4}}))
    megatrain.train(job)
    job.close()
    where = {"checkpoint": {"resume": str(saved := house / "learned/checkpoints/step_00000004"), "accept_changes": ["model"]}}
    shorter = tree_of(house, house / "shorter", learned, where, {"model": {"seq_length": 8}})
    hint = r"\[16, 32\], the config gives \[8, 32\] \(in training: model\.max_positions=16, whatever model\.seq_length is\)$"
    with pytest.raises(
        CheckpointError, match=r"^1 tensors do not fit the config: embedding\.positions: the checkpoint has " + hint
    ):
        megatrain.build(shorter)
    shorter["model"]["max_positions"] = 16
    job = megatrain.build(shorter)
    assert job.resumed_from == saved
    job.close()


def test_checkpoints_of_earlier_releases_go_on(house, plain):
    """They have no hash of blocks, no answers, no held-out text, and not what their schedules were measured by."""
    plain("tokens")
    saved = house / "before-tokens" / "checkpoints" / f"step_{AT:08d}"
    manifest = read_manifest(saved)
    whole = dict(manifest.progress)
    identity = {"data": [[text.rpartition("-")[0], weight] for text, weight in whole["identity"]["data"]], "tokenizer": None}
    kept = {key: whole[key] for key in ("samples", "step", "tokens", "updates", "loss_scale")} | {"identity": identity}
    try:
        (saved / MANIFEST).write_bytes(replace(manifest, progress=kept).to_bytes())
        now = After(house, "tokens", {"train": {"global_batch_size": 16}, "optim": {"warmup_steps": 2}})
        assert (now.began, now.steps, now.lr) == (32, 6, plain("tokens").lr)
    finally:
        (saved / MANIFEST).write_bytes(manifest.to_bytes())


def test_other_versions_and_other_code_are_told(house, plain):
    """The store's identity is refused where it is another one; what a run computes with may be."""
    assert not [line for line in plain("").told if "numbers may differ" in line]
    saved = house / "before-" / "checkpoints" / f"step_{AT:08d}"
    manifest = read_manifest(saved)
    then = {**manifest.progress["program"], "torch": "1.0.0", "code": "00ff", "triton": "not installed"}
    try:
        (saved / MANIFEST).write_bytes(replace(manifest, progress={**manifest.progress, "program": then}).to_bytes())
        now = After(house, "").told
    finally:
        (saved / MANIFEST).write_bytes(manifest.to_bytes())
    new = [line for line in now if "numbers may differ" in line]
    assert new[0] == f"changed since then: torch: 1.0.0 -> {torch.__version__}; numbers may differ, in rounding at least"
    assert new[1].startswith("changed since then: triton: not installed -> ")
    assert new[2] == (
        f"changed since then: the code of megatrain: 00ff -> {manifest.progress['program']['code']}; numbers may differ, in rounding "
        "at least"
    )
    assert len(new) == 3


def test_other_special_tokens_are_told(house):
    """As where a file beside the tokenizer is another one: the config and tokenizer.json are the same."""
    made = {"data": {"tokenizer": "bytes"}, "model": {"vocab_size": 257}}
    job = megatrain.build(tree_of(house, house / "special", made, {"train": {"steps": 3}}))
    megatrain.train(job)
    job.close()
    saved = house / "special/checkpoints/step_00000003"
    manifest = read_manifest(saved)
    assert manifest.progress["identity"]["special"] == {"eod": 256, "stops": [256], "bos": None, "first": None, "opening": []}
    kept = {**manifest.progress["identity"], "special": {"eod": 7, "stops": [256], "bos": None}}
    (saved / MANIFEST).write_bytes(replace(manifest, progress={**manifest.progress, "identity": kept}).to_bytes())
    job = megatrain.build(tree_of(house, house / "special", made))
    job.close()
    assert [line.partition(",")[0] for line in job.changes if "special" in line] == [
        "changed since then: special token eod of data.tokenizer=bytes: 7 -> 256"
    ]


def test_ranks_with_another_text_under_the_same_name_are_refused(house, monkeypatch):
    """Also two of one node, which may be in other containers."""
    here, config = threading.local(), from_dict(tree_of(house, house / "nodes"))
    seen = {
        name: from_dict(tree_of(house, house, {"data": {"train": str(house / name)}}))
        for name in ("data", "elsewhere/same", "other")
    }
    monkeypatch.setattr("megatrain.resuming.resume.identity_of", lambda _: identity_of(seen[here.name]))

    def look(ctx, names):
        here.name = names[ctx.world.rank]
        launch = Launch(rank=ctx.world.rank, local_rank=ctx.world.rank, world_size=4, local_world_size=4)
        session = Session(launch, SimpleNamespace(rank=ctx.world.rank), ctx.device, "gloo", Recorder(), ctx.world.group, "")
        try:
            return shared_identity(SimpleNamespace(config=config, session=session))["data"]
        except RemoteError as error:
            return str(error)

    assert simulate(4, look, ("data", "elsewhere/same", "data", "data")) == [[[store_identity(house / "data"), 1.0]]] * 4
    said = set(simulate(4, look, ("data", "data", "other", "data")))
    assert len(said) == 1
    assert re.fullmatch(
        r"The data differs between ranks: line 1 is 'data\.train\[0\]=\S+data: 2042-8000-\w+-\w+' on ranks 0, 1, 3 and "
        r"'data\.train\[0\]=\S+data: 2042-8000-\w+-\w+' on rank 2\. These are bytes of index and tokens, hashes, "
        r"and ids of special tokens\. Copy the same files to every node, those beside the tokenizer \(tokenizer_config\.json, .*",
        said.pop(),
    )


def test_a_warm_up_that_nobody_gave_stays_as_long_as_the_run_began_with():
    began = asdict(warmup_of(from_dict({"train": {"steps": 300}})))
    longer = {"train": {"steps": 800}}
    assert _warmup_then(began, {}, from_dict(longer)).warmup_steps == 30
    assert _warmup_then(began, {}, from_dict({**longer, "optim": {"warmup_steps": 50}})).warmup_steps == 50


def test_a_checkpoint_without_a_warm_up_is_measured_by_its_config():
    then = {"train.global_batch_size": 16, "train.batch_ramp": (4, 4, 48), "optim.warmup_steps": 6, "model.seq_length": 10}
    now = from_dict({"train": {"steps": 800, "global_batch_size": 32}, "model": {"seq_length": 20}})
    assert asdict(_warmup_then(None, then, now)) == {"first": 40, "full": 160, "warmup_steps": 6, "warmup": 320}
