"""Copies in memory: spread over machines, whole or not used, and never more than two of them."""

import pytest

from megatrain.checkpoint import in_memory
from megatrain.checkpoint.in_memory import Copies, newest_copy, verify_copy
from megatrain.checkpoint.load import load
from megatrain.checkpoint.save import Contents
from megatrain.checkpoint.together import CheckpointError, DamagedCheckpointError
from megatrain.parallel.mesh import MeshShape
from megatrain.testing import simulate

LAYOUT = MeshShape(tp=2, dp=2)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def machine(tmp_path, ctx):
    """The folder of a rank's machine, of two with two ranks each, and the rank's place there."""
    return tmp_path / f"machine_{ctx.world.rank // 2}", ctx.world.rank % 2


def keep(ctx, tmp_path, state, steps, publish=True):
    """Keep a copy of each step; the last is published, or still being written."""
    folder, place = machine(tmp_path, ctx)
    copies = Copies(folder, ctx, leads=place == 0, staging_bytes=2**28)
    for step in steps:
        copies.keep(Contents(step, {}, "model: {}\n"), state.portions(state.local(ctx), ctx, sharded=True))
    if publish:
        copies.publish()
    copies.close(remove=False)


def test_each_machine_holds_what_its_ranks_have_and_all_load_it(tmp_path, state):
    def run(ctx):
        keep(ctx, tmp_path, state, (5, 10))
        folder, place = machine(tmp_path, ctx)
        path, manifest = newest_copy(folder, ctx)
        verify_copy(path, manifest, ctx, (place, 2))
        got = state.empty(ctx)
        load(path, state.portions(got, ctx, sharded=True), ctx)
        want = state.local(ctx, padding=0.0)
        for kind, named in state.portions(want, ctx, sharded=True).items():
            for name, portion in named.items():
                mine = state.portions(got, ctx, sharded=True)[kind][name].elements.read(slice(0, portion.count))
                assert mine.equal(portion.elements.read(slice(0, portion.count))), (kind, name)
        return path.name, manifest.step

    assert simulate(LAYOUT, run) == [("step_00000010", 10)] * 4
    for number in (0, 1):
        assert names(tmp_path / f"machine_{number}") == ["step_00000010"]
        held = names(tmp_path / f"machine_{number}/step_00000010")
        assert len(held) == 7 and held[-1].startswith("weights-")
    manifests = [(tmp_path / f"machine_{number}/step_00000010/manifest.json").read_bytes() for number in (0, 1)]
    assert manifests[0] == manifests[1]


def test_a_copy_that_is_still_written_does_not_count_and_is_cleared_by_the_next_start(tmp_path, state):
    def run(ctx):
        keep(ctx, tmp_path, state, (5, 10), publish=False)
        found = newest_copy(machine(tmp_path, ctx)[0], ctx)
        keep(ctx, tmp_path, state, (6,))
        return found[1].step, newest_copy(machine(tmp_path, ctx)[0], ctx)[1].step

    assert simulate(LAYOUT, run) == [(5, 6)] * 4
    assert names(tmp_path / "machine_0") == names(tmp_path / "machine_1") == ["step_00000006"]


def test_copies_of_steps_that_a_run_goes_back_from_are_removed(tmp_path, state):
    def run(ctx):
        folder, place = machine(tmp_path, ctx)
        copies = Copies(folder, ctx, leads=place == 0, staging_bytes=2**28)
        for step in (5, 10):
            copies.keep(Contents(step, {}, "model: {}\n"), state.portions(state.local(ctx), ctx, sharded=True))
        copies.forget()
        found = newest_copy(folder, ctx)
        left = names(folder)
        ctx.world.group.barrier()
        copies.keep(Contents(3, {}, "model: {}\n"), state.portions(state.local(ctx), ctx, sharded=True))
        copies.publish()
        copies.close(remove=False)
        return found, left, newest_copy(folder, ctx)[1].step

    assert simulate(LAYOUT, run) == [(None, [], 3)] * 4


def test_a_copy_that_some_machine_lacks_is_none(tmp_path, state):
    def run(ctx):
        keep(ctx, tmp_path, state, (5,))
        if ctx.world.rank == 0:
            (tmp_path / "machine_1/step_00000005").rename(tmp_path / "machine_1/step_00000004")
        ctx.world.group.barrier()
        return newest_copy(machine(tmp_path, ctx)[0], ctx)

    assert simulate(LAYOUT, run) == [None] * 4


@pytest.mark.parametrize("fault", ["flipped", "cut", "manifest"])
def test_a_damaged_copy_is_found_before_anything_is_loaded(tmp_path, state, fault):
    def run(ctx):
        keep(ctx, tmp_path, state, (5,))
        folder, place = machine(tmp_path, ctx)
        if ctx.world.rank == 3:
            file = sorted((folder / "step_00000005").glob("exp_avg-*"))[1]
            data = bytearray(file.read_bytes())
            data[-3] ^= 1
            if fault == "manifest":
                (folder / "step_00000005/manifest.json").write_text("{}")
            else:
                file.write_bytes(data if fault == "flipped" else data[:-1])
        ctx.world.group.barrier()
        found = newest_copy(folder, ctx)
        if fault == "manifest":
            return str(found)
        with pytest.raises(DamagedCheckpointError) as caught:
            verify_copy(*found, ctx, (place, 2))
        return str(caught.value)

    said = simulate(LAYOUT, run)
    assert said == [said[0]] * 4
    assert said[0] == "None" if fault == "manifest" else "exp_avg-tp0000" in said[0]


def test_without_room_it_is_an_error_on_every_rank(tmp_path, state, monkeypatch):
    def run(ctx):
        with pytest.raises(CheckpointError, match=r"a copy in memory needs [\d,]+ bytes, and .* has 0 free"):
            keep(ctx, tmp_path, state, (5,))

    monkeypatch.setattr(in_memory.shutil, "disk_usage", lambda folder: type("", (), {"free": 0}))
    simulate(LAYOUT, run)
