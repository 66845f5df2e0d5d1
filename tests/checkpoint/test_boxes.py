from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatrain.checkpoint import boxes


@given(st.lists(st.integers(1, 5), max_size=4).map(tuple), st.data())
def test_a_run_is_its_boxes(shape, data):
    numel = prod(shape)
    first = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(first, numel))
    run = torch.arange(numel)[first:stop]
    whole = torch.arange(numel).view(shape)
    found = list(boxes.of_run(shape, first, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert [e for box in found for e in whole[box].flatten().tolist()] == run.tolist()
    for box in found:
        assert torch.equal(boxes.view(run, shape, first, box), whole[box])
        start, end = boxes.reach(shape, box)
        assert (start, end) == (int(whole[box].min()), int(whole[box].max()) + 1)


def test_boxes_that_do_not_meet_share_nothing():
    a, b = (slice(0, 3), slice(0, 4)), (slice(5, 6), slice(2, 9))
    assert boxes.intersect(a, b) == (slice(5, 5), slice(2, 4)) and boxes.numel(boxes.intersect(a, b)) == 0


def test_moved_is_the_inverse_of_within():
    box, outer = (slice(3, 5), slice(7, 9)), (slice(2, 6), slice(7, 10))
    assert boxes.within(box, outer) == (slice(1, 3), slice(0, 2)) and boxes.moved(boxes.within(box, outer), outer) == box
