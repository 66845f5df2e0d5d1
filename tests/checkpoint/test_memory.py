"""What loading takes beside what a rank holds: 20 million parameters with two moments on four ranks, under another layout."""

import gc
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from megatrain.checkpoint.load import load
from megatrain.checkpoint.save import Contents, Saver
from megatrain.parallel.mesh import MeshShape
from megatrain.parallel.param import ParamSpec, Split
from megatrain.parallel.portion import Partition, Portion, TensorElements
from megatrain.testing import spawn

MILLIONS = int(os.environ.get("MEGATRAIN_MEMORY_MILLIONS", "20"))
KINDS = ("weights", "exp_avg", "exp_avg_sq")


def specs():
    """Matrices of 10 million elements, cut along either dim."""
    return [ParamSpec(f"w{i}", (10_000, 1_000), Split(i % 2, 8)) for i in range(MILLIONS // 10)]


def elements_of(spec, ctx, first, stop):
    """What a slice holds: the place of each element in the logical tensor."""
    rows, columns = spec.slices(ctx.tp.size, ctx.tp.rank)
    width = columns.stop - columns.start
    place = torch.arange(first, stop)
    return ((place // width + rows.start) * 1000 + place % width + columns.start).float()


def portions(ctx, fill):
    """This rank's shards, filled or zero."""
    found, start = {kind: {} for kind in KINDS}, 0
    numels = [torch.Size(spec.local_shape(ctx.tp.size)).numel() for spec in specs()]
    shard = -(-sum(numels) // ctx.dp.size)
    for spec, numel in zip(specs(), numels, strict=True):
        partition = Partition(start, shard)
        first, stop = partition.run(numel, ctx.dp.rank)
        start += numel
        if first >= stop:
            continue
        for kind in KINDS:
            flat = elements_of(spec, ctx, first, stop) if fill else torch.zeros(stop - first)
            found[kind][spec.name] = Portion(spec, first, stop - first, TensorElements(flat), partition)
    return found


def anonymous():
    """Bytes of this process's memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


class Peak:
    """The largest such memory while it lasts."""

    def __enter__(self):
        self.bytes, self._over = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()


def write(ctx, folder):
    saver = Saver(folder, ctx, staging_bytes=2**28)
    path = saver.save(Contents(1, {}, "model: {}\n"), portions(ctx, fill=True))
    saver.close()
    return path


def read(ctx, path):
    """(bytes that the rank holds, most that loading took beside them)."""
    mine = portions(ctx, fill=False)
    held = sum(p.count * 4 for named in mine.values() for p in named.values())
    gc.collect()
    before = anonymous()
    with Peak() as peak:
        load(path, mine, ctx)
    for named in mine.values():
        for portion in named.values():
            want = elements_of(portion.spec, ctx, portion.first, portion.first + portion.count)
            assert torch.equal(portion.elements.tensor, want), portion.spec.name
    return held, peak.bytes - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(600)
def test_loading_takes_little_beside_what_a_rank_holds(tmp_path):
    path = spawn(MeshShape(tp=2, dp=2), write, tmp_path, timeout_seconds=500)[0]
    for held, beside in spawn(MeshShape(tp=4), read, path, timeout_seconds=500):
        print(f"{held / 1e6:.0f} MB held, {beside / 1e6:.1f} MB beside them")
        assert held == MILLIONS * 10**6 * 12 // 4
        assert held + beside < 1.3 * held
