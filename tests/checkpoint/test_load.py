import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatrain.checkpoint.load import find, load, load_newest, newest, read_weights, verify
from megatrain.checkpoint.manifest import file_name, read_manifest
from megatrain.checkpoint.save import Contents, save
from megatrain.checkpoint.tensor_file import hash_block
from megatrain.checkpoint.together import CheckpointError, ContentError, DamagedCheckpointError
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.param import ParamSpec, Split
from megatrain.parallel.portion import ElementRange, Portion, TensorElements
from megatrain.testing import simulate

SINGLE = ParallelContext.single()
LAYOUTS = [MeshShape(tp=tp, dp=dp) for tp in (1, 2, 4, 8) for dp in (1, 2)] + [MeshShape(tp=2, cp=2)]


THERE = [*LAYOUTS, MeshShape(dp=3), MeshShape(tp=4, dp=3)]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("here", LAYOUTS, ids=str)
def test_a_state_comes_back_to_the_bit_under_any_layout(tmp_path, state, same, here, sharded):
    path = simulate(here, lambda ctx: state.save(ctx, tmp_path, sharded=sharded))[0]

    def check(ctx):
        got, manifest = state.load(path, ctx)
        same(got, state.local(ctx, padding=0.0))
        return manifest.progress

    for there in THERE:
        assert simulate(there, check) == [{"samples": 6400}] * there.world


@pytest.mark.parametrize("there", [MeshShape(), MeshShape(dp=2), MeshShape(tp=2, dp=3), MeshShape(tp=4)], ids=str)
def test_shards_load_into_shards(tmp_path, state, same, there):
    path = simulate(MeshShape(tp=2, dp=2), lambda ctx: state.save(ctx, tmp_path, sharded=True))[0]

    def check(ctx):
        got, want = state.empty(ctx), state.local(ctx, padding=0.0)
        mine = state.portions(got, ctx, sharded=True)
        load(path, mine, ctx)
        for kind, named in state.portions(want, ctx, sharded=True).items():
            for name, portion in named.items():
                assert torch.equal(mine[kind][name].elements.tensor, portion.elements.tensor), (kind, name)
        return sum(tensor.isnan().sum() for named in got.values() for tensor in named.values())

    untouched = simulate(there, check)
    assert (min(untouched) > 0) == (there.dp > 1)


def test_padding_of_a_first_dim_alone_is_possible(tmp_path):
    bad = Portion.whole(ParamSpec("w", (2, 3), Split(1, 3, pad=True)), torch.zeros(2, 3))
    with pytest.raises(CheckpointError, match="w is padded along dim 1; only the first dim"):
        save(tmp_path, Contents(1, {}, ""), {"weights": {"w": bad}}, SINGLE)


def test_elements_that_are_not_views_are_written_back(tmp_path, state):
    """As masters in halves are, which are joined to be read and cut again."""

    class Halved:
        def __init__(self, tensor):
            self.half, self.direct = tensor / 2, False
            self.dtype = tensor.dtype

        def read(self, part):
            return self.half[part] * 2

        def write(self, part, values):
            self.half[part] = values / 2

    spec = ParamSpec("w", (5, 3), Split(0, 5, pad=True))
    whole = torch.arange(15.0)
    path = save(tmp_path, Contents(1, {}, ""), {"weights": {"w": Portion.whole(spec, whole.view(5, 3))}}, SINGLE)

    def check(ctx):
        held = Halved(torch.full((10,), torch.nan))
        mine = Portion(spec, 1, 8, ElementRange(held, 1), Portion.whole(spec, torch.zeros(9)).partition)
        load(path, {"weights": {"w": mine}}, ctx)
        return (held.half * 2).tolist()

    first, second = simulate(MeshShape(tp=2), check)
    assert first[1:9] == list(range(1, 9)) and second[1:9] == [10.0, 11, 12, 13, 14, 0, 0, 0]


def test_every_element_is_written_once(tmp_path, state):
    path = simulate(MeshShape(tp=4, dp=2), state.save, tmp_path)[0]
    count = dict.fromkeys((spec.name for spec in state.specs), 0)
    for row in read_manifest(path).files:
        if row.kind == "weights":
            for name, tensor in load_file(path / row.name).items():
                count[name] += tensor.numel()
                assert not (tensor == 777.0).any()
    assert count == {spec.name: spec.numel for spec in state.specs}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_whole_weights_in_one_process(tmp_path, state, dtype):
    path = simulate(MeshShape(tp=4), lambda ctx: state.save(ctx, tmp_path, dtype=dtype))[0]
    whole = read_weights(path)
    assert whole.keys() == {spec.name for spec in state.specs}
    for name, tensor in whole.items():
        assert tensor.dtype == dtype and torch.equal(tensor, state.logical("weights", name, dtype))


@pytest.mark.parametrize("kind", ["weights", "exp_avg"])
def test_numbers_are_cast_to_the_dtype_asked_for(tmp_path, state, kind):
    path = state.save(SINGLE, tmp_path)
    got, _ = state.load(path, SINGLE, [kind], torch.bfloat16)
    for name, tensor in got[kind].items():
        assert torch.equal(tensor, state.logical(kind, name).bfloat16())


def test_tensors_that_are_views_and_parameters_are_filled_in_place(tmp_path):
    spec = ParamSpec("w", (4, 4), Split(0, 4))
    flat = torch.nn.Parameter(torch.arange(32.0))
    tensors = {"weights": {"w": Portion.whole(spec, flat.view(8, 4)[2:6])}}
    path = save(tmp_path, Contents(1, {}, ""), tensors, SINGLE)
    want = flat.detach().clone()
    flat.data[8:24] = 0
    load(path, tensors, SINGLE)
    assert torch.equal(flat, want) and flat.grad_fn is None


def test_a_model_of_another_shape_is_refused_with_both_shapes(tmp_path, state):
    path = state.save(SINGLE, tmp_path)
    state.specs = (ParamSpec("embedding.tokens", (13, 6), Split(0, 13, pad=True)), *state.specs[1:])
    with pytest.raises(ContentError, match=r"embedding.tokens: the checkpoint has \[11, 6\], the config gives \[13, 6\]"):
        state.load(path, SINGLE, ["weights"])


def test_missing_and_surplus_tensors_are_named(tmp_path, state):
    path = state.save(SINGLE, tmp_path)
    whole = state.specs
    state.specs = whole[1:]
    with pytest.raises(ContentError, match=r"has, and the config does not give, 1 of 7 tensors of weights: embedding.tokens"):
        state.load(path, SINGLE, ["weights"])
    state.specs = (*whole, ParamSpec("layers.1.mlp.up.bias", (3,)))
    with pytest.raises(ContentError, match=r"lacks 1 of 8 tensors of weights: layers.1.mlp.up.bias"):
        state.load(path, SINGLE, ["weights"])


def test_a_kind_that_was_not_saved_is_named(tmp_path, state):
    path = state.save(SINGLE, tmp_path)
    with pytest.raises(ContentError, match=r"holds weights, exp_avg, exp_avg_sq, but no momentum.*optim.name"):
        state.load(path, SINGLE, ["weights", "momentum"])


def test_what_does_not_fit_its_spec_is_refused(tmp_path, state):
    path = state.save(SINGLE, tmp_path)
    good = Portion.whole(ParamSpec("w", (4,)), torch.zeros(4))
    for first, name in ((1, "w"), (-1, "w"), (0, "v")):
        bad = Portion(good.spec, first, 4, TensorElements(torch.zeros(4)), good.partition)
        with pytest.raises(
            ContentError, match=rf"{name}: the rank gives elements {first} to {first + 4}, and the slice of 'w' has 4"
        ):
            load(path, {"weights": {name: bad}}, SINGLE)


def flip(file):
    """Change one bit of the last tensor."""
    data = bytearray(file.read_bytes())
    data[-2] ^= 16
    file.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "link": lambda file: (file.rename(file.with_suffix(".x")), file.symlink_to(file.with_suffix(".x"))),
    "directory": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_on_all_ranks(tmp_path, state, damage):
    path = simulate(MeshShape(tp=2), state.save, tmp_path)[0]
    DAMAGES[damage](path / "exp_avg-tp00001-pp00000-dp00000.safetensors")

    def attempt(ctx):
        got = state.empty(ctx)
        with pytest.raises(DamagedCheckpointError, match=r"^rank 1: .*exp_avg-tp00001-pp00000-dp00000\.safetensors"):
            load(path, state.portions(got, ctx), ctx)

    simulate(MeshShape(tp=2), attempt)


@pytest.mark.parametrize("damage", [*DAMAGES, "manifest"])
def test_the_newest_whole_checkpoint_is_taken(tmp_path, state, damage):
    layout = MeshShape(tp=2, dp=2)
    for step in (100, 200, 300):
        simulate(layout, lambda ctx, step=step: state.save(ctx, tmp_path, step))
    if damage == "manifest":
        flip(tmp_path / "step_00000300/manifest.json")
        name = "manifest.json"
    else:
        name = "weights-tp00001-pp00000-dp00000.safetensors"
        DAMAGES[damage](tmp_path / "step_00000300" / name)
    before = sorted((tmp_path / "step_00000300").iterdir())

    def search(ctx):
        told = []
        path, manifest = load_newest(
            tmp_path, state.portions(state.empty(ctx), ctx), ctx, lambda path, reason: told.append((path, reason))
        )
        assert manifest.step == 200
        return path, told

    seen = simulate(layout, search)
    assert seen == [seen[0]] * 4
    path, [(damaged, reason)] = seen[0]
    assert path == newest(tmp_path) == tmp_path / "step_00000200" and damaged == tmp_path / "step_00000300" and name in reason
    assert sorted(damaged.iterdir()) == before


def test_a_run_that_has_lost_its_past_does_not_begin_anew(tmp_path, state):
    for step in (100, 200):
        flip(state.save(SINGLE, tmp_path, step) / "manifest.json")

    def attempt(ctx):
        with pytest.raises(
            CheckpointError, match=r"none of the 2 checkpoints .* is whole \(the newest: step_00000200: .*manifest"
        ):
            load_newest(tmp_path, state.portions(state.empty(ctx), ctx), ctx)

    simulate(2, attempt)


def test_a_checkpoint_that_is_not_accepted_is_not_passed_over(tmp_path, state):
    state.save(SINGLE, tmp_path)

    def refuse(path, manifest):
        raise ContentError(f"{manifest.step} is not mine")

    with pytest.raises(ContentError, match="200 is not mine"):
        load_newest(tmp_path, state.portions(state.empty(SINGLE), SINGLE), SINGLE, accept=refuse)


@pytest.mark.parametrize("newest", [False, True], ids=["named", "newest"])
def test_ranks_that_find_different_checkpoints_under_one_name_load_none(tmp_path, state, newest):
    """As nodes do that have a directory of the same name each: both are whole, and of the same step and shapes."""
    for place in range(2):
        state.save(SINGLE, tmp_path / f"{place}", dtype=(torch.float32, torch.float64)[place])

    def attempt(ctx):
        path = tmp_path / f"{ctx.world.rank}"
        with pytest.raises(ContentError) as error:
            if newest:
                load_newest(path, state.portions(state.empty(ctx), ctx), ctx)
            else:
                state.load(path / "step_00000200", ctx)
        return str(error.value)

    sums = [read_manifest(tmp_path / f"{place}" / "step_00000200").checksum for place in range(2)]
    for place, said in enumerate(simulate(MeshShape(dp=2), attempt)):
        assert said.startswith(
            f"ranks have other weights under {tmp_path}/{place}/step_00000200 than rank 0: [1]. On rank 0 it is the checkpoint of step 200 "
            f"with the checksum {sums[0]}; on rank 1, the checkpoint of step 200 with the checksum {sums[1]}. Copy the one"
        )


def test_no_checkpoint_is_none(tmp_path, state):
    assert newest(tmp_path / "nowhere") is None
    (tmp_path / "step_00000100").mkdir()
    (tmp_path / "step_1").mkdir()
    (tmp_path / ".saving_step_00000200").mkdir()
    (tmp_path / "step_00000300").write_text("a file")
    told = []
    assert newest(tmp_path, on_damaged=lambda path, reason: told.append(path.name)) is None
    assert told == ["step_00000100"]
    assert load_newest(tmp_path / "nowhere", {}, SINGLE) is None


def test_newest_means_saved_last_and_not_largest_step(tmp_path, state):
    for step in (300, 100):
        state.save(SINGLE, tmp_path, step)
    assert newest(tmp_path) == tmp_path / "step_00000100"


def test_verify_deals_files_out_and_misses_none(tmp_path, state):
    path = simulate(MeshShape(tp=2), state.save, tmp_path)[0]
    simulate(3, lambda ctx: verify(path, ctx))
    for row in read_manifest(path).files:
        shutil.copytree(path, tmp_path / "copy")
        flip(tmp_path / "copy" / row.name)
        for world in (1, 3):
            with pytest.raises(DamagedCheckpointError, match=row.name):
                simulate(world, lambda ctx: verify(tmp_path / "copy", ctx))
        shutil.rmtree(tmp_path / "copy")


@pytest.mark.parametrize("lie", ["shape", "dtype", "name"])
def test_a_shard_with_other_contents_than_the_manifest_says_is_refused(tmp_path, state, lie):
    path = state.save(SINGLE, tmp_path)
    file = path / file_name("weights", {"tp": 0, "pp": 0, "dp": 0})
    held = load_file(file)
    tensor = held.pop("embedding.tokens")
    if lie == "shape":
        held["embedding.tokens"] = tensor.reshape(6, 11)
    elif lie == "dtype":
        held["embedding.tokens"] = tensor.view(torch.int32)
    else:
        held["embedding.tokenz"] = tensor
    save_file(held, file)
    manifest = read_manifest(path)
    files = tuple(
        replace(r, bytes=file.stat().st_size, blocks=(hash_block(file.read_bytes()),)) if r.name == file.name else r
        for r in manifest.files
    )
    (path / "manifest.json").write_bytes(replace(manifest, files=files).to_bytes())
    verify(path)
    with pytest.raises(DamagedCheckpointError, match=r"weights-.*embedding.tokens"):
        state.load(path, SINGLE, ["weights"])


def test_a_person_may_name_a_run_a_folder_or_a_step(tmp_path, state):
    path = state.save(SINGLE, tmp_path / "checkpoints")
    for given in (tmp_path, tmp_path / "checkpoints", path):
        assert find(given) == path
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*Give a step directory"):
        find(tmp_path / "elsewhere")
