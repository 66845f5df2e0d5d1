"""What the start-up lines say of a GPU, and of shards that go between nodes."""

import pytest
import torch

from megatrain import watch
from megatrain.config.schema import ParallelConfig
from megatrain.parallel.mesh import MeshShape
from megatrain.testing import simulate


@pytest.mark.parametrize(
    ("device", "dtype", "inside", "said"),
    [
        ("cuda", torch.bfloat16, True, " | weight gradients: added inside the matmul"),
        ("cuda", torch.float16, False, " | weight gradients: added after the matmul"),
        ("cuda", torch.float32, False, ""),
        ("cpu", torch.bfloat16, False, ""),
    ],
    ids=str,
)
def test_where_weight_gradients_are_added_is_told(monkeypatch, device, dtype, inside, said):
    monkeypatch.setattr(watch, "adds_inside", lambda *_: inside)
    assert watch.summing_note(torch.device(device), dtype) == said


@pytest.mark.parametrize(
    ("tp", "dp", "zero_ranks", "of_node", "said"),
    [
        (2, 4, 2, 4, []),
        (2, 4, 2, 8, []),
        (2, 4, 4, 8, []),
        (2, 4, None, 4, []),
        (
            2, 4, 4, 4,
            ["parallel.zero_ranks=4: 8 neighbouring ranks have the shards, and a node has 4, so that shards go between nodes: "
             "parallel.zero_ranks=2 stays within one"],
        ),
        (1, 6, 2, 3, ["parallel.zero_ranks=2: 2 neighbouring ranks have the shards, and a node has 3, so that shards go between nodes: "
                      "parallel.zero_ranks=3 stays within one"]),
        (2, 4, 4, 2, ["parallel.zero_ranks=4: 8 neighbouring ranks have the shards, and a node has 2, so that shards go between nodes"]),
    ],
)  # fmt: skip
def test_shards_that_go_between_nodes_are_told(tp, dp, zero_ranks, of_node, said):
    parallel = ParallelConfig(tensor_parallel_size=tp, zero_ranks=zero_ranks)
    shape = MeshShape(tp=tp, dp=dp, zero_ranks=zero_ranks)
    assert simulate(shape, lambda ctx: watch.between_nodes(parallel, ctx, of_node))[0] == said
