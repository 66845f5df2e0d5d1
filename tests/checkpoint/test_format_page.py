"""The page that describes the format is true: its example reads a checkpoint, and its arithmetic is the one the code uses."""

import re
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatrain.checkpoint.manifest import WEIGHTS, Manifest, StoredTensor
from megatrain.parallel.mesh import MeshShape
from megatrain.parallel.param import ParamSpec, Split
from megatrain.parallel.portion import Partition
from megatrain.testing import simulate

PAGE = (Path(__file__).parents[2] / "docs/checkpoint_format.md").read_text()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_example_reads_a_checkpoint(tmp_path, state, tp, sharded):
    example = re.search(r"```python\n(.*?)```", PAGE, re.S).group(1)
    assert "megatrain" not in example
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    namespace = {}
    exec(example, namespace)
    path = simulate(MeshShape(tp=tp, dp=2), lambda ctx: state.save(ctx, tmp_path, sharded=sharded))[0]
    for kind in (WEIGHTS, "exp_avg"):
        read = namespace["read_weights"](path, kind)
        assert read.keys() == {spec.name for spec in state.specs}
        for name, array in read.items():
            assert np.array_equal(array, state.logical(kind, name).numpy()), name


def test_the_manifests_checksum_is_what_the_page_says(tmp_path, state):
    data = (simulate(1, state.save, tmp_path)[0] / "manifest.json").read_bytes()
    digits = re.search(rb'"checksum": "([0-9a-f]{32})"', data).group(1)
    assert xxhash.xxh3_128_hexdigest(data.replace(digits, b"0" * 32)) == digits.decode()


@pytest.mark.parametrize(
    ("units", "pad", "t"), [(8, False, 4), (2, False, 8), (8, False, 1), (2, False, 2), (24, True, 7), (24, True, 32)]
)
def test_the_arithmetic_is_what_the_page_says(units, pad, t):
    n = 24
    spec = ParamSpec("w", (n,), Split(0, units, pad=pad))
    manifest = Manifest(1, 0.0, {}, MeshShape(tp=t), (), {"w": StoredTensor(spec, 0, {}, Partition(0, n))}, "")
    found = {piece.place["tp"]: (piece.slice[0].start, piece.slice[0].stop) for piece in manifest.pieces("w")}
    if pad:
        m = -(-n // t)
        want = {r: (min(r * m, n), min((r + 1) * m, n)) for r in range(t) if r * m < n}
    else:
        c = max(1, t // units)
        m = n * c // t
        want = {r: (r // c * m, (r // c + 1) * m) for r in range(0, t, c)}
    assert found == want


@pytest.mark.parametrize(("start", "shard", "ranks"), [(0, 10, 3), (7, 10, 4), (25, 8, 7), (3, 100, 2)])
def test_the_shards_are_what_the_page_says(start, shard, ranks):
    spec = ParamSpec("w", (6, 4))
    manifest = Manifest(1, 0.0, {}, MeshShape(dp=ranks), (), {"w": StoredTensor(spec, 0, {}, Partition(start, shard))}, "")
    found = {piece.place["dp"]: (piece.first, piece.stop) for piece in manifest.pieces("w")}
    bounds = {d: (max(0, d * shard - start), min(24, (d + 1) * shard - start)) for d in range(ranks)}
    assert found == {d: (first, stop) for d, (first, stop) in bounds.items() if first < stop}
