"""What a rank does for a world of 16,384 ranks, from the start of a job to its end: the figures of docs/scale.md.

    python docs/benchmarks/scale.py                    # all parts: under 2 minutes on 2 cores
    python docs/benchmarks/scale.py groups manifest    # some

One rank is made in a world that only pretends to be large; stores, files and torchrun's rendezvous are real ones. Each part
prints one JSON line. Times are of this machine, bytes and counts of any.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from base64 import b64encode
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# torch's store looks up the name of whoever connects: a resolver that drops a question should not hold a measurement for 5 s.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # handlers in one process need no server each

import torch
import torch.distributed as dist
from pretended_world import LIMIT, RANKS, SHAPE, Counted, Pretended, Served, timed
from scale_checkpoint import manifest, publish
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, _NodeDesc, _RendezvousState
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatrain.doctor.measure import Report, look, neighbours
from megatrain.doctor.rules import judge
from megatrain.lifecycle.blame import Identity, State, Verdict
from megatrain.lifecycle.guard import STORE_SECONDS, Guard
from megatrain.lifecycle.sections import SectionLimits
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.records.log import LogDisplay, RunLog
from megatrain.records.rows import StepRow
from megatrain.runtime.launch import Launch
from megatrain.runtime.slurm import expand_nodes
from megatrain.transport.board import Board
from megatrain.transport.processes import TorchWorld
from megatrain.transport.store import meet_all
from megatrain.transport.wrappers import Call, Recorder

NODES, RANK = RANKS // 8, 61
SIZES = (64, 1024, RANKS)
CPU = torch.device("cpu")
PREFIX = "guard/megatrain-0"


# --- start ------------------------------------------------------------------------------------------------------------


def groups() -> dict[str, Any]:
    """Groups of one rank, how many members they have in all, and what it takes to make them."""
    shapes = {
        "tp 8 x pp 16 x dp 128": SHAPE,
        "tp 8 x cp 2 x pp 16 x dp 64, ep 8": MeshShape(8, 2, 64, 16, 8),
        "tp 8 x dp 2048": MeshShape(tp=8, dp=2048),
        "dp 16384": MeshShape(dp=RANKS),
        "the first, 64 ranks": MeshShape(tp=2, pp=4, dp=8),
    }
    rows = {}
    for name, shape in shapes.items():
        world = Pretended(RANK, shape.world)
        seconds, _ = timed(lambda world=world, shape=shape: ParallelContext.build(world, shape))
        tracemalloc.start()
        kept = ParallelContext.build(Pretended(RANK, shape.world), shape)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        rows[name] = {"groups": len(world.made), "members": sum(map(len, world.made)), "seconds": seconds, "bytes": size}
        del kept
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    seconds, _ = timed(lambda: ParallelContext.build(TorchWorld(RANK, RANKS, CPU, 600.0), SHAPE))
    dist.destroy_process_group()
    return rows | {"with torch's own lists, but no connection": {"seconds": seconds}}


class CountedGuard(Guard):
    """A guard whose board counts."""

    store: Any

    def _open_board(self, ranks: int = 1) -> Board:
        return Board(self.store, STORE_SECONDS)


def guard_of(size: int, store: Any, rank: int = RANK) -> CountedGuard:
    """The guard of one rank of a world."""
    launch = Launch(rank=rank, local_rank=rank % 8, world_size=size, local_world_size=8, master_addr="node0", master_port=1)
    guard = CountedGuard(launch, SectionLimits(600.0, 600.0, 600.0))
    guard.store = store
    guard.meet()
    session: Any = SimpleNamespace(everyone=None, recorder=Recorder())
    guard.join(session)
    return guard


def state_of(rank: int, size: int) -> State:
    """What a rank says that waits for all others."""
    call = Call("world", tuple(range(size)), "all_reduce", 7, 0.0, (4,), torch.float64)
    return State.waiting(
        rank, call, 605.0, '  File "/work/megatrain/training.py", line 180, in train_step\n    run.flat.reduce()\n' * 6
    )


def join() -> dict[str, Any]:
    """What one rank asks of the store, by size of the world."""
    rows: dict[str, Any] = {}
    for size in SIZES:
        inner = dist.HashStore()
        for key in ("all here", "all leave"):
            inner.set(key, "")
        for rank in (0, RANK + 1):
            Board(inner, STORE_SECONDS).write(f"identity/{rank}", Identity.own(rank).text())
        store = Counted(inner)
        meet_all(store, RANK, size, LIMIT)
        row = {"join": store.taken()}
        guard_of(size, store).leave()
        row["guard, from start to end"] = store.taken()
        TorchWorld(RANK, size, CPU, 600.0, store)._linger()
        row["leave"] = store.taken()
        inner.add("alarms", 1)
        Board(inner, STORE_SECONDS).write("verdict", Verdict("hang", (7,), "rank 7 is frozen").as_json())
        guard = guard_of(size, store)
        store.taken()
        guard._agree_on_verdict(state_of(RANK, size))
        row["alarm"] = store.taken()
        rows[str(size)] = row
    return rows


WORKER = """
import os
from megatrain.config.schema import ParallelConfig
from megatrain.runtime.distributed import connect
from megatrain.doctor.measure import Report, look, neighbours
from megatrain.doctor.rules import judge
from megatrain.lifecycle.guard import Guard
from megatrain.lifecycle.sections import SectionLimits
from megatrain.runtime.launch import Launch
launch = Launch.from_environment(os.environ)
port = f":{int(os.environ['MASTER_PORT']):04X}"
with Guard(launch, SectionLimits(60.0, 60.0, 60.0)) as guard:
    session = connect(launch, ParallelConfig(device="cpu"), 60.0, met=guard.meet)
    guard.join(session)
    links = (os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}"))
    mine = {link[8:-1] for link in links if link.startswith("socket:")}
    rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/self/net/{name}").readlines()[1:]]
    print("connections", sum(row[9] in mine and row[2].endswith(port) for row in rows), flush=True)
    guard.leave()
    session.close()
"""


def connections() -> dict[str, Any]:
    """Connections to the store that a rank of a real job of 3 processes holds."""
    with Served() as free:
        port = free.port
    ranks = []
    for rank in range(3):
        env = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
        }
        env |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        ranks.append(subprocess.Popen([sys.executable, "-c", WORKER], env=os.environ | env, stdout=subprocess.PIPE, text=True))
    texts = [rank.communicate()[0] for rank in ranks]
    each = max(int(text.split()[-1]) for text in texts)
    return {"a rank": each, "the server": each * RANKS}


def store() -> dict[str, Any]:
    """Processor time of a real store's one thread for a connection and for a message."""
    few, many = 96, 4000
    with Served() as server:
        before = server.seconds()
        clients = [server.client() for _ in range(few)]
        connection = (server.seconds() - before) / few
        before, client = server.seconds(), clients[0]
        for n in range(many):
            client.set(f"{PREFIX}/state/{n}", "x" * 700)
        client.add("answered", 1)  # a set has no answer
        message = (server.seconds() - before) / many
    return {"seconds a connection": round(connection, 6), "seconds a message of 700 bytes": round(message, 6)}


def torchrun() -> dict[str, Any]:
    """The state that torchrun's c10d rendezvous keeps of its nodes: its size, and what each node moves of it."""
    rows: dict[str, Any] = {str(nodes): _rendezvous(nodes) for nodes in (4, 16, 64)}
    whole = _RendezvousState()
    whole.complete, now = True, datetime.now(timezone.utc)
    for node in range(NODES):
        whole.participants[_NodeDesc(node_name(node), 100_000 + node, 0)] = node
    whole.last_heartbeats = dict.fromkeys(whole.participants, now)
    size = len(b64encode(pickle.dumps(whole)))
    # Without a single conflict: a node reads it once a second, and every 5 s sends what it was and what it is, and is sent what it became.
    return rows | {
        str(NODES): {"bytes of the state": size, "bytes a node and second, at least": round(0.8 * size + 3 * size / 5)}
    }


def node_name(node: int) -> str:
    """As long as names of nodes are."""
    return f"gpu-node-{node:04d}.cluster.local"


def _rendezvous(nodes: int, watched_seconds: float = 10.5) -> dict[str, Any]:
    inner = dist.HashStore()
    stores = [Counted(inner, latency_seconds=0.001) for _ in range(nodes)]
    handlers: list[Any] = [None] * nodes

    def meet(node: int) -> None:
        backend = C10dRendezvousBackend(stores[node], "job")
        handlers[node] = DynamicRendezvousHandler.from_backend("job", stores[node], backend, nodes, nodes, node_name(node))
        handlers[node].next_rendezvous()

    threads = [threading.Thread(target=meet, args=(node,)) for node in range(nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    joined = [counted.taken() for counted in stores]
    end = time.monotonic() + watched_seconds
    while time.monotonic() < end:  # as the launchers do: each asks ten times a second whether a node waits
        for handler in handlers:
            handler.num_nodes_waiting()
        time.sleep(0.1)
    later = [counted.taken() for counted in stores]
    for handler in handlers:
        handler._stop_heartbeats()
    mean: Callable[..., float] = lambda rows: round(sum(rows) / nodes, 1)  # noqa: E731
    return {
        "bytes of the state": len(inner.get("torch.rendezvous.job")),
        "attempts a node": mean(row["of them"]["compare_set"] for row in joined),
        "bytes a node, to join": mean(row["bytes"] for row in joined),
        "bytes a node and second, later": mean(row["bytes"] / watched_seconds for row in later),
    }


def open_files() -> int:
    """Of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def gloo() -> dict[str, Any]:
    """Sockets of a rank, and bytes that it reads of the store, for one group of gloo."""
    rows = {}
    for size in (4, 8, 16, 32):
        inner, made = dist.HashStore(), [None] * size
        stores = [Counted(inner) for _ in range(size)]
        before = open_files()

        def make(rank: int, size: int = size, stores: Any = stores, made: Any = made) -> None:
            made[rank] = dist.ProcessGroupGloo(stores[rank], rank, size, LIMIT)  # type: ignore[attr-defined]

        threads = [threading.Thread(target=make, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rows[str(size)] = {"files a rank": (open_files() - before) / size, "bytes a rank": stores[0].bytes}
        made.clear()
    n = RANKS  # a text of 157 + 8 n bytes of each of n ranks, fitted to the above
    return rows | {str(n): {"files a rank": n + 3, "bytes a rank": n * (157 + 8 * n)}}


def alarm() -> dict[str, Any]:
    """The judge of a hang of all ranks: rank 7 is frozen, the others wait for it. With a real store."""
    with Served() as server:
        client = dist.PrefixStore(PREFIX, server.client())
        ranks = [rank for rank in range(RANKS) if rank != 7]
        text = state_of(RANK, RANKS).text()
        texts = [text.replace(f'"rank": {RANK}', f'"rank": {rank}', 1) for rank in ranks]
        board = Board(client, STORE_SECONDS)
        for rank, said in zip(ranks, texts, strict=True):
            board.write(f"state/{rank}", said)
        for rank in (0, 7, RANK + 1):
            board.write(f"identity/{rank}", Identity.own(rank).text())
        counted = Counted(client)
        guard = guard_of(RANKS, counted)
        counted.taken()
        seconds, (verdict, _) = timed(lambda: guard._agree_on_verdict(state_of(RANK, RANKS)))
        taken = counted.taken()
    size = len(verdict.as_json())
    return {
        "bytes of a state": len(text),
        "seconds of the judge": seconds,
        "bytes of the verdict": size,
        "culprits": verdict.culprits,
        **taken,
    }


# --- what is written, and the rest ------------------------------------------------------------------------------------


def logs() -> dict[str, Any]:
    """Bytes that rank 0 writes in 1000 steps; no other rank writes any."""
    row = StepRow(
        1, 2.3456789, 0.5123456, 0.8123456, 1.23456e-4, 10**12, 8e6, 12.3456789, 412.3456, 0.4123456, 0.5123456, 70 * 2**30
    )
    with tempfile.TemporaryDirectory() as folder:
        with RunLog(folder, LogDisplay(1001, watched=False), total_steps=1000, sequence_length=2048, world_size=RANKS) as log:
            log.say = lambda text: None  # type: ignore[method-assign]
            for step in range(1, 1001):
                log.step(StepRow(**{**asdict(row), "step": step}))
            log.event("save", 1000, path="/shared/run/checkpoints/step_00001000", seconds=12.345)
        sizes = {
            "tensorboard" if "tfevents" in path.name else path.name: path.stat().st_size
            for path in Path(folder).rglob("*")
            if path.is_file()
        }
    names, nodes = timed(lambda: expand_nodes(f"gpu-[0001-{NODES:04d}]"))
    return sizes | {"names of the nodes": {"seconds": names, "bytes": len("".join(nodes))}}


def doctor() -> dict[str, Any]:
    """What `megatrain doctor` moves and does for all ranks: each tells rank 0 through the store, where rank 0 reads all."""
    report = Report(RANK, node_name(7), 8)
    with tempfile.TemporaryDirectory() as folder:
        look(report, CPU, Path(folder), os.environ)
    text = json.dumps(asdict(report))
    keys = [f"1 from {rank}" for rank in range(RANKS)]
    with Served() as server:
        client = server.client()
        for key in keys:
            client.set(key, text)
        reading, texts = timed(lambda: client.multi_get(keys))
    parsing, reports = timed(lambda: [Report(**{**json.loads(said), "rank": rank}) for rank, said in enumerate(texts)])
    judging, _ = timed(lambda: judge(reports, 0, 3))
    nodes = [node_name(rank // 8) for rank in range(RANKS)]
    pairing, _ = timed(lambda: neighbours(nodes, RANK))
    return {
        "bytes a rank tells": len(text),
        "seconds of rank 0 to read, parse, judge": [reading, parsing, judging],
        "names of all nodes, on every rank": {"bytes": sum(len(node) + 1 + 8 for node in nodes), "seconds": pairing},
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    part.__name__: part for part in (groups, join, connections, store, torchrun, gloo, alarm, manifest, publish, logs, doctor)
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all")
    asked = parser.parse_args().parts or list(PARTS)
    torch.set_num_threads(1)
    for name in asked:
        seconds, row = timed(PARTS[name])
        print(json.dumps({name: row, "took": round(seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
