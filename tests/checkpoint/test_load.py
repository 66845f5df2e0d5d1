import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatrain.checkpoint.load import find, load, newest, read_weights, verify
from megatrain.checkpoint.manifest import LocalTensor, file_name, hash_file, read_manifest
from megatrain.checkpoint.save import save
from megatrain.checkpoint.together import CheckpointError, ContentError, DamagedCheckpointError, LayoutError
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.param import ParamSpec, Split
from megatrain.testing import simulate

SINGLE = ParallelContext.single()
LAYOUTS = [MeshShape(tp=tp, dp=dp) for tp in (1, 2, 4, 8) for dp in (1, 2)] + [MeshShape(tp=2, cp=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_state_comes_back_to_the_bit(tmp_path, state, same, layout):
    def round_trip(ctx):
        path = state.save(ctx, tmp_path)
        got = state.empty(ctx)
        manifest = load(path, got, ctx)
        same(got, state.local(ctx, padding=0.0))
        return manifest.progress

    assert simulate(layout, round_trip) == [{"samples": 6400}] * layout.world


@pytest.mark.parametrize("there", [1, 2, 4, 8, 3], ids=lambda tp: f"to{tp}")
@pytest.mark.parametrize("here", [1, 2, 4, 8], ids=lambda tp: f"from{tp}")
def test_weights_load_under_any_tensor_parallel_layout(tmp_path, state, same, here, there):
    if there == 3:  # only the padded and the whole tensors can be cut in three
        state.specs = tuple(spec for spec in state.specs if spec.split is None or spec.split.pad)
    path = simulate(MeshShape(tp=here), state.save, tmp_path)[0]

    def check(ctx):
        got = state.empty(ctx, ["weights"])
        load(path, got, ctx)
        same(got, state.local(ctx, ["weights"], padding=0.0))

    simulate(MeshShape(tp=there, dp=2), check)


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


def test_weights_are_cast_to_the_dtype_asked_for(tmp_path, state):
    path = state.save(SINGLE, tmp_path)
    got = state.empty(SINGLE, ["weights"], torch.bfloat16)
    load(path, got, SINGLE)
    for name, part in got["weights"].items():
        assert torch.equal(part.tensor, state.logical("weights", name).bfloat16())


def test_tensors_that_are_views_and_parameters_are_filled_in_place(tmp_path):
    spec = ParamSpec("w", (4, 4), Split(0, 4))
    flat = torch.nn.Parameter(torch.arange(32.0))
    tensors = {"weights": {"w": LocalTensor(spec, flat.view(8, 4)[2:6])}}
    path = save(tmp_path, 1, tensors, SINGLE, {}, "")
    want = flat.detach().clone()
    flat.data[8:24] = 0
    load(path, tensors, SINGLE)
    assert torch.equal(flat, want) and flat.grad_fn is None


@pytest.mark.parametrize("there", [MeshShape(tp=4), MeshShape(tp=1), MeshShape(tp=2, dp=2)], ids=str)
def test_optimizer_state_of_another_layout_is_refused(tmp_path, state, there):
    path = simulate(MeshShape(tp=2), state.save, tmp_path)[0]

    def attempt(ctx):
        got = state.empty(ctx)
        with pytest.raises(
            LayoutError, match=rf"saved under tp=2, .* this run has tp={there.tp}, .*exp_avg, exp_avg_sq.*weights alone"
        ):
            load(path, got, ctx)
        assert all(tensor.isnan().all() for parts in got.values() for _, tensor in parts.values())

    simulate(there, attempt)


def test_a_model_of_another_shape_is_refused_with_both_shapes(tmp_path, state):
    path = state.save(SINGLE, tmp_path)
    state.specs = (ParamSpec("embedding.tokens", (13, 6), Split(0, 13, pad=True)), *state.specs[1:])
    with pytest.raises(ContentError, match=r"embedding.tokens: the checkpoint has \[11, 6\], the config gives \[13, 6\]"):
        load(path, state.empty(SINGLE, ["weights"]), SINGLE)


def test_missing_and_surplus_tensors_are_named(tmp_path, state):
    path = state.save(SINGLE, tmp_path)
    whole = state.specs
    state.specs = whole[1:]
    with pytest.raises(ContentError, match=r"has, and the config does not give, 1 of 7 tensors of weights: embedding.tokens"):
        load(path, state.empty(SINGLE, ["weights"]), SINGLE)
    state.specs = (*whole, ParamSpec("layers.1.mlp.up.bias", (3,)))
    with pytest.raises(ContentError, match=r"lacks 1 of 8 tensors of weights: layers.1.mlp.up.bias"):
        load(path, state.empty(SINGLE, ["weights"]), SINGLE)


def test_a_kind_that_was_not_saved_is_named(tmp_path, state):
    path = state.save(SINGLE, tmp_path)
    with pytest.raises(ContentError, match=r"holds weights, exp_avg, exp_avg_sq, but no momentum.*optim.name"):
        load(path, state.empty(SINGLE, ["weights", "momentum"]), SINGLE)


def test_optimizer_state_is_not_cast(tmp_path, state):
    path = state.save(SINGLE, tmp_path)
    with pytest.raises(ContentError, match=r"exp_avg of .*: the checkpoint has torch.float32, this run torch.bfloat16"):
        load(path, state.empty(SINGLE, ["exp_avg"], torch.bfloat16), SINGLE)


def test_a_tensor_that_does_not_fit_its_spec_is_refused(tmp_path, state):
    path = state.save(SINGLE, tmp_path)
    bad = {"weights": {"w": LocalTensor(ParamSpec("w", (4,)), torch.zeros(5))}}
    with pytest.raises(ContentError, match=r"the rank stores \[5\], and the spec of 'w' gives \[4\]"):
        load(path, bad, SINGLE)


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
def test_a_damaged_shard_is_named_on_all_ranks_and_nothing_is_filled(tmp_path, state, damage):
    path = simulate(MeshShape(tp=2), state.save, tmp_path)[0]
    DAMAGES[damage](path / "exp_avg-tp00001-pp00000.safetensors")

    def attempt(ctx):
        got = state.empty(ctx)
        with pytest.raises(DamagedCheckpointError, match=r"^rank 1: .*exp_avg-tp00001-pp00000\.safetensors"):
            load(path, got, ctx)
        assert all(tensor.isnan().all() for parts in got.values() for _, tensor in parts.values())

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
        name = "weights-tp00001-pp00000.safetensors"
        DAMAGES[damage](tmp_path / "step_00000300" / name)
    before = sorted((tmp_path / "step_00000300").iterdir())

    def search(ctx):
        told = []
        return newest(tmp_path, ctx, lambda path, reason: told.append((path, reason))), told

    seen = simulate(layout, search)
    assert seen == [seen[0]] * 4
    path, [(damaged, reason)] = seen[0]
    assert path == tmp_path / "step_00000200" and damaged == tmp_path / "step_00000300" and name in reason
    assert sorted(damaged.iterdir()) == before


def test_no_checkpoint_is_none(tmp_path, state):
    assert newest(tmp_path / "nowhere") is None
    (tmp_path / "step_00000100").mkdir()
    (tmp_path / "step_1").mkdir()
    (tmp_path / ".saving_step_00000200").mkdir()
    (tmp_path / "step_00000300").write_text("a file")
    told = []
    assert newest(tmp_path, on_damaged=lambda path, reason: told.append(path.name)) is None
    assert told == ["step_00000100"]
    assert simulate(2, lambda ctx: newest(tmp_path, ctx)) == [None, None]


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
    file = path / file_name("weights", {"tp": 0, "pp": 0})
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
        replace(r, bytes=file.stat().st_size, blocks=hash_file(file)) if r.name == file.name else r for r in manifest.files
    )
    (path / "manifest.json").write_bytes(replace(manifest, files=files).to_bytes())
    verify(path)
    with pytest.raises(DamagedCheckpointError, match=r"weights-.*embedding.tokens"):
        load(path, state.empty(SINGLE, ["weights"]), SINGLE)


def test_a_person_may_name_a_run_a_folder_or_a_step(tmp_path, state):
    path = state.save(SINGLE, tmp_path / "checkpoints")
    for given in (tmp_path, tmp_path / "checkpoints", path):
        assert find(given) == path
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*Give a step directory"):
        find(tmp_path / "elsewhere")
