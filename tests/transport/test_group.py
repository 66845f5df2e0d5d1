"""Every call of every Group against its definition, on threads and on gloo; and what happens when ranks do not agree."""

import re
import socket
import threading
import time

import jobs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.parallel.mesh import MeshShape
from megatrain.testing import simulate, spawn
from megatrain.transport.group import TransportError
from megatrain.transport.processes import Rendezvous, TorchWorld
from megatrain.transport.threads import MemoryWorld
from megatrain.transport.wrappers import DelayedGroup, RecordedGroup, RecordedWorld, Recorder

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
REDUCE = {"sum": sum, "max": lambda x: torch.stack(x).amax(0), "min": lambda x: torch.stack(x).amin(0)}


def values(rank, rows, dtype, columns=3):
    """Small integers, exact in every dtype, in a view into the middle of a larger buffer."""
    flat = (torch.arange(rows * columns) * 7 + rank * 5) % 11
    buffer = torch.zeros(rows * columns + 4, dtype=dtype)
    buffer[2:-2] = flat.to(dtype)
    return buffer[2:-2].view(rows, columns)


def every_call(ctx, dtype, blocking, wrap=None):
    """All eight calls on this rank's tensors, named."""
    group = ctx.world.group if wrap is None else wrap(ctx.world.group)
    size, rank = group.size, group.rank
    out, handles = {}, []

    def room(rows):
        return torch.full((rows + 2, 3), 1, dtype=dtype)[1:-1]

    for op in ("sum", "max", "min") if dtype != torch.bool else ("max", "min"):
        out["all_reduce", op] = values(rank, 4, dtype)
        handles.append(group.all_reduce(out["all_reduce", op], op, blocking=blocking))
        out["reduce_scatter", op] = room(2)
        handles.append(group.reduce_scatter(out["reduce_scatter", op], values(rank, 2 * size, dtype), op, blocking=blocking))
    out["all_gather"] = room(2 * size)
    handles.append(group.all_gather(out["all_gather"], values(rank, 2, dtype), blocking=blocking))
    out["all_to_all"] = room(2 * size)
    handles.append(group.all_to_all(out["all_to_all"], values(rank, 2 * size, dtype), blocking=blocking))
    sends = [(rank + to) % 3 for to in range(size)]
    receives = [(source + rank) % 3 for source in range(size)]
    out["uneven"] = room(sum(receives))
    handles.append(group.all_to_all(out["uneven"], values(rank, sum(sends), dtype), receives, sends, blocking=blocking))
    for source in range(size):
        out["broadcast", source] = values(rank, 3, dtype)
        handles.append(group.broadcast(out["broadcast", source], source, blocking=blocking))
    right, left = (rank + 1) % size, (rank - 1) % size
    for message in range(3):  # in order, of one shape
        out["recv", message] = room(1)
        sent = group.send(values(rank + message, 1, dtype), right, blocking=False)
        handles += [group.recv(out["recv", message], left, blocking=blocking), sent]
    group.barrier()
    for handle in reversed(handles):
        handle.wait()
        handle.wait()  # a second wait does no harm
    return out


def by_definition(size, rank, dtype):
    out = {}

    def all_ranks(rows):
        return [values(r, rows, dtype) for r in range(size)]

    for op in ("sum", "max", "min") if dtype != torch.bool else ("max", "min"):
        reduce = REDUCE[op]
        if dtype == torch.bool:
            out["all_reduce", op] = reduce([x.int() for x in all_ranks(4)]).bool()
            out["reduce_scatter", op] = reduce([x.int() for x in all_ranks(2 * size)]).bool()[2 * rank : 2 * rank + 2]
        else:
            out["all_reduce", op] = reduce(all_ranks(4)).to(dtype)
            out["reduce_scatter", op] = reduce(all_ranks(2 * size)).to(dtype)[2 * rank : 2 * rank + 2]
    out["all_gather"] = torch.cat(all_ranks(2))
    out["all_to_all"] = torch.cat([x[2 * rank : 2 * rank + 2] for x in all_ranks(2 * size)])
    blocks = []
    for source in range(size):
        sends = [(source + to) % 3 for to in range(size)]
        blocks.append(values(source, sum(sends), dtype).split(sends)[rank])
    out["uneven"] = torch.cat(blocks)
    for source in range(size):
        out["broadcast", source] = values(source, 3, dtype)
    for message in range(3):
        out["recv", message] = values((rank - 1) % size + message, 1, dtype)
    return out


def check(results, dtype):
    for rank, result in enumerate(results):
        expected = by_definition(len(results), rank, dtype)
        assert result.keys() == expected.keys()
        for name, tensor in expected.items():
            assert result[name].dtype == dtype
            assert torch.equal(result[name], tensor), (rank, name)


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_group_does_what_the_calls_mean(dtype, size, blocking):
    check(simulate(size, every_call, dtype, blocking), dtype)


def test_a_wider_output_is_what_sums_are_made_in():
    def run(ctx):
        whole = torch.full((3,), 1.0 if ctx.world.rank == 0 else 2**-9, dtype=torch.bfloat16)
        narrow, wide = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
        ctx.world.group.reduce_scatter(narrow, whole)
        ctx.world.group.reduce_scatter(wide, whole)
        return narrow.item(), wide.item()

    assert simulate(3, run) == [(1.0, 1 + 2**-8)] * 3


def every_call_of_every_dtype(ctx, dtypes, blocking):
    return [every_call(ctx, dtype, blocking) for dtype in dtypes]


@pytest.mark.parametrize("blocking", [True, False])
def test_gloo_group_does_what_the_calls_mean(blocking):
    for dtype, results in zip(DTYPES, zip(*spawn(2, every_call_of_every_dtype, DTYPES, blocking), strict=True), strict=True):
        check(results, dtype)


def test_gloo_group_of_four():
    check(spawn(4, every_call, torch.bfloat16, False), torch.bfloat16)


def staged_calls(ctx, dtype):
    """As if tensors lay on a GPU: through copies on the host."""
    ctx.world.group._staged = True
    return every_call(ctx, dtype, True), every_call(ctx, dtype, False)


def test_calls_through_host_copies():
    for results in zip(*spawn(2, staged_calls, torch.float32), strict=True):
        check(results, torch.float32)


@pytest.mark.parametrize("blocking", [True, False])
def test_wrapped_groups_do_what_the_calls_mean(blocking):
    def wrap(group):
        return RecordedGroup(DelayedGroup(group, 0.001), Recorder())

    check(simulate(2, every_call, torch.float32, blocking, wrap), torch.float32)


def reduce_floats(ctx):
    torch.manual_seed(0)
    mine = torch.randn(8, 64, generator=torch.Generator().manual_seed(ctx.world.rank))
    scattered = torch.empty(8 // ctx.world.size, 64)
    ctx.world.group.reduce_scatter(scattered, mine)
    reduced = mine.clone()
    ctx.world.group.all_reduce(reduced)
    return scattered, reduced


def test_sums_are_in_rank_order_and_the_same_bits_everywhere():
    parts = [torch.randn(8, 64, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    in_order = parts[0] + parts[1] + parts[2] + parts[3]
    simulated = simulate(4, reduce_floats)
    for scattered, reduced in simulated:
        assert torch.equal(reduced, in_order)
        assert scattered.shape == (2, 64)
    assert torch.equal(torch.cat([scattered for scattered, _ in simulated]), in_order)
    processes = spawn(4, reduce_floats)
    assert torch.equal(torch.cat([scattered for scattered, _ in processes]), in_order)
    assert all(torch.equal(reduced, processes[0][1]) for _, reduced in processes)


def in_place(ctx):
    group = ctx.world.group
    gathered = torch.zeros(group.size, 2)
    gathered[group.rank] = group.rank + 1.0
    group.all_gather(gathered, gathered[group.rank : group.rank + 1])
    whole = torch.arange(float(2 * group.size)).view(-1, 2) + group.rank
    group.reduce_scatter(whole[group.rank : group.rank + 1], whole)
    return gathered, whole[group.rank].clone()


@pytest.mark.parametrize("run", [simulate, spawn])
def test_a_part_may_lie_inside_the_whole(run):
    for rank, (gathered, row) in enumerate(run(2, in_place)):
        assert gathered.tolist() == [[1.0, 1.0], [2.0, 2.0]]
        assert row.tolist() == [4.0 * rank + 1, 4.0 * rank + 3]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 4).flatmap(lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=n, max_size=n))
)
def test_all_to_all_moves_any_number_of_rows(table):
    def move(ctx):
        group, mine = ctx.world.group, table[ctx.world.rank]
        receives = [row[group.rank] for row in table]
        tensor = torch.tensor([[group.rank, to] for to, count in enumerate(mine) for _ in range(count)], dtype=torch.int64)
        tensor = tensor.view(-1, 2)
        output = torch.empty(sum(receives), 2, dtype=torch.int64)
        group.all_to_all(output, tensor, receives, mine)
        return output

    for rank, output in enumerate(simulate(len(table), move)):
        expected = [[source, rank] for source, row in enumerate(table) for _ in range(row[rank])]
        assert output.tolist() == expected


DISAGREEMENTS = {
    "operation": (lambda g: g.all_reduce(torch.zeros(4)), lambda g: g.broadcast(torch.zeros(4)), "all_reduce", "broadcast"),
    "shape": (lambda g: g.all_reduce(torch.zeros(4)), lambda g: g.all_reduce(torch.zeros(2, 2)), r"\[4\]", r"\[2, 2\]"),
    "dtype": (lambda g: g.all_reduce(torch.zeros(4)), lambda g: g.all_reduce(torch.zeros(4).double()), "float32", "float64"),
    "op": (lambda g: g.all_reduce(torch.zeros(4)), lambda g: g.all_reduce(torch.zeros(4), "max"), r"\(sum\)", r"\(max\)"),
    "source": (lambda g: g.broadcast(torch.zeros(4)), lambda g: g.broadcast(torch.zeros(4), 1), r"\(0\)", r"\(1\)"),
    "gathered shape": (
        lambda g: g.all_gather(torch.zeros(3 * g.size), torch.zeros(3)),
        lambda g: g.all_gather(torch.zeros(2 * g.size), torch.zeros(2)),
        r"\[3\]",
        r"\[2\]",
    ),
    "rows": (
        lambda g: g.all_to_all(torch.zeros(g.size), torch.zeros(g.size)),
        lambda g: g.all_to_all(torch.zeros(2 * g.size), torch.zeros(2 * g.size)),
        r"rows \[1, 1, 1\]",
        r"rows \[2, 2, 2\]",
    ),
    "barrier": (lambda g: g.barrier(), lambda g: g.all_reduce(torch.zeros(4)), "barrier", "all_reduce"),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_all_get_an_error_that_names_both_calls(name):
    first, second, *words = DISAGREEMENTS[name]

    everyone_is_there = threading.Barrier(3)

    def run(ctx):
        everyone_is_there.wait()
        with pytest.raises(TransportError) as caught:
            (second if ctx.world.rank == 1 else first)(ctx.world.group)
        return str(caught.value)

    start = time.monotonic()
    for message in simulate(3, run, in_turns=False):
        for word in ("disagree", "rank 1", "axis world", *words):
            assert re.search(word, message), message
    assert time.monotonic() - start < 5


def test_ranks_that_disagree_without_waiting_hear_of_it_at_their_next_call():
    everyone_is_there = threading.Barrier(2)

    def run(ctx):
        everyone_is_there.wait()
        with pytest.raises(TransportError, match=r"all_reduce.*broadcast|broadcast.*all_reduce"):
            call = ctx.dp.group.broadcast if ctx.dp.rank else ctx.dp.group.all_reduce
            call(torch.zeros(2), blocking=False).wait()
        with pytest.raises(TransportError, match="disagree"):
            ctx.dp.group.barrier()

    simulate(2, run, in_turns=False)


def test_a_message_that_does_not_fit():
    def run(ctx):
        with pytest.raises(TransportError, match=r"send.*\[2\] float32.*recv.*\[3\] float32"):
            if ctx.dp.rank == 0:
                ctx.dp.group.send(torch.zeros(2), 1)
            else:
                ctx.dp.group.recv(torch.zeros(3), 0)

    simulate(2, run)


MISUSE = {
    "strided": (lambda g: g.all_reduce(torch.zeros(4, 4).t()[:2]), "not contiguous"),
    "parts": (lambda g: g.all_gather(torch.zeros(5), torch.zeros(2)), r"\[5\] torch.float32 is not 2 times \[2\]"),
    "part dtype": (lambda g: g.reduce_scatter(torch.zeros(2), torch.zeros(4).double()), "not 2 times"),
    "rows": (lambda g: g.all_to_all(torch.zeros(4), torch.zeros(4), [1, 2], [2, 2]), r"4 rows are not 2 blocks"),
    "place": (lambda g: g.broadcast(torch.zeros(4), 2), "place 2 is not one of 0..1"),
    "to itself": (lambda g: g.send(torch.zeros(4), g.rank), "other than this rank's"),
    "reduction": (lambda g: g.all_reduce(torch.zeros(4), "mean"), "op='mean' is not one of sum, max, min"),
}


def misuse(ctx, name):
    try:
        MISUSE[name][0](ctx.world.group)
    except TransportError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", MISUSE)
def test_wrong_arguments_are_refused_before_anything_is_sent(name):
    for run in (simulate, spawn):
        for message in run(2, misuse, name):
            assert re.search(MISUSE[name][1], message), message
            assert "axis world" in message


def test_when_a_rank_dies_all_who_wait_anywhere_get_an_error():
    heard = {}
    everyone_is_there = threading.Barrier(4)

    def run(ctx):
        everyone_is_there.wait()
        if ctx.world.rank == 3:
            time.sleep(0.05)
            raise KeyError("lost")
        try:
            (ctx.tp if ctx.world.rank < 2 else ctx.dp).group.all_reduce(torch.zeros(2))
            ctx.world.group.barrier()
        except TransportError as error:
            heard[ctx.world.rank] = str(error)
            raise

    start = time.monotonic()
    with pytest.raises(KeyError, match="lost"):
        simulate(MeshShape(tp=2, dp=2), run, in_turns=False)
    assert time.monotonic() - start < 5
    assert heard.keys() == {0, 1, 2}
    assert all("rank 3 died: KeyError" in message for message in heard.values())
    assert "all_reduce" in heard[2] and "barrier" in heard[0]


def test_a_deadlock_is_reported_at_once_with_who_waits_where():
    def run(ctx):
        if ctx.world.rank == 0:
            ctx.tp.group.all_reduce(torch.zeros(2))
        elif ctx.world.rank in (1, 2):
            ctx.dp.group.recv(torch.zeros(3), 1 - ctx.dp.rank)

    start = time.monotonic()
    with pytest.raises(TransportError) as caught:
        simulate(MeshShape(tp=2, dp=2), run)
    message = str(caught.value)
    assert time.monotonic() - start < 5
    assert "deadlock" in message
    assert "rank 0 waits in all_reduce(sum) of [2] float32 (number 0 on axis tp, ranks [0, 1])" in message
    assert "rank 1 waits in recv(from 1) of [3] float32 (number 0 on axis dp, ranks [1, 3])" in message
    assert "rank 3 has returned" in message


def test_two_blocking_sends_at_each_other_are_a_deadlock():
    def run(ctx):
        ctx.dp.group.send(torch.zeros(2), 1 - ctx.dp.rank)
        ctx.dp.group.recv(torch.zeros(2), 1 - ctx.dp.rank)

    with pytest.raises(TransportError, match="deadlock"):
        simulate(2, run)


def test_a_rank_that_computes_too_long_is_a_timeout():
    release = threading.Event()
    worlds = MemoryWorld.create(2, timeout_seconds=0.1)
    thread = threading.Thread(target=release.wait)
    thread.start()
    with pytest.raises(TransportError, match=r"timeout: rank 0 has waited for 0.1 s.(.|\n)*rank 1 computes"):
        worlds[0].group("tp", (0, 1)).barrier()
    release.set()
    thread.join()


def test_handles_finish_in_any_order_and_across_groups():
    def run(ctx):
        tensors = [torch.full((2,), float(ctx.world.rank + i)) for i in range(6)]
        groups = [ctx.tp.group, ctx.dp.group, ctx.world.group] * 2
        handles = [group.all_reduce(tensor, blocking=False) for group, tensor in zip(groups, tensors, strict=True)]
        for i in (5, 0, 3, 1, 4, 2):
            handles[i].wait()
        return [t[0].item() for t in tensors]

    tp, dp, everyone = (lambda r: [r & ~1, r | 1]), (lambda r: [r & 1, (r & 1) + 2]), (lambda r: [0, 1, 2, 3])
    for rank, result in enumerate(simulate(MeshShape(tp=2, dp=2), run)):
        expected = [sum(r + i for r in axis(rank)) for i, axis in enumerate([tp, dp, everyone] * 2)]
        assert result == expected


def test_groups_of_the_same_ranks_do_not_mix():
    worlds = MemoryWorld.create(2)
    seen = {}

    def run(world):
        a, b = world.group("a", (0, 1)), world.group("b", (0, 1))
        x, y = torch.ones(1), torch.ones(2)
        first, second = (
            (a.all_reduce(x, blocking=False), b.all_reduce(y, blocking=False))
            if world.rank
            else (
                b.all_reduce(y, blocking=False),
                a.all_reduce(x, blocking=False),
            )
        )
        first.wait(), second.wait()
        seen[world.rank] = (x.tolist(), y.tolist())

    threads = [threading.Thread(target=run, args=(world,)) for world in worlds]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert seen == {0: ([2.0], [2.0, 2.0]), 1: ([2.0], [2.0, 2.0])}


def test_recorder_counts_calls_and_bytes():
    recorders = [Recorder(), Recorder()]

    def run(ctx):
        group = ctx.world.group
        group.all_reduce(torch.zeros(10))
        group.all_reduce(torch.zeros(5, dtype=torch.bfloat16), blocking=False).wait()
        group.all_gather(torch.zeros(8), torch.zeros(4))
        group.reduce_scatter(torch.zeros(4), torch.zeros(8))
        group.barrier()

    simulate(2, run, wrap=lambda world: RecordedWorld(world, recorders[world.rank]))
    for recorder in recorders:
        totals = {key: (total.calls, total.bytes) for key, total in recorder.totals().items()}
        assert totals == {
            ("world", "all_reduce"): (2, 50),
            ("world", "all_gather"): (1, 32),
            ("world", "reduce_scatter"): (1, 32),
            ("world", "barrier"): (1, 0),
        }
        assert recorder.waiting() is None
        recorder.reset()
        assert recorder.totals() == {}


@pytest.mark.parametrize("blocking", [True, False])
def test_recorder_says_who_waits_for_what(blocking):
    recorder = Recorder()
    seen = []

    def run(ctx):
        if ctx.world.rank == 0:
            group = RecordedGroup(ctx.tp.group, recorder)
            group.broadcast(torch.zeros(1), 0)
            handle = group.all_reduce(torch.zeros(2, 3), blocking=blocking)
            handle.wait()
        elif ctx.world.rank == 1:
            ctx.tp.group.broadcast(torch.zeros(1), 0)
            while recorder.waiting() is None or recorder.waiting().operation != "all_reduce":
                time.sleep(0.001)
            seen.append(recorder.waiting())
            ctx.tp.group.all_reduce(torch.zeros(2, 3))

    before = time.monotonic()
    simulate(MeshShape(tp=2), run, in_turns=False)
    (call,) = seen
    assert (call.axis, call.ranks, call.operation, call.sequence) == ("tp", (0, 1), "all_reduce", 1)
    assert (call.shape, call.dtype) == ((2, 3), torch.float32)
    assert before <= call.started <= time.monotonic()
    assert str(call) == "all_reduce of [2, 3] float32 (number 1 on axis tp, ranks [0, 1])"
    assert recorder.waiting() is None


def test_delayed_group_leaves_the_caller_free():
    def run(ctx):
        group = DelayedGroup(ctx.dp.group, 0.4)
        start = time.monotonic()
        handle = group.all_reduce(torch.zeros(2), blocking=False)
        issued = time.monotonic() - start
        time.sleep(0.35)
        handle.wait()
        overlapped = time.monotonic() - start
        group.all_reduce(torch.zeros(2))
        return issued, overlapped, time.monotonic() - start - overlapped

    for issued, overlapped, blocking in simulate(2, run, in_turns=False):
        assert issued < 0.3
        assert 0.4 <= overlapped < 0.7
        assert blocking >= 0.4


def waits_for_nobody(ctx):
    group = TorchWorld(ctx.tp.rank, 2, ctx.device, timeout_seconds=0.5).group("tp", (0, 1))
    if ctx.tp.rank == 0:
        with pytest.raises(TransportError) as caught:
            group.recv(torch.zeros(3), 1)
        return str(caught.value)
    time.sleep(1.5)
    return ""


def test_gloo_calls_time_out():
    message = spawn(MeshShape(tp=2), waits_for_nobody)[0]
    for word in ("recv(from 1) of [3] float32", "axis tp", "ranks [0, 1]", "rank 0", "0.5 s"):
        assert word in message


def test_a_port_in_use_is_said_at_once():
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(TransportError, match=rf"port {port} .*in use.*MASTER_PORT"):
            TorchWorld.connect(0, 2, backend="gloo", rendezvous=Rendezvous(("127.0.0.1", port)), join_seconds=5)
        assert time.monotonic() - start < 4


def test_ranks_that_do_not_come_are_named():
    with pytest.raises(TransportError, match=r"of 3 ranks \[1, 2\] did not come"):
        TorchWorld.connect(0, 3, backend="gloo", rendezvous=Rendezvous(("127.0.0.1", jobs.free_port())), join_seconds=0.5)


def test_a_store_that_nobody_serves():
    with pytest.raises(TransportError, match="cannot reach the store"):
        TorchWorld.connect(1, 2, backend="gloo", rendezvous=Rendezvous(("127.0.0.1", jobs.free_port())), join_seconds=0.5)


def makes_only_its_own_groups(ctx):
    import torch.distributed as dist

    mine = {axis.ranks for axis in (ctx.tp, ctx.dp, ctx.world)}
    return len(dist.distributed_c10d._world.pg_map), len(mine)


def test_a_rank_makes_only_its_own_groups():
    assert spawn(MeshShape(tp=2, dp=2), makes_only_its_own_groups) == [(3, 3)] * 4
