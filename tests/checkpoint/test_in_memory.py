"""Copies in memory: spread over machines, whole or not used, and never more than two of them; each machine keeps another's too."""

import shutil
import time

import pytest

from megatrain.checkpoint import in_memory
from megatrain.checkpoint.in_memory import Copies, Peers
from megatrain.checkpoint.load import load
from megatrain.checkpoint.machines import Machines
from megatrain.checkpoint.newest_copy import complete, newest_copy
from megatrain.checkpoint.save import Contents
from megatrain.checkpoint.tensor_file import BLOCK_BYTES
from megatrain.checkpoint.together import CheckpointError, DamagedCheckpointError
from megatrain.parallel.mesh import MeshShape
from megatrain.testing import simulate
from megatrain.transport import handover
from megatrain.transport.handover import Handover

LAYOUT = MeshShape(tp=2, dp=2)
MACHINES = Machines(((0, 1), (2, 3)))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def machine(tmp_path, ctx):
    """The folder of a rank's machine, of two with two ranks each, and the rank's place there."""
    return tmp_path / f"machine_{ctx.world.rank // 2}", ctx.world.rank % 2


def meet(ctx):
    return Handover("127.0.0.1", BLOCK_BYTES, ctx.world.group, ctx.device)


def flip(step, name):
    """Damage a byte of a file of a copy."""
    data = bytearray((step / name).read_bytes())
    data[-3] ^= 1
    (step / name).write_bytes(data)


def missing(step, number, files):
    return f"the copy of step {step} in memory is not used: {number} of its {files} files are on no machine any more"


def the_same(results):
    """The result of all ranks."""
    assert results == [results[0]] * len(results)
    return results[0]


def open_copies(ctx, tmp_path, peers=False):
    folder, place = machine(tmp_path, ctx)
    others = Peers(MACHINES, meet(ctx), 20.0) if peers else None
    return Copies(folder, ctx, leads=place == 0, staging_bytes=2**28, peers=others)


def keep(ctx, tmp_path, state, steps, publish=True, peers=False):
    """Keep a copy of each step; the last is published, or still being written."""
    copies = open_copies(ctx, tmp_path, peers)
    for step in steps:
        copies.keep(Contents(step, {}, "model: {}\n"), state.portions(state.local(ctx), ctx, sharded=True))
    if publish:
        copies.publish()
    copies.close(remove=False)


def go_on(ctx, tmp_path, state, sharded=True, machines=MACHINES):
    """Find the newest copy, complete and load it, and compare every element; its name and what was mended."""
    copy, why = newest_copy(machine(tmp_path, ctx)[0], ctx, machines)
    assert copy is not None, why
    got = state.empty(ctx)
    mended = complete(copy, state.portions(got, ctx, sharded), ctx, machines, lambda: meet(ctx), 20.0)
    load(copy.path, state.portions(got, ctx, sharded), ctx)
    want = state.portions(state.local(ctx, padding=0.0), ctx, sharded)
    for kind, named in want.items():
        for name, portion in named.items():
            mine = state.portions(got, ctx, sharded)[kind][name].elements.read(slice(0, portion.count))
            assert mine.equal(portion.elements.read(slice(0, portion.count))), (kind, name)
    return copy.path.name, mended


def test_each_machine_holds_what_its_ranks_have_and_all_load_it(tmp_path, state):
    def run(ctx):
        keep(ctx, tmp_path, state, (5, 10))
        return go_on(ctx, tmp_path, state)

    assert simulate(LAYOUT, run) == [("step_00000010", [])] * 4
    for number in (0, 1):
        assert names(tmp_path / f"machine_{number}") == ["step_00000010"]
        held = names(tmp_path / f"machine_{number}/step_00000010")
        assert len(held) == 7 and held[-1].startswith("weights-")
    manifests = [(tmp_path / f"machine_{number}/step_00000010/manifest.json").read_bytes() for number in (0, 1)]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("sharded", [True, False], ids=["zero 1", "zero 0"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_with_nothing_gets_its_files_from_the_one_that_keeps_them(tmp_path, state, lost, sharded):
    def run(ctx):
        keep(ctx, tmp_path, state, (5, 10), peers=True)
        ctx.world.group.barrier()
        if ctx.world.rank == 0:
            assert [len(names(tmp_path / f"machine_{number}/step_00000010")) for number in (0, 1)] == [13, 13]
            shutil.rmtree(tmp_path / f"machine_{lost}")
        ctx.world.group.barrier()
        went_on = go_on(ctx, tmp_path, state, sharded)
        keep(ctx, tmp_path, state, (11,), peers=True)
        return went_on, go_on(ctx, tmp_path, state, sharded)

    assert simulate(LAYOUT, run) == [(("step_00000010", []), ("step_00000011", []))] * 4
    for number in (0, 1):
        assert names(tmp_path / f"machine_{number}") == ["step_00000011"]


def test_the_machine_that_is_left_goes_on_alone_under_another_layout(tmp_path, state):
    simulate(LAYOUT, lambda ctx: keep(ctx, tmp_path, state, (5,), peers=True))
    shutil.rmtree(tmp_path / "machine_1")
    went_on = simulate(MeshShape(dp=2), lambda ctx: go_on(ctx, tmp_path, state, machines=Machines(((0, 1),))))
    assert went_on == [("step_00000005", [])] * 2


def test_a_damaged_file_comes_from_the_other_machine_that_has_it(tmp_path, state):
    def run(ctx):
        keep(ctx, tmp_path, state, (5,), peers=True)
        if ctx.world.rank == 3:
            flip(tmp_path / "machine_1/step_00000005", "exp_avg-tp00001-pp00000-dp00001.safetensors")
        ctx.world.group.barrier()
        return go_on(ctx, tmp_path, state)

    name, [mended] = the_same(simulate(LAYOUT, run))
    assert (
        name == "step_00000005" and "machine_1/step_00000005/exp_avg-tp00001-pp00000-dp00001.safetensors is damaged" in mended
    )
    ours, theirs = (tmp_path / f"machine_{number}/step_00000005" for number in (0, 1))
    assert names(ours) == names(theirs) and all(
        (ours / name).read_bytes() == (theirs / name).read_bytes() for name in names(ours)
    )


def test_what_a_lost_machine_had_and_its_keeper_has_damaged_is_named(tmp_path, state):
    def run(ctx):
        keep(ctx, tmp_path, state, (5,), peers=True)
        ctx.world.group.barrier()
        if ctx.world.rank == 0:
            shutil.rmtree(tmp_path / "machine_1")
            flip(tmp_path / "machine_0/step_00000005", "weights-tp00000-pp00000-dp00001.safetensors")
        ctx.world.group.barrier()
        with pytest.raises(DamagedCheckpointError) as caught:
            go_on(ctx, tmp_path, state)
        return str(caught.value)

    said = the_same(simulate(LAYOUT, run))
    assert "machine_0/step_00000005/weights-tp00000-pp00000-dp00001.safetensors is damaged between bytes 0 and" in said


def test_without_a_copy_on_another_machine_the_loss_of_one_is_told(tmp_path, state):
    def run(ctx):
        keep(ctx, tmp_path, state, (5,))
        if ctx.world.rank == 0:
            shutil.rmtree(tmp_path / "machine_1")
        ctx.world.group.barrier()
        return newest_copy(machine(tmp_path, ctx)[0], ctx, MACHINES)

    assert simulate(LAYOUT, run) == [(None, missing(5, 6, 12))] * 4


def test_a_peer_that_does_not_answer_is_an_error_on_every_rank(tmp_path, state, monkeypatch):
    monkeypatch.setattr(handover, "IDLE_SECONDS", 0.3)
    monkeypatch.setattr(handover.Handover, "_take", lambda self, line, place: time.sleep(1))

    def run(ctx):
        copies = open_copies(ctx, tmp_path, peers=True)
        copies.keep(Contents(5, {}, "model: {}\n"), state.portions(state.local(ctx), ctx, sharded=True))
        with pytest.raises(CheckpointError) as caught:
            copies.publish()
        copies.close(remove=True)
        return str(caught.value)

    said = the_same(simulate(LAYOUT, run))
    assert said.startswith("rank 0: rank 0 could not hand .saving_step_00000005 to rank 2 at 127.0.0.1:")
    assert said.endswith(": no answer for 0.3 s. With checkpoint.in_memory_peer=false each machine keeps its own alone.")
    assert names(tmp_path) == []


def test_a_copy_that_is_still_written_does_not_count_and_is_cleared_by_the_next_start(tmp_path, state):
    def run(ctx):
        keep(ctx, tmp_path, state, (5, 10), publish=False)
        found, _ = newest_copy(machine(tmp_path, ctx)[0], ctx, MACHINES)
        keep(ctx, tmp_path, state, (6,))
        return found.manifest.step, newest_copy(machine(tmp_path, ctx)[0], ctx, MACHINES)[0].manifest.step

    assert simulate(LAYOUT, run) == [(5, 6)] * 4
    assert names(tmp_path / "machine_0") == names(tmp_path / "machine_1") == ["step_00000006"]


def test_copies_of_steps_that_a_run_goes_back_from_are_removed(tmp_path, state):
    def run(ctx):
        copies, folder = open_copies(ctx, tmp_path, peers=True), machine(tmp_path, ctx)[0]
        for step in (5, 10):
            copies.keep(Contents(step, {}, "model: {}\n"), state.portions(state.local(ctx), ctx, sharded=True))
        copies.forget()
        found = newest_copy(folder, ctx, MACHINES)
        left = names(folder)
        ctx.world.group.barrier()
        copies.keep(Contents(3, {}, "model: {}\n"), state.portions(state.local(ctx), ctx, sharded=True))
        copies.publish()
        copies.close(remove=False)
        return found, left, newest_copy(folder, ctx, MACHINES)[0].manifest.step

    assert simulate(LAYOUT, run) == [((None, ""), [], 3)] * 4


@pytest.mark.parametrize("fault", ["flipped", "cut", "manifest"])
def test_a_damaged_copy_is_found_before_anything_is_loaded(tmp_path, state, fault):
    def run(ctx):
        keep(ctx, tmp_path, state, (5,))
        folder, _ = machine(tmp_path, ctx)
        if ctx.world.rank == 3:
            file = sorted((folder / "step_00000005").glob("exp_avg-*"))[1]
            data = bytearray(file.read_bytes())
            data[-3] ^= 1
            if fault == "manifest":
                (folder / "step_00000005/manifest.json").write_text("{}")
            else:
                file.write_bytes(data if fault == "flipped" else data[:-1])
        ctx.world.group.barrier()
        copy, why = newest_copy(folder, ctx, MACHINES)
        if copy is None:
            return why
        with pytest.raises(DamagedCheckpointError) as caught:
            complete(copy, state.portions(state.empty(ctx), ctx, sharded=True), ctx, MACHINES, lambda: meet(ctx), 20.0)
        return str(caught.value)

    said = the_same(simulate(LAYOUT, run))
    lacking = {"cut": 1, "manifest": 6}
    assert (
        said == missing(5, lacking[fault], 12)
        if fault in lacking
        else "exp_avg-tp00001-pp00000-dp00001.safetensors is damaged" in said
    )


def test_without_room_it_is_an_error_on_every_rank(tmp_path, state, monkeypatch):
    def run(ctx):
        with pytest.raises(CheckpointError, match=r"a copy in memory needs [\d,]+ bytes, and .* has 0 free"):
            keep(ctx, tmp_path, state, (5,))

    monkeypatch.setattr(in_memory.shutil, "disk_usage", lambda folder: type("", (), {"free": 0}))
    simulate(LAYOUT, run)


def test_a_folder_that_others_can_write_to_neither_gets_a_copy_nor_gives_one(tmp_path, state):
    def refused(ctx):
        with pytest.raises(CheckpointError, match=r"rank 0: OSError: .*/machine_0 is no folder of this user's alone"):
            keep(ctx, tmp_path, state, (5,))

    def run(ctx):
        keep(ctx, tmp_path, state, (5,))
        machine(tmp_path, ctx)[0].chmod(0o777)
        ctx.world.group.barrier()
        return newest_copy(machine(tmp_path, ctx)[0], ctx, MACHINES)

    assert simulate(LAYOUT, run) == [(None, "")] * 4
    simulate(LAYOUT, refused)
