import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatrain.checkpoint import writing
from megatrain.checkpoint.claim import claim
from megatrain.checkpoint.directory import tidy
from megatrain.checkpoint.load import newest
from megatrain.checkpoint.manifest import read_manifest
from megatrain.checkpoint.save import Contents, Saver, save
from megatrain.checkpoint.together import CheckpointError, ContentError
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.param import ParamSpec
from megatrain.parallel.portion import Portion
from megatrain.testing import simulate

SINGLE = ParallelContext.single()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def whole(name, tensor, **more):
    return Portion.whole(ParamSpec(name, tuple(tensor.shape), **more), tensor)


def latest(directory):
    return (directory / "latest").read_text()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_saved_directory_holds_what_it_should(tmp_path, state, sharded):
    path = simulate(MeshShape(tp=2, dp=2), lambda ctx: state.save(ctx, tmp_path, sharded=sharded))
    assert path == [tmp_path / "step_00000200"] * 4
    assert names(tmp_path) == ["latest", "step_00000200"] and latest(tmp_path) == "step_00000200\n"
    places = [f"tp0000{tp}-pp00000-dp0000{dp}" for tp in (0, 1) for dp in (0, 1)]
    shards = [f"{kind}-{place}.safetensors" for kind in ("exp_avg", "exp_avg_sq", "weights") for place in places]
    assert names(path[0]) == sorted(["manifest.json", *shards])
    for file in shards:
        assert load_file(path[0] / file)


def test_the_manifest_does_not_grow_with_ranks_times_tensors(tmp_path):
    specs = [ParamSpec(f"w{i}", (8,)) for i in range(50)]
    tensors = {"weights": {spec.name: Portion.whole(spec, torch.zeros(8)) for spec in specs}}
    sizes = [
        (
            simulate(MeshShape(tp=tp), lambda ctx, tp=tp: save(tmp_path / str(tp), Contents(1, {}, ""), tensors, ctx))[0]
            / "manifest.json"
        )
        .stat()
        .st_size
        for tp in (1, 4)
    ]
    assert abs(sizes[0] - sizes[1]) < 8


def test_a_rank_that_owns_nothing_writes_nothing(tmp_path):
    tensors = {"weights": {"w": whole("w", torch.zeros(8))}}
    path = simulate(MeshShape(tp=2, dp=2), lambda ctx: save(tmp_path, Contents(1, {}, ""), tensors, ctx))[0]
    assert names(path) == ["manifest.json", "weights-tp00000-pp00000-dp00000.safetensors"]


def test_pipeline_stages_bring_their_own_tensors(tmp_path):
    def run(ctx):
        name = f"layers.{ctx.pp.rank}.w"
        return save(tmp_path, Contents(1, {}, ""), {"weights": {name: whole(name, torch.full((3,), float(ctx.pp.rank)))}}, ctx)

    path = simulate(MeshShape(tp=2, pp=2), run)[0]
    assert {name: t.stage for name, t in read_manifest(path).tensors.items()} == {"layers.0.w": 0, "layers.1.w": 1}
    for stage in (0, 1):
        stored = load_file(path / f"weights-tp00000-pp0000{stage}-dp00000.safetensors")
        assert stored[f"layers.{stage}.w"].tolist() == [float(stage)] * 3


def test_two_stages_may_not_hold_one_name(tmp_path):
    part = {"weights": {"w": whole("w", torch.zeros(3))}}
    with pytest.raises(CheckpointError, match=r"w is stored as .* a copy on another stage must say that it is `tied`"):
        simulate(MeshShape(pp=2), lambda ctx: save(tmp_path, Contents(1, {}, ""), part, ctx))
    assert names(tmp_path) == []


def test_a_tied_copy_is_written_by_the_first_of_its_axis(tmp_path):
    def write(ctx):
        part = {"weights": {"w": whole("w", torch.full((3,), float(ctx.pp.rank)), tied="ends")}}
        return save(tmp_path, Contents(1, {}, ""), part, ctx)

    path = simulate(MeshShape(pp=2), write)[0]
    assert load_file(path / "weights-tp00000-pp00000-dp00000.safetensors")["w"].tolist() == [0.0] * 3
    assert not (path / "weights-tp00000-pp00001-dp00000.safetensors").exists()


def test_kinds_agree_about_specs_and_shapes_fit(tmp_path):
    parts = {"weights": {"w": whole("w", torch.zeros(3))}, "exp_avg": {"w": whole("w", torch.zeros(3), decay=False)}}
    with pytest.raises(CheckpointError, match="w is stored as"):
        save(tmp_path, Contents(1, {}, ""), parts, SINGLE)
    long = Portion.whole(ParamSpec("w", (3,)), torch.zeros(4))
    with pytest.raises(ContentError, match=r"elements 0 to 4, and the slice of 'w' has 3"):
        save(tmp_path, Contents(1, {}, ""), {"weights": {"w": long}}, SINGLE)
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
    (tmp_path / "step_00000200/weights-tp00000-pp00000-dp00000.safetensors").unlink()
    state.save(SINGLE, tmp_path, 300, keep=2)
    assert names(tmp_path) == ["latest", "step_00000100", "step_00000200", "step_00000300"]


def test_saving_a_step_again_replaces_it(tmp_path, state):
    state.save(SINGLE, tmp_path, 100)
    save(tmp_path, Contents(100, {"again": True}, ""), state.portions(state.local(SINGLE), SINGLE), SINGLE)
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


CHANGES = ((os, "fsync"), (os, "pwrite"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "unlink"))
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
        same(state.load(found, SINGLE)[0], state.local(SINGLE, padding=0.0))
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


def test_a_disk_that_fills_up_is_one_clear_error_on_every_rank(tmp_path, state, monkeypatch):
    layout = MeshShape(tp=2, dp=2)
    simulate(layout, lambda ctx: state.save(ctx, tmp_path, 100, sharded=True))
    real = os.pwrite

    def full(descriptor, data, offset):
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if "tp00001-pp00000-dp00001" in name and "exp_avg-" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)

    def attempt(ctx):
        with pytest.raises(CheckpointError) as caught:
            state.save(ctx, tmp_path, 200, sharded=True)
        return str(caught.value)

    seen = simulate(layout, attempt)
    assert seen == [seen[0]] * 4
    for word in ("rank 3: cannot write", "exp_avg-tp00001", "No space left", "bytes, and the disk has", "checkpoint.dir"):
        assert word in seen[0]
    assert names(tmp_path) == ["latest", "step_00000100"] and latest(tmp_path) == "step_00000100\n"


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, state, monkeypatch):
    layout = MeshShape(tp=2, dp=2)
    simulate(layout, state.save, tmp_path, 100)
    monkeypatch.setattr(writing, "header_of", lambda tensors, real=writing.header_of: (*real(tensors)[:2], 2**58))

    def attempt(ctx):
        with pytest.raises(CheckpointError, match=r"needs [\d,]{20,} bytes, and the disk of .* has [\d,]+ free; nothing was"):
            state.save(ctx, tmp_path, 200)

    simulate(layout, attempt)
    assert names(tmp_path) == ["latest", "step_00000100"]


FILE_LIMIT = """
import resource, sys, torch
from pathlib import Path
from megatrain.checkpoint.save import Contents, save
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import ParamSpec
from megatrain.parallel.portion import Portion
part = {"weights": {"w": Portion.whole(ParamSpec("w", (100_000,)), torch.zeros(100_000))}}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
save(Path(sys.argv[1]), Contents(1, {}, ""), part, ParallelContext.single())
"""


def test_the_systems_own_refusal_to_write_is_an_error(tmp_path):
    done = subprocess.run([sys.executable, "-c", FILE_LIMIT, tmp_path], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "cannot write" in done.stderr and "It needs 400,1" in done.stderr
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_an_error_on_every_rank(tmp_path, state):
    (tmp_path / "file").write_text("")

    def attempt(ctx):
        with pytest.raises(CheckpointError, match=r"rank 0: .*file") as caught:
            state.save(ctx, tmp_path / "file" / "checkpoints")
        return str(caught.value)

    assert len(set(simulate(MeshShape(tp=2), attempt))) == 1


def test_nodes_that_do_not_share_the_directory_are_noticed(tmp_path, state, monkeypatch):
    def attempt(ctx):
        with pytest.raises(CheckpointError, match=r"rank 1: .*is not there, and rank 0 has just made it.*all nodes share"):
            state.save(ctx, tmp_path / str(ctx.world.rank))
        with pytest.raises(CheckpointError, match=r"rank 1: host .* does not see in checkpoint.dir=.* has just written there"):
            claim(tmp_path / str(ctx.world.rank), ctx)

    monkeypatch.setattr(sys.modules[claim.__module__], "_PATIENCE_SECONDS", 0.2)
    simulate(MeshShape(tp=2), attempt)


HOLD = """
import sys, time
from pathlib import Path
from megatrain.checkpoint.claim import claim
from megatrain.parallel.mesh import ParallelContext
held = claim(Path(sys.argv[1]), ParallelContext.single())
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_a_directory_is_refused_until_the_first_has_gone(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "held\n"

            def attempt(ctx):
                with pytest.raises(CheckpointError, match=rf"another run saves in checkpoint.dir=.*: process {first.pid} on "):
                    claim(tmp_path, ctx)

            simulate(2, attempt)
        finally:
            first.kill()
    simulate(2, lambda ctx: claim(tmp_path, ctx).release())
    held = claim(tmp_path, SINGLE)
    claim(tmp_path, SINGLE).release()  # a run of the same process that nobody has closed
    held.release()
    held.release()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    simulate(2, lambda ctx: claim(tmp_path, ctx).release())


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
        save(tmp_path, Contents(1, {"x": torch.zeros(1)}, ""), state.portions(state.local(SINGLE), SINGLE), SINGLE)
    assert names(tmp_path) == []


# --- in the background --------------------------------------------------------------------------------------------------


class Gate:
    """Holds every write until it is opened."""

    def __init__(self, monkeypatch):
        self.opened, real = threading.Event(), os.pwrite

        def pwrite(*given):
            assert self.opened.wait(30)
            return real(*given)

        monkeypatch.setattr(os, "pwrite", pwrite)


def contents(step):
    return Contents(step, {}, "model: {}\n")


@pytest.mark.parametrize("layout", [MeshShape(), MeshShape(tp=2, dp=2)], ids=str)
def test_a_save_goes_on_while_its_source_changes(tmp_path, state, same, monkeypatch, layout):
    gate, saved = Gate(monkeypatch), []

    def run(ctx):
        saver = Saver(tmp_path, ctx, on_saved=lambda *given: saved.append(given))
        tensors = state.local(ctx)
        path = saver.save(contents(200), state.portions(tensors, ctx), wait=False)
        assert not path.exists() and not saved
        for named in tensors.values():
            for tensor in named.values():
                tensor.fill_(5.0)
        ctx.world.group.barrier() if ctx.world.group else None
        gate.opened.set()
        saver.finish()
        saver.close()
        same(state.load(path, ctx)[0], state.local(ctx, padding=0.0))

    simulate(layout, run)
    [(path, step, seconds)] = saved
    assert path.name == "step_00000200" and step == 200 and seconds > 0


def test_a_second_save_waits_for_the_first(tmp_path, state, monkeypatch):
    gate, saver = Gate(monkeypatch), Saver(tmp_path, SINGLE)
    portions = state.portions(state.local(SINGLE), SINGLE)
    saver.save(contents(100), portions, wait=False)
    threading.Timer(0.3, gate.opened.set).start()
    began = time.monotonic()
    saver.save(contents(200), portions, wait=False)
    assert time.monotonic() - began > 0.2 and (tmp_path / "step_00000100").is_dir()
    saver.close()
    assert names(tmp_path) == ["latest", "step_00000100", "step_00000200"]


def test_a_failed_save_in_the_background_is_told_and_raised_by_the_next(tmp_path, state, monkeypatch):
    real, told = os.pwrite, []

    def broken(descriptor, data, offset):
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if "step_00000200" in name and "tp00001" in name:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", broken)

    def run(ctx):
        saver = Saver(tmp_path, ctx, on_failed=lambda step, message: told.append((step, message)))
        portions = state.portions(state.local(ctx), ctx)
        saver.save(contents(100), portions)
        saver.save(contents(200), portions, wait=False)
        with pytest.raises(CheckpointError, match=r"rank 1: cannot write .*Input/output error"):
            saver.save(contents(300), portions, wait=False)
        assert saver.save(contents(400), portions).is_dir()
        saver.close()

    simulate(MeshShape(tp=2), run)
    [(step, message)] = told
    assert step == 200 and "rank 1: cannot write" in message
    assert names(tmp_path) == ["latest", "step_00000100", "step_00000400"]


def test_a_save_says_since_when_it_is_at_which_file_and_whom_rank_0_waits_for(tmp_path, state, monkeypatch):
    opened, real, before = threading.Event(), os.fsync, time.monotonic()

    def held(descriptor):
        if "tp00001" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            assert opened.wait(30)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", held)

    def run(ctx):
        saver = Saver(tmp_path, ctx)
        assert saver.unfinished() is None and saver.longest == 0.0
        saver.save(contents(100), state.portions(state.local(ctx), ctx), wait=False)
        place = (
            tmp_path
            / ".saving_step_00000100"
            / ("weights-tp00001-pp00000-dp00000.safetensors", "rank-00001")[ctx.world.rank == 0]
        )
        while saver.place() != str(place) or (ctx.world.rank == 0 and saver.unfinished()[0] < before + 5):
            time.sleep(0.005)  # until it is there
        began, at = saver.unfinished()
        assert saver.longest == 0.0
        ctx.world.group.barrier()
        opened.set()
        saver.finish()
        assert saver.unfinished() is None
        while not saver.longest:
            time.sleep(0.005)
        assert saver.longest < 60
        saver.close()
        return began - before, at

    (rank_0, at_0), (rank_1, at_1) = simulate(MeshShape(tp=2), run)
    assert 0 < rank_1 < 5 < rank_0 < 10, "the others' disks come first"
    assert at_0.endswith("/.saving_step_00000100/rank-00001") and at_1.endswith("/weights-tp00001-pp00000-dp00000.safetensors")


@pytest.mark.parametrize("blocks", [2, 3, 1000])
def test_a_small_buffer_saves_the_same_numbers(tmp_path, state, same, blocks):
    saver = Saver(tmp_path, SINGLE, staging_bytes=64 * blocks, block_bytes=64)
    path = saver.save(contents(200), state.portions(state.local(SINGLE), SINGLE))
    saver.close()
    assert saver.writer.staging._made <= blocks
    rows = json.loads((path / "manifest.json").read_text())["files"]
    assert all(len(row["blocks"]) > 5 for row in rows)
    same(state.load(path, SINGLE)[0], state.local(SINGLE, padding=0.0))


def test_a_rank_that_never_writes_does_not_hold_the_end_up(tmp_path, state, monkeypatch):
    monkeypatch.setattr(sys.modules[Saver.__module__], "_PATIENCE_SECONDS", 0.1)
    told = []

    def run(ctx):
        saver = Saver(tmp_path, ctx, on_failed=lambda step, message: told.append(message))
        if ctx.world.rank == 1:
            monkeypatch.setattr(saver.writer, "then", lambda action: None)
        saver.save(contents(100), state.portions(state.local(ctx), ctx), wait=False)
        saver.close()

    simulate(MeshShape(tp=2), run)
    assert "rank 1 has not written its part" in told[0] and names(tmp_path) == []


def test_multiples_of_keep_every_stay(tmp_path, state):
    saver = Saver(tmp_path, SINGLE, keep=2, keep_every=200)
    for step in (100, 200, 300, 400, 500, 600, 700):
        saver.save(contents(step), state.portions(state.local(SINGLE), SINGLE))
    saver.close()
    assert names(tmp_path) == ["latest", *[f"step_{step:08d}" for step in (200, 400, 600, 700)]]


def test_the_copies_of_all_ranks_of_a_node_take_a_quarter_of_its_memory():
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert writing.staging_bytes(1e-3, 8) == int(2**30 * 1e-3)
    alone, shared = writing.staging_bytes(1e9, 1), writing.staging_bytes(1e9, 8)
    assert 0 < alone <= whole / 4 and alone / shared == pytest.approx(8)
