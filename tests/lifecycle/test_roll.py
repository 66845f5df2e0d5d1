"""The roll of a run: everyone's identity and one key on all ranks, another for each start and each secret."""

import os
from dataclasses import replace

import torch

from megatrain.lifecycle.blame import Identity
from megatrain.lifecycle.roll import call_roll
from megatrain.testing import simulate

CPU = torch.device("cpu")


def test_all_ranks_have_the_same_roll_and_another_start_another_key():
    def thrice(ctx):
        return [call_roll(ctx.dp.rank, ctx.dp.group, CPU, secret) for secret in (b"secret", b"secret", b"")]

    rolls = simulate(3, thrice)
    for start in range(3):
        assert len({roll[start].key for roll in rolls}) == 1
        assert [roll[start].identities for roll in rolls] == [{rank: Identity.own(rank) for rank in range(3)}] * 3
    assert len({roll.key for roll in rolls[0]}) == 3


def test_only_a_process_that_answered_is_one_of_ours():
    roll = simulate(2, lambda ctx: call_roll(ctx.dp.rank, ctx.dp.group, CPU, b""))[0]
    one = Identity.own(1)
    assert roll.has(one) and one.pid == os.getpid()
    for other in (replace(one, pid=one.pid + 1), replace(one, born="1"), replace(one, rank=0, pid=1), replace(one, rank=7)):
        assert not roll.has(other)
