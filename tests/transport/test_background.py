"""Sends that are waited for by a thread can be asked whether they have ended, and raise what they ended with."""

import threading

import pytest
import torch

from megatrain.testing import simulate, spawn
from megatrain.transport.background import WaitingThread


class Call:
    def __init__(self, error=None):
        self.ended, self.error = threading.Event(), error

    def wait(self):
        self.ended.wait(10)
        if self.error:
            raise self.error

    def is_completed(self):
        return False


def test_calls_end_one_after_the_other():
    watch, calls = WaitingThread("test"), [Call(), Call()]
    watched = [watch.watched(call) for call in calls]
    assert not any(w.is_completed() for w in watched)
    calls[0].ended.set()
    watched[0].wait()
    assert watched[0].is_completed() and not watched[1].is_completed()
    calls[1].ended.set()
    watched[1].wait()
    watch.close()


def test_an_error_is_raised_where_one_waits():
    watch, call = WaitingThread("test"), Call(RuntimeError("connection reset"))
    watched = watch.watched(call)
    call.ended.set()
    with pytest.raises(RuntimeError, match="connection reset"):
        watched.wait()
    assert watched.is_completed()
    watch.close()


def send_before_it_is_wanted(ctx):
    """Whether rank 0's send was done (before, after) rank 1 received it; a message of a megabyte cannot hide in a buffer."""
    tensor = torch.zeros(2**18)
    if ctx.dp.rank == 1:
        ctx.dp.group.barrier()
        ctx.dp.group.recv(tensor, 0)
        ctx.dp.group.barrier()
        return bool((tensor == 1).all())
    handle = ctx.dp.group.send(tensor.fill_(1), 1, blocking=False)
    before = handle.done()
    ctx.dp.group.barrier()
    ctx.dp.group.barrier()
    handle.wait()
    return before, handle.done()


@pytest.mark.parametrize("run", [simulate, spawn])
def test_a_send_says_when_it_has_ended(run):
    assert run(2, send_before_it_is_wanted) == [(False, True), True]
