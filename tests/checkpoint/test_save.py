import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatrain.checkpoint.load import load, newest
from megatrain.checkpoint.manifest import LocalTensor, read_manifest
from megatrain.checkpoint.save import save, tidy
from megatrain.checkpoint.together import CheckpointError, ContentError
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.param import ParamSpec
from megatrain.testing import simulate

SINGLE = ParallelContext.single()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def latest(directory):
    return (directory / "latest").read_text()


def test_a_saved_directory_holds_what_it_should(tmp_path, state):
    path = simulate(MeshShape(tp=2, dp=2), state.save, tmp_path)
    assert path == [tmp_path / "step_00000200"] * 4
    assert names(tmp_path) == ["latest", "step_00000200"] and latest(tmp_path) == "step_00000200\n"
    shards = [f"{kind}-tp0000{tp}-pp00000.safetensors" for kind in ("exp_avg", "exp_avg_sq", "weights") for tp in (0, 1)]
    assert names(path[0]) == sorted(["manifest.json", *shards])


def test_only_the_first_replica_writes(tmp_path, state, monkeypatch):
    module, written = sys.modules[save.__module__], []
    real = module.save_file
    monkeypatch.setattr(module, "save_file", lambda tensors, file: (written.append(file.name), real(tensors, file)))
    path = simulate(MeshShape(tp=2, dp=2, cp=2), state.save, tmp_path)[0]
    assert sorted(["manifest.json", *written]) == names(path)


def test_the_manifest_does_not_grow_with_ranks_times_tensors(tmp_path):
    specs = [ParamSpec(f"w{i}", (8,)) for i in range(50)]
    tensors = {"weights": {spec.name: LocalTensor(spec, torch.zeros(8)) for spec in specs}}
    sizes = [
        (simulate(MeshShape(tp=tp), lambda ctx, tp=tp: save(tmp_path / str(tp), 1, tensors, ctx, {}, ""))[0] / "manifest.json")
        .stat()
        .st_size
        for tp in (1, 4)
    ]
    assert abs(sizes[0] - sizes[1]) < 8


def test_a_rank_that_owns_nothing_writes_nothing(tmp_path):
    tensors = {"weights": {"w": LocalTensor(ParamSpec("w", (8,)), torch.zeros(8))}}
    path = simulate(MeshShape(tp=2), lambda ctx: save(tmp_path, 1, tensors, ctx, {}, ""))[0]
    assert names(path) == ["manifest.json", "weights-tp00000-pp00000.safetensors"]


def test_pipeline_stages_bring_their_own_tensors(tmp_path):
    def run(ctx):
        spec = ParamSpec(f"layers.{ctx.pp.rank}.w", (3,))
        part = LocalTensor(spec, torch.full((3,), float(ctx.pp.rank)))
        path = save(tmp_path, 1, {"weights": {spec.name: part}}, ctx, {}, "")
        got = {"weights": {spec.name: LocalTensor(spec, torch.empty(3))}}
        load(path, got, ctx)
        assert torch.equal(got["weights"][spec.name].tensor, part.tensor)
        return path

    path = simulate(MeshShape(tp=2, pp=2), run)[0]
    assert {name: t.stage for name, t in read_manifest(path).tensors.items()} == {"layers.0.w": 0, "layers.1.w": 1}


def test_two_stages_may_not_hold_one_name(tmp_path):
    part = {"weights": {"w": LocalTensor(ParamSpec("w", (3,)), torch.zeros(3))}}
    with pytest.raises(CheckpointError, match="two pipeline stages write a tensor of the same name"):
        simulate(MeshShape(pp=2), lambda ctx: save(tmp_path, 1, part, ctx, {}, ""))


def test_a_tied_copy_is_written_by_the_first_of_its_axis(tmp_path):
    def write(ctx):
        part = {"weights": {"w": LocalTensor(ParamSpec("w", (3,), tied="ends"), torch.full((3,), float(ctx.pp.rank)))}}
        return save(tmp_path, 1, part, ctx, {}, "")

    path = simulate(MeshShape(pp=2), write)[0]
    assert load_file(path / "weights-tp00000-pp00000.safetensors")["w"].tolist() == [0.0] * 3
    assert not (path / "weights-tp00000-pp00001.safetensors").exists()


def test_kinds_agree_about_specs_and_shapes_fit(tmp_path):
    one, other = ParamSpec("w", (3,)), ParamSpec("w", (3,), decay=False)
    parts = {"weights": {"w": LocalTensor(one, torch.zeros(3))}, "exp_avg": {"w": LocalTensor(other, torch.zeros(3))}}
    with pytest.raises(CheckpointError, match="w has the spec"):
        save(tmp_path, 1, parts, SINGLE, {}, "")
    with pytest.raises(ContentError, match=r"stores \[4\]"):
        save(tmp_path, 1, {"weights": {"w": LocalTensor(one, torch.zeros(4))}}, SINGLE, {}, "")
    assert names(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 1, 2, 9])
def test_the_newest_are_kept(tmp_path, state, keep):
    steps = [100, 200, 300, 400]
    for step in steps:
        simulate(MeshShape(tp=2), state.save, tmp_path, step, keep)
    assert names(tmp_path) == ["latest", *[f"step_{step:08d}" for step in steps[-keep:]]]
    assert latest(tmp_path) == "step_00000400\n"


def test_a_run_that_went_back_keeps_what_it_saves(tmp_path, state):
    for step in (100, 200, 300, 150):
        state.save(SINGLE, tmp_path, step, keep=2)
    assert names(tmp_path) == ["latest", "step_00000150", "step_00000300"]


def test_a_damaged_checkpoint_is_neither_counted_nor_removed(tmp_path, state):
    for step in (100, 200):
        state.save(SINGLE, tmp_path, step)
    (tmp_path / "step_00000200/weights-tp00000-pp00000.safetensors").unlink()
    state.save(SINGLE, tmp_path, 300, keep=2)
    assert names(tmp_path) == ["latest", "step_00000100", "step_00000200", "step_00000300"]


def test_saving_a_step_again_replaces_it(tmp_path, state):
    state.save(SINGLE, tmp_path, 100)
    save(tmp_path, 100, state.local(SINGLE), SINGLE, {"again": True}, "")
    assert names(tmp_path) == ["latest", "step_00000100"]
    assert read_manifest(tmp_path / "step_00000100").progress == {"again": True}


def test_saving_over_a_damaged_step_keeps_the_damaged_one(tmp_path, state):
    for _ in range(3):
        state.save(SINGLE, tmp_path, 100)
        (tmp_path / "step_00000100/manifest.json").unlink()
    state.save(SINGLE, tmp_path, 100)
    assert names(tmp_path) == [
        "damaged_step_00000100",
        "damaged_step_00000100_1",
        "damaged_step_00000100_2",
        "latest",
        "step_00000100",
    ]
    assert newest(tmp_path) == tmp_path / "step_00000100"


class Killed(BaseException):
    """Ends a save where it stands, as a kill does: no clean-up runs."""


CHANGES = ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "unlink"))
REMOVALS = ((os, "unlink"), (os, "rmdir"))


def fail_at(monkeypatch, point, error, watched=CHANGES):
    """Let the `point`-th call that changes the disk or waits for it raise `error`; return the count of such calls."""
    calls = [0]
    for owner, name in watched:
        real = getattr(owner, name)

        def patched(*args, real=real, **more):
            calls[0] += 1
            if calls[0] == point:
                raise error
            return real(*args, **more)

        monkeypatch.setattr(owner, name, patched)
    return calls


def points(monkeypatch, action, watched=CHANGES):
    """How many such calls `action` makes."""
    with monkeypatch.context() as patch:
        calls = fail_at(patch, -1, None, watched)
        action()
    return calls[0]


@pytest.mark.parametrize("step", [200, 100], ids=["next", "again"])
def test_a_kill_at_any_point_leaves_a_whole_checkpoint(tmp_path, state, monkeypatch, step, same):
    def prepared(name):
        state.save(SINGLE, tmp_path / name, 100)
        return tmp_path / name

    first = prepared("count")
    total = points(monkeypatch, lambda: state.save(SINGLE, first, step, keep=1), CHANGES + REMOVALS)
    assert total >= 16
    for point in range(1, total + 1):
        directory = prepared(str(point))
        with monkeypatch.context() as patch:
            fail_at(patch, point, Killed(), CHANGES + REMOVALS)
            with pytest.raises(Killed):
                state.save(SINGLE, directory, step, keep=1)
        named = latest(directory).strip() if (directory / "latest").exists() else None
        assert named is None or (directory / named / "manifest.json").exists()
        tidy(directory, SINGLE)
        found = newest(directory, on_damaged=lambda path, reason: pytest.fail(reason))
        assert found is not None and latest(directory) == f"{found.name}\n"
        assert all(not name.startswith(".") for name in names(directory))
        got = state.empty(SINGLE)
        load(found, got, SINGLE)
        same(got, state.local(SINGLE, padding=0.0))
        state.save(SINGLE, directory, 300, keep=1)
        assert names(directory) == ["latest", "step_00000300"]


@pytest.mark.parametrize("step", [200, 100], ids=["next", "again"])
def test_an_error_at_any_point_is_raised_and_leaves_a_whole_checkpoint(tmp_path, state, monkeypatch, step):
    state.save(SINGLE, tmp_path / "count", 100)
    total = points(monkeypatch, lambda: state.save(SINGLE, tmp_path / "count", step))
    for point in range(1, total + 1):
        directory = tmp_path / str(point)
        state.save(SINGLE, directory, 100)
        with monkeypatch.context() as patch:
            fail_at(patch, point, OSError(errno.EIO, "Input/output error"))
            with pytest.raises(CheckpointError, match="Input/output error"):
                state.save(SINGLE, directory, step)
        assert newest(directory, on_damaged=lambda path, reason: pytest.fail(reason)) is not None
        assert all(not name.startswith(".") or name == ".latest_draft" for name in names(directory))


def test_a_full_disk_is_one_clear_error_on_every_rank(tmp_path, state, monkeypatch):
    layout = MeshShape(tp=2, dp=2)
    simulate(layout, state.save, tmp_path, 100)
    module = sys.modules[save.__module__]
    real = module.save_file

    def full(tensors, file):
        if "tp00001" in file.name and "exp_avg-" in file.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(module, "save_file", full)

    def attempt(ctx):
        with pytest.raises(CheckpointError) as caught:
            state.save(ctx, tmp_path, 200)
        return str(caught.value)

    seen = simulate(layout, attempt)
    assert seen == [seen[0]] * 4
    for word in ("rank 1: cannot write", "exp_avg-tp00001", "No space left", "bytes, and the disk has", "checkpoint.dir"):
        assert word in seen[0]
    assert names(tmp_path) == ["latest", "step_00000100"] and latest(tmp_path) == "step_00000100\n"


FILE_LIMIT = """
import resource, sys, torch
from pathlib import Path
from megatrain.checkpoint.manifest import LocalTensor
from megatrain.checkpoint.save import save
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import ParamSpec
part = {"weights": {"w": LocalTensor(ParamSpec("w", (100_000,)), torch.zeros(100_000))}}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
save(Path(sys.argv[1]), 1, part, ParallelContext.single(), {}, "")
"""


def test_the_systems_own_refusal_to_write_is_an_error(tmp_path):
    done = subprocess.run([sys.executable, "-c", FILE_LIMIT, tmp_path], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "cannot write" in done.stderr and "It needs 400,000 bytes" in done.stderr
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_an_error_on_every_rank(tmp_path, state):
    (tmp_path / "file").write_text("")

    def attempt(ctx):
        with pytest.raises(CheckpointError, match=r"rank 0: .*file") as caught:
            state.save(ctx, tmp_path / "file" / "checkpoints")
        return str(caught.value)

    assert len(set(simulate(MeshShape(tp=2), attempt))) == 1


def test_nodes_that_do_not_share_the_directory_are_noticed(tmp_path, state):
    def attempt(ctx):
        with pytest.raises(CheckpointError, match=r"tp00001.* is missing.*do all nodes share"):
            state.save(ctx, tmp_path / str(ctx.world.rank))

    simulate(MeshShape(tp=2), attempt)


def test_leftovers_are_cleared_and_nothing_else(tmp_path, state):
    state.save(SINGLE, tmp_path, 100)
    for name in (
        ".saving_step_00000200",
        ".removing_step_00000050",
        ".replaced_step_00000100",
        ".mine",
        "damaged_step_00000001",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("")
    (tmp_path / ".latest_draft").write_text("")
    (tmp_path / "latest").write_text("step_00000900\n")
    simulate(2, lambda ctx: tidy(tmp_path, ctx))
    assert names(tmp_path) == [".mine", "damaged_step_00000001", "latest", "step_00000100"]
    assert latest(tmp_path) == "step_00000100\n"
    tidy(tmp_path / "nowhere", SINGLE)


def test_progress_that_is_no_json_is_refused(tmp_path, state):
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save(tmp_path, 1, state.local(SINGLE), SINGLE, {"x": torch.zeros(1)}, "")
    assert names(tmp_path) == []
