"""What is dealt to replicas comes back in order, to the last bit."""

from megatrain.inference.replicas import gathered, share
from megatrain.parallel.mesh import MeshShape
from megatrain.testing import simulate


def test_what_is_dealt_comes_back_in_order():
    def work(ctx, count):
        return gathered([[number, 0.1 + number, "是", None] for number in share(range(count), ctx)], ctx)

    for count in (0, 1, 5, 8):
        wanted = [[number, 0.1 + number, "是", None] for number in range(count)]
        assert simulate(MeshShape(dp=3, tp=2), work, count) == [wanted] * 6
        assert simulate(MeshShape(), work, count) == [wanted]
