"""A small model's tensors with every way a dim can be cut, as logical tensors and as what each rank stores of them."""

from pathlib import Path

import pytest
import torch

from megatrain.checkpoint.load import load
from megatrain.checkpoint.save import Contents, save
from megatrain.parallel.param import Init, ParamSpec, Split
from megatrain.parallel.portion import Partition, Portion, TensorElements

KINDS = ("weights", "exp_avg", "exp_avg_sq")
PADDING = 777.0


class State:
    """A model with an odd vocabulary (11), 8 query heads and 2 key heads, replicated norms and a scalar."""

    specs = (
        ParamSpec("embedding.tokens", (11, 6), Split(0, 11, pad=True)),
        ParamSpec("layers.0.attention.query.weight", (16, 6), Split(0, 8)),
        ParamSpec("layers.0.attention.key.weight", (4, 6), Split(0, 2)),
        ParamSpec("layers.0.attention.key.bias", (4,), Split(0, 2), decay=False, init=Init("constant", 0.0)),
        ParamSpec("layers.0.attention.output.weight", (6, 16), Split(1, 8), init=Init(value=0.02 / 3)),
        ParamSpec("final_norm.weight", (6,), partial_over="tp", decay=False, init=Init("constant", 1.0)),
        ParamSpec("temperature", (), trainable=False, tied="ends"),
    )

    def logical(self, kind, name, dtype=torch.float32):
        """The whole tensor of a kind: other numbers for each kind and name."""
        index = [spec.name for spec in self.specs].index(name)
        generator = torch.Generator().manual_seed(100 * index + len(kind))
        return torch.randn(self.specs[index].shape, generator=generator, dtype=torch.float64).to(dtype)

    def empty(self, ctx, kinds=KINDS, dtype=torch.float32):
        """What a rank stores before a load: nan everywhere."""
        shapes = {spec: spec.local_shape(ctx.tp.size) for spec in self.specs}
        return {
            kind: {spec.name: torch.full(shape, torch.nan, dtype=dtype) for spec, shape in shapes.items()} for kind in kinds
        }

    def local(self, ctx, kinds=KINDS, dtype=torch.float32, padding=PADDING):
        """What a rank stores: its slice of the logical tensors, padding filled with a number that must never be seen again."""
        parts = self.empty(ctx, kinds, dtype)
        for kind, tensors in parts.items():
            for spec in self.specs:
                tensor = tensors[spec.name].fill_(padding)
                mine = self.logical(kind, spec.name, dtype)[spec.slices(ctx.tp.size, ctx.tp.rank)]
                tensor[tuple(slice(0, n) for n in mine.shape)] = mine
        return parts

    def portions(self, tensors, ctx, sharded=False):
        """The portions of such tensors: whole, or (sharded) a data rank's part of one flat row of all of them."""
        shards = ctx.dp_cp.size
        total = sum(t.numel() for t in tensors["weights" if "weights" in tensors else next(iter(tensors))].values())
        shard = -(-total // shards)
        found = {}
        for kind, named in tensors.items():
            found[kind], start = {}, 0
            for spec in self.specs:
                tensor = named[spec.name]
                partition = Partition(start, shard)
                first, stop = partition.run(tensor.numel(), ctx.dp_cp.rank) if sharded else (0, tensor.numel())
                if first < stop:
                    run = TensorElements(tensor.view(-1)[first:stop])
                    found[kind][spec.name] = Portion(spec, first, stop - first, run, partition)
                start += tensor.numel()
        return found

    def save(self, ctx, directory: Path, step=200, keep=0, sharded=False, **more):
        """Save this state."""
        portions = self.portions(self.local(ctx, **more), ctx, sharded)
        return save(directory, Contents(step, {"samples": 32 * step}, "model: {}\n"), portions, ctx, keep)

    def load(self, path, ctx, kinds=KINDS, dtype=torch.float32):
        """Load into empty tensors and return them and the manifest."""
        got = self.empty(ctx, kinds, dtype)
        return got, load(path, self.portions(got, ctx), ctx)


@pytest.fixture
def state():
    return State()


def assert_same(got, want):
    """Every tensor equal to the bit, padding included."""
    assert got.keys() == want.keys()
    for kind in want:
        assert got[kind].keys() == want[kind].keys()
        for name, tensor in want[kind].items():
            assert tensor.dtype == got[kind][name].dtype
            assert torch.equal(got[kind][name], tensor), (kind, name)


@pytest.fixture
def same():
    return assert_same
