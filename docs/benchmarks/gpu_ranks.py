"""Several ranks on one device over gloo, against one process: losses, gradients, weights."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_models import device_name
from isolated import Isolated, Note, isolated

from megatrain.config.load import from_dict, load_overrides
from megatrain.parallel.mesh import ParallelContext
from megatrain.program import prepare_torch
from megatrain.runtime.distributed import connect
from megatrain.runtime.launch import Launch
from megatrain.testing.agree import agree
from megatrain.testing.trace import mesh_shape, trace_run

STEPS = 3
MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 32,
    "vocab_size": 101,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "position": "rope",
    "bias": False,
    "tied_embeddings": False,
    "init_std": 0.1,
}
LAYOUTS = {
    "tp2-sp": ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"),
    "dp2-zero3": ("parallel.zero_stage=3",),
    "pp2-zb_h1": ("parallel.pipeline_parallel_size=2", "parallel.schedule=zb_h1"),
    "dp2-zero1": ("parallel.zero_stage=1",),
    "pp2-1f1b": ("parallel.pipeline_parallel_size=2", "parallel.schedule=1f1b"),
    "dp2-zero2": ("parallel.zero_stage=2",),
    "pp2-zb_v": ("parallel.pipeline_parallel_size=2", "parallel.schedule=zb_v", "parallel.virtual_pipeline_size=2"),
}
"""Most telling first."""


def ranks_agree(note: Note, folder: Path, seconds: float, smoke: bool) -> None:
    """Each layout, in float32 and float64, against one process: its largest deviations, or where it disagrees."""
    layouts = dict(list(LAYOUTS.items())[:2]) if smoke else LAYOUTS
    found: dict[str, Any] = {}
    isolated_single = isolated(folder / "ranks_single", seconds / 3, _trace, folder / "single.pt", ())
    if isolated_single.problem is not None:
        raise RuntimeError(f"one process: {isolated_single.problem}\n{isolated_single.said}")
    single = torch.load(folder / "single.pt", weights_only=False)
    for name, words in layouts.items():
        found[name] = _layout(folder, name, words, single, seconds / 3)
        note(found)
    (folder / "single.pt").unlink()
    if bad := [name for name, row in found.items() if "problem" in row]:
        sys.exit(f"not as one process: {', '.join(bad)}")


def _layout(folder: Path, name: str, words: tuple[str, ...], single: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Two ranks of a layout: its deviations by precision, or the first problem."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    file = folder / f"{name}.pt"
    ranks = [Isolated(folder / f"ranks_{name}_{rank}", seconds, _trace, file, words, rank, 2, port) for rank in range(2)]
    ended = [rank.finish() for rank in ranks]
    for rank, outcome in enumerate(ended):
        if outcome.problem is not None:
            return {"problem": f"rank {rank}: {outcome.problem}", "said": outcome.said[-800:]}
    row: dict[str, Any] = {}
    for precision, trace in torch.load(file, weights_only=False).items():
        try:
            row[precision] = max(agree(single[precision], trace, optimizer="sgd").values())
        except AssertionError as error:
            row["problem"] = f"{precision}: {error}"[:300]
    file.unlink()
    return row


def _trace(note: Note, file: Path, words: tuple[str, ...], rank: int = 0, size: int = 1, port: int = 0) -> None:
    """One rank: rank 0 keeps the traces by precision."""
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    tree = {
        "model": MODEL,
        "parallel": {"device": device_name(), "backend": "gloo"},
        "optim": {"name": "sgd", "lr": 0.1, "warmup_steps": 0},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "steps": STEPS},
    }
    config = load_overrides(from_dict(tree), words)
    session = connect(Launch.from_environment(os.environ), config.parallel, 30.0)
    traces = {}
    for precision, kernels in (("fp32", "auto"), ("fp64", "reference")):  # Triton's statistics are float32
        run = load_overrides(config, [f"train.precision={precision}", f"train.kernels={kernels}"])
        prepare_torch(run.train)
        ctx = ParallelContext.build(session.world, mesh_shape(run, size // (2 if _model_ranks(run) else 1)), session.device)
        traces[precision] = trace_run(ctx, run, STEPS)
    session.close()
    if rank == 0:
        torch.save(traces, file)
    note("done")


def _model_ranks(config: Any) -> bool:
    """Whether the two ranks of a layout hold one model together."""
    return config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size > 1
