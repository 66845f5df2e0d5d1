import json
import math
from dataclasses import replace

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.checkpoint.directory import latest
from megatrain.checkpoint.load import find, newest
from megatrain.checkpoint.manifest import (
    FileRow,
    Manifest,
    StoredTensor,
    check_file,
    file_name,
    file_place,
    open_file,
    read_manifest,
    tensor_from_json,
    tensor_to_json,
)
from megatrain.checkpoint.tensor_file import header_of
from megatrain.checkpoint.together import CheckpointError, ContentError, DamagedCheckpointError
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.param import Init, ParamSpec, Split
from megatrain.parallel.portion import Partition

names = st.text(st.characters(codec="utf-8"), max_size=20)
splits = st.none() | st.builds(
    Split, dim=st.integers(0, 1), units=st.integers(1, 9), axis=st.sampled_from(["tp", "pp"]), pad=st.booleans()
)
specs = st.builds(
    ParamSpec,
    name=names,
    shape=st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)),
    split=splits,
    partial_over=st.none() | st.just("tp"),
    tied=st.none() | names,
    trainable=st.booleans(),
    decay=st.booleans(),
    init=st.builds(Init, st.sampled_from(["normal", "constant"]), st.floats(allow_nan=False, allow_infinity=False)),
)


@given(specs, st.dictionaries(st.sampled_from(["weights", "exp_avg"]), st.sampled_from(["float32", "bfloat16"])))
def test_a_spec_survives_json_exactly(spec, dtypes):
    tensor = StoredTensor(spec, 3, dtypes, Partition(5, 64))
    assert tensor_from_json(json.loads(json.dumps(tensor_to_json(tensor)))) == tensor


@settings(max_examples=50)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 5),
    size=st.sampled_from([1, 2, 3, 4, 8]),
    kind=st.sampled_from("psr"),
    start=st.integers(0, 50),
    dp=st.integers(1, 5),
)
def test_pieces_cover_every_element_once(rows, columns, size, kind, start, dp):
    if kind == "p":
        split = Split(0, rows, pad=True)
    elif kind == "s":
        rows, split = rows * size, Split(0, rows * size)
    else:
        split = None
    spec = ParamSpec("x", (rows, columns), split)
    partition = Partition(start, -(-(start + spec.numel) // dp))
    manifest = Manifest(1, 0.0, {}, MeshShape(tp=size, dp=dp), (), {"x": StoredTensor(spec, 0, {}, partition)}, "")
    seen = torch.zeros(spec.shape, dtype=torch.int64)
    for piece in manifest.pieces("x"):
        seen[piece.slice].view(-1)[piece.first : piece.stop] += 1  # contiguous: it is cut along its first dim
    assert bool((seen == 1).all())


def test_a_manifest_survives_the_disk_exactly(tmp_path, state):
    path = state.save(ParallelContext.single(), tmp_path)
    manifest = read_manifest(path)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert manifest.step == 200 and manifest.progress == {"samples": 6400} and manifest.config == "model: {}\n"
    assert manifest.layout == MeshShape() and manifest.kinds == ("weights", "exp_avg", "exp_avg_sq")
    assert [tensor.spec for tensor in manifest.tensors.values()] == list(state.specs)
    assert set(manifest.versions) == {"megatrain", "torch", "python"}


def rewritten(path, change):
    """The manifest at `path` after `change(body)`, with a checksum that fits."""
    file = path / "manifest.json"
    body = json.loads(file.read_bytes())
    change(body)
    body["checksum"] = "0" * 32
    data = json.dumps(body, indent=1).encode()
    file.write_bytes(data.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(data).encode(), 1))


def put(*keys_and_value):
    """A change that sets body[k1][k2]... to the value."""
    *keys, last, value = keys_and_value

    def change(body):
        for key in keys:
            body = body[key]
        body[last] = value

    return change


HOSTILE = {
    "name": [
        put("files", 0, "name", name)
        for name in (
            "../x.safetensors",
            "/etc/x.safetensors",
            "a/b.safetensors",
            "..safetensors",
            ".x.safetensors",
            "a..safetensors",
            "x",
        )
    ]
    + [put("files", 0, "name", None), put("files", 0, "name", "a\n.safetensors")],
    "rows": [
        lambda body: body["files"].append(body["files"][0]),
        put("files", 0, "bytes", -1),
        put("files", 0, "bytes", 10**15),
    ],
    "place": [
        put("files", 0, "place", {"tp": 0, "pp": 0}),
        put("files", 0, "place", "tp", "0"),
        put("files", 0, "place", "tp", True),
    ],
    "checksums": [
        put("files", 0, "blocks", []),
        put("files", 0, "blocks", ["zz"]),
        put("block_bytes", 0),
        put("block_bytes", 1),
    ],
    "tensors": [
        put("tensors", 0, "spec", "shape", [10**9, 10**9]),
        put("tensors", 0, "spec", "shape", [-1, 6]),
        put("tensors", 0, "spec", "name", 5),
        put("tensors", 0, "spec", "split", "dim", 2),
        put("tensors", 0, "spec", "split", "axis", "dp"),
        put("tensors", 0, "spec", "split", "units", 0),
        put("tensors", 0, "spec", "average_over", "dp"),
        put("tensors", 0, "spec", None),
        put("tensors", 0, "ep", 1),
        lambda body: body["tensors"][0]["spec"].pop("shape"),
        lambda body: body["tensors"][0]["spec"]["split"].pop("units"),
        put("tensors", 0, "dtypes", {"weights": "Tensor"}),
        put("tensors", 0, "dtypes", {"../weights": "float32"}),
        put("tensors", 0, "stage", 1),
        put("tensors", 0, "shard", 0),
        put("tensors", 0, "shard", 1),
        put("tensors", 0, "start", -1),
        put("tensors", 0, "start", 10**15),
        lambda body: body["tensors"][0].pop("start"),
        put("tensors", None),
        lambda body: body["tensors"].append(body["tensors"][0]),
        lambda body: body.pop("tensors"),
    ],
    "config": [
        put("config", 5),
        put("config", "a: " + "b" * (1 << 20)),
        put("progress", [1]),
        put("progress", "tokens", -1),
        put("versions", "1.0"),
    ],
    "much": [
        put("tensors", 0, "spec", "shape", [1] * 10**6),
        put("tensors", 0, "spec", "shape", [2**62, 2**62, 0]),
        put("progress", "list", [[]] * 600_000),
        put("step", 10**30),
        put("step", int("9" * 4000)),
        put("layout", "tp", 8192),
        put("saved_at", 10**400),
        put("saved_at", float("nan")),
        put("serial", 2**53),
    ],
    "layout": [put("layout", "tp", 0), put("layout", "tp", 2.0), put("layout", "tp", 10**12), put("layout", "qp", 1)],
    "format": [put("format", "z\nip" * 999), put("step", "200")],
}


@pytest.mark.parametrize("change", [pytest.param(c, id=f"{k}{i}") for k, cs in HOSTILE.items() for i, c in enumerate(cs)])
def test_what_does_not_belong_is_refused(tmp_path, state, change):
    path = state.save(ParallelContext.single(), tmp_path)
    rewritten(path, lambda body: None)
    read_manifest(path)
    rewritten(path, change)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json cannot be used") as refused:
        read_manifest(path)
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 1000


def of_specs(change):
    """A change of the spec of every tensor."""

    def changed(body):
        for tensor in body["tensors"]:
            change(tensor["spec"])

    return changed


def without(*keys):
    """Specs without a field, where they have it: written before there was such a field. It must have its default."""

    def change(spec):
        for key in keys[:-1]:
            spec = spec[key] or {}
        spec.pop(keys[-1], None)

    return of_specs(change)


def beside(*keys):
    """Specs with a field of a later release."""

    def change(spec):
        for key in keys:
            spec = spec[key] or {}
        spec["surprise"] = {"deep": [1]}

    return of_specs(change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        *((without(key), "") for key in ("partial_over", "average_over", "tied", "trainable", "decay", "init")),
        *((without(*keys), "") for keys in (("split", "axis"), ("split", "pad"), ("init", "kind"), ("init", "value"))),
        (beside(), "surprise"),
        (beside("split"), "split.surprise"),
        (beside("init"), "init.surprise"),
        (lambda body: (beside()(body), beside("split")(body), without("decay")(body)), "split.surprise, surprise"),
        (lambda body: None, ""),
    ],
)
def test_a_field_of_a_spec_that_is_missing_has_its_default_and_one_that_is_not_known_is_ignored(
    tmp_path, state, same, capsys, change, told
):
    """As a checkpoint of an earlier release, or of a later one, has them: the same numbers are loaded, and one line is said."""
    ctx = ParallelContext.single()
    path = state.save(ctx, tmp_path)
    rewritten(path, change)
    got, manifest = state.load(path, ctx)
    same(got, state.local(ctx))
    said = capsys.readouterr().err.splitlines()
    line = f"megatrain: {path}: fields of tensors that this release does not know are ignored: {told}"
    assert said == ([line] if told else []) and ", ".join(manifest.unknown) == told
    assert Manifest.from_bytes(manifest.to_bytes()).unknown == ()


def test_a_row_as_it_is_written_and_one_with_a_field_less_and_one_more():
    row = {
        "spec": {
            "name": "layers.0.mlp.down.weight",
            "shape": [8, 16],
            "split": {"dim": 1, "units": 16, "axis": "tp", "pad": False},
            "partial_over": None,
            "average_over": "dp_cp",
            "tied": None,
            "trainable": True,
            "decay": False,
            "init": {"kind": "normal", "value": 0.5},
        },
        "stage": 1,
        "dtypes": {"weights": "float32"},
        "start": 64,
        "shard": 128,
    }
    spec = ParamSpec("layers.0.mlp.down.weight", (8, 16), Split(1, 16), decay=False, init=Init(value=0.5))
    tensor = StoredTensor(spec, 1, {"weights": "float32"}, Partition(64, 128))
    assert json.loads(json.dumps(tensor_to_json(tensor))) == row and tensor_from_json(row) == tensor
    unknown = set()
    less = {**row, "spec": {key: value for key, value in row["spec"].items() if key != "average_over"}}
    more = {**row, "spec": {**row["spec"], "expert": True}}
    assert tensor_from_json(less, unknown) == tensor and unknown == set()
    assert tensor_from_json(more, unknown) == tensor and unknown == {"expert"}
    cut = {**row["spec"], "split": {"dim": 0, "units": 4, "axis": "ep", "pad": False}, "average_over": "edp"}
    expert = StoredTensor(
        ParamSpec(**{**vars(spec), "split": Split(0, 4, "ep"), "average_over": "edp"}), 1, {}, Partition(0, 9)
    )
    assert tensor_from_json({**row, "spec": cut, "dtypes": {}, "start": 0, "shard": 9}) == expert
    named = StoredTensor(ParamSpec("e", (3,), average_over="edp"), 0, {}, Partition(0, 9), ep=2)
    assert tensor_to_json(named)["ep"] == 2 and tensor_from_json(tensor_to_json(named)) == named


@pytest.mark.parametrize(
    ("keys", "known"),
    [(("average_over",), "dp_cp, edp"), (("split", "axis"), "tp, pp, ep"), (("init", "kind"), "normal, constant")],
)
def test_a_value_that_only_a_newer_release_knows_is_told(tmp_path, state, keys, known):
    path = state.save(ParallelContext.single(), tmp_path / "checkpoints")
    name = {}

    def change(body):
        tensor = next(t for t in body["tensors"] if t["spec"]["split"] is not None)
        name.update(it=tensor["spec"]["name"])
        put("spec", *keys, "surprise")(tensor)

    rewritten(path, change)
    why = (
        f"{path}/manifest.json cannot be used: tensor {name['it']!r} has {'.'.join(keys)}='surprise', and this release of megatrain "
        f"knows {known} alone. If a newer one wrote it, load it with that"
    )
    with pytest.raises(DamagedCheckpointError) as told:
        read_manifest(path)
    assert str(told.value) == why
    for named in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError) as told:
            find(named)
        head = f"no whole checkpoint in {named} (1 cannot be used; the newest is {path.name}: {why}). Give a step directory (it"
        assert str(told.value).startswith(head)


def bytes_of(tensors, shape, blocks=1):
    """Size of the manifest of a model of so many tensors, each rank of which writes one file of so many blocks."""
    stored = {}
    for n in range(tensors):
        spec = ParamSpec(f"layers.{n}.weight", (4096, 4096), Split(0, 4096))
        stored[spec.name] = StoredTensor(spec, 0, {"weights": "float32"}, Partition(0, spec.numel))
    places = [shape.coordinates(rank) for rank in range(shape.world)]
    rows = [FileRow(file_name("weights", at), "weights", file_place("dp_cp", at), 10**9, ("0" * 32,) * blocks) for at in places]
    return len(Manifest(1, 0.0, {}, shape, tuple(rows), stored, "").to_bytes())


def test_a_manifest_grows_by_a_row_for_a_file_and_a_row_for_a_tensor():
    """And not by a row for each tensor of each file; docs/scale.md has its size for 16,384 ranks."""
    few, many = MeshShape(tp=4, pp=2, dp=2), MeshShape(tp=8, pp=4, dp=32)
    row_of_tensor = (bytes_of(200, few) - bytes_of(100, few)) / 100
    assert row_of_tensor < 500 and abs((bytes_of(200, many) - bytes_of(100, many)) / 100 - row_of_tensor) < 1
    assert (bytes_of(100, many) - bytes_of(100, few)) / (many.world - few.world) < 240
    assert (bytes_of(1, many, blocks=2) - bytes_of(1, many)) / many.world < 45


@pytest.mark.parametrize("version", [1, 7, "2", None])
def test_another_version_says_so_and_is_not_passed_over(tmp_path, state, version):
    state.save(ParallelContext.single(), tmp_path, 100)
    path = state.save(ParallelContext.single(), tmp_path)
    rewritten(path, put("version", version))
    for read in (lambda: read_manifest(path), lambda: newest(tmp_path)):
        with pytest.raises(
            ContentError, match=rf"version {version!r} was written by another release of megatrain; this one reads 2"
        ):
            read()


@pytest.mark.parametrize("error", [CheckpointError, ContentError, DamagedCheckpointError])
def test_errors_of_a_checkpoint_are_one_line_of_bounded_length(error):
    said = str(error("a" * 10_000 + "\n\x1b[31m"))
    assert len(said) < 3100 and said.isprintable()


def test_a_version_of_any_size_is_cut_in_the_message(tmp_path, state):
    path = state.save(ParallelContext.single(), tmp_path)
    rewritten(path, put("version", [[]] * 100_000))
    with pytest.raises(
        ContentError, match=r"\.\.\. \(400,000 characters\) was written by another release of megatrain"
    ) as caught:
        read_manifest(path)
    assert len(str(caught.value)) < 1000


def test_a_missing_key_is_called_that(tmp_path, state):
    path = state.save(ParallelContext.single(), tmp_path)
    rewritten(path, lambda body: body.pop("step"))
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json cannot be used: the key 'step' is missing"):
        read_manifest(path)


def test_a_key_that_appears_twice_is_refused(tmp_path, state):
    path = state.save(ParallelContext.single(), tmp_path)
    data = (path / "manifest.json").read_bytes().replace(b'"step": 200,', b'"step": 200, "step": 300,', 1)
    data = data.replace(data[16:48], b"0" * 32, 1)
    data = data.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(data).encode(), 1)
    (path / "manifest.json").write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="a key appears twice"):
        read_manifest(path)


def test_every_flipped_bit_and_every_cut_of_a_manifest_is_noticed(tmp_path, state):
    file = state.save(ParallelContext.single(), tmp_path) / "manifest.json"
    whole = file.read_bytes()
    for position in range(0, len(whole), 37):
        for damaged in (whole[:position], whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :]):
            file.write_bytes(damaged)
            with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"):
                read_manifest(file.parent)


def test_a_directory_without_a_manifest_is_no_checkpoint(tmp_path):
    with pytest.raises(DamagedCheckpointError, match="is not a checkpoint"):
        read_manifest(tmp_path)


def test_progress_must_be_plain_json():
    with pytest.raises(ValueError, match="JSON"):
        Manifest(1, 0.0, {"loss": math.nan}, MeshShape(), (), {}, "").to_bytes()


def test_a_damaged_block_is_named(tmp_path):
    file = tmp_path / "x.safetensors"
    header, entries, size = header_of([("x", torch.float32, (40,))])
    data = header + bytes(size - len(header))
    file.write_bytes(data)
    blocks = tuple(xxhash.xxh3_128_hexdigest(data[i : i + 64]) for i in range(0, size, 64))
    row = FileRow(file.name, "weights", {}, size, blocks)
    open_file(tmp_path, row, 64).verify_all()
    file.write_bytes(data[:-3] + b"\1" + bytes(2))
    damaged = open_file(tmp_path, row, 64)
    damaged.verify([(0, entries["x"].start + 4)])
    last = (size - 1) // 64 * 64
    with pytest.raises(DamagedCheckpointError, match=rf"x\.safetensors is damaged between bytes {last} and {size}"):
        damaged.verify([(0, size)])
    with pytest.raises(DamagedCheckpointError, match=rf"it has {size} bytes, and the manifest says {size + 1}"):
        check_file(tmp_path, replace(row, bytes=size + 1))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 988097824\n"
    file.write_bytes(pointer)
    (tmp_path / "manifest.json").write_bytes(pointer)
    with pytest.raises(DamagedCheckpointError, match=r"x\.safetensors: this is a Git LFS pointer"):
        check_file(tmp_path, row)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json cannot be used: this is a Git LFS pointer"):
        read_manifest(tmp_path)


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "real").write_bytes(bytes(4))
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "real")
    with pytest.raises(DamagedCheckpointError, match="is a link"):
        check_file(tmp_path, FileRow("x.safetensors", "weights", {}, 4, ()))


def test_a_manifest_is_a_plain_file_in_its_own_directory_and_no_larger_than_one_may_be(tmp_path, state):
    path = state.save(ParallelContext.single(), tmp_path / "own")
    other = tmp_path / "other"
    other.mkdir()
    (other / path.name).symlink_to(path)
    with pytest.raises(
        DamagedCheckpointError, match=rf"is a link that leads out of its directory, to {path}\. Give that one\."
    ):
        read_manifest(other / path.name)
    (path.parent / "best").symlink_to(path.name)
    assert read_manifest(path.parent / "best") == read_manifest(path)
    file = path / "manifest.json"
    data = file.read_bytes()
    with file.open("ab") as more:
        more.truncate(200_000_000)
    with pytest.raises(DamagedCheckpointError, match="it has 200,000,000 bytes, and 134,217,728 at the most are read"):
        read_manifest(path)
    file.unlink()
    for target in ("/dev/zero", tmp_path / "elsewhere"):
        (tmp_path / "elsewhere").write_bytes(data)
        file.symlink_to(target)
        with pytest.raises(DamagedCheckpointError, match=r"manifest\.json cannot be used: it is a link, to "):
            read_manifest(path)
        file.unlink()
    (path.parent / "latest").unlink(missing_ok=True)
    (path.parent / "latest").symlink_to("/dev/zero")
    assert latest(path.parent) == ""


def test_kinds_are_plain_words():
    assert file_name("exp_avg", {"tp": 3, "pp": 1, "dp": 12}) == "exp_avg-tp00003-pp00001-dp00012.safetensors"
    for kind in ("", "../x", "Weights", "a b"):
        with pytest.raises(ValueError, match="plain lower-case word"):
            file_name(kind, {"tp": 0, "pp": 0, "dp": 0})
