"""Launches and bytes of the real training step on a GPU, counted on the meta device: nothing is computed, every shape is the real one.

    python tests/harness/counted_step.py        (prints the table of docs/benchmarks.md)

Counted is what a GPU would run: every operation of torch that is no view (its operands read, its results written, each once), a launch
of a Triton kernel (its arguments, once, or twice where it reads and writes), torch's flash attention forward and backward. Steps of
1 and 2 layers, of 2 and 3 micro-batches, are taken; their differences are what a layer and the ends of a model cost in each
micro-batch after the first.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatrain import assembly, training
from megatrain.config.load import from_dict
from megatrain.config.schema import Config
from megatrain.data.loader import Batch, batch_places, next_token
from megatrain.kernels import dispatch, matmul
from megatrain.models import gpt, layers
from megatrain.parallel.mesh import Axis, ParallelContext

PRODUCTS = {"mm", "addmm", "bmm", "linear", "baddbmm"}
ATTENTION = {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"}
NOT_READ = {"copy_", "zero_", "fill_", "normal_", "uniform_"}
"""Operations that only write what they change."""
BOTH_WAYS = {
    "_gradient_kernel": ("logits",),
    "_adam_kernel": ("masters", "low", "exp_avg", "exp_avg_sq"),
}
"""Arguments of Triton kernels that are read and written."""


@dataclass(frozen=True)
class Tally:
    """Of some stretch: launches besides products and attention, their bytes; products, and bytes of products and attention."""

    passes: int = 0
    passed: int = 0
    products: int = 0
    multiplied: int = 0

    def __sub__(self, other: Tally) -> Tally:
        return Tally(*(mine - theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


def size(x: torch.Tensor) -> int:
    """Bytes of its different elements."""
    different = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        different *= length if stride or length == 0 else 1
    return different * x.element_size()


class Counted(TorchDispatchMode):
    """Counts what runs inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()

    def add(self, name: str, moved: int) -> None:
        """One launch."""
        self.launches[name] += 1
        self.moved[name] += moved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        returns = func._schema.returns
        if name.startswith(("empty", "new_empty", "_unsafe_view", "lift")) or (
            returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        ):
            return result
        written, read = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)], []
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        for argument in func._schema.arguments:
            changed = argument.alias_info is not None and argument.alias_info.is_write
            if changed and (argument.is_out or name in NOT_READ):
                continue
            if name == "addmm" and argument.name == "self" and given.get("beta", 1) == 0:
                continue
            read += [x for x in tree_leaves(given.get(argument.name)) if isinstance(x, torch.Tensor)]
        if name == "embedding":
            read = written
        if written or read:
            self.add(name, sum(size(x) for x in [*written, *read] if x.is_meta))
        return result

    def taken(self) -> Counted:
        """What was counted since the last time."""
        part = Counted()
        part.launches, part.moved, self.launches, self.moved = self.launches, self.moved, Counter(), Counter()
        return part

    def launched(self, kernel: Any) -> Callable[..., None]:
        """What `kernel[grid]` gives."""

        def launch(*args: Any, **kwargs: Any) -> None:
            named = {n: x for n, x in zip(kernel.arg_names, args, strict=False) if isinstance(x, torch.Tensor)}
            different = {id(x): x for x in named.values()}
            twice = [named[n] for n in BOTH_WAYS.get(kernel.fn.__name__, ()) if n in named]
            if named.get("parameters") is not None and named["parameters"] is named.get("masters"):
                twice = [x for x in twice if x is not named["parameters"]] + [named["parameters"]]
            self.add(kernel.fn.__name__.strip("_"), sum(size(x) for x in [*different.values(), *twice]))

        return launch

    def tally(self) -> Tally:
        """So far."""
        heavy = PRODUCTS | ATTENTION
        return Tally(
            sum(n for name, n in self.launches.items() if name not in heavy),
            sum(n for name, n in self.moved.items() if name not in heavy),
            sum(n for name, n in self.launches.items() if name in heavy),
            sum(n for name, n in self.moved.items() if name in heavy),
        )


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _variant: Any = None) -> torch.Tensor:
    """As kernels/attention.py calls torch's fused kernel on a GPU: q [s, b, a, d], k and v [s, b, g, d] -> [s, b, a d]."""
    y = torch.ops.aten._scaled_dot_product_flash_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), 0.0, True)[0]
    return y.permute(2, 0, 1, 3).flatten(2)


class Zeros:
    """A loader of any batch of a config."""

    waited = 0.0

    def __init__(self, config: Config) -> None:
        train = config.train
        self.places = batch_places(train.global_batch_size, train.micro_batch_size, 0, 1)
        self.length = config.model.seq_length + 1

    def sample(self, _n: int) -> Any:
        """Tokens of a sample."""
        return np.zeros(self.length, dtype=np.int64)

    def batch(self, consumed: int) -> Batch:
        """The batch after so many samples."""
        return next_token(self, consumed, self.places)  # type: ignore[arg-type]


@contextmanager
def on_meta(counted: Counted) -> Iterator[None]:
    """The program runs on the meta device as it would on a GPU."""
    kernel = type(dispatch.jit(size))
    with ExitStack() as stack:
        for owner, name, value in (
            (dispatch, "INTERPRETED", True),
            (kernel, "__getitem__", lambda kernel, _grid: counted.launched(kernel)),
            (matmul, "adds_inside", lambda *_: True),
            (layers, "attention", flash),
            (gpt, "initialise", lambda *_: None),
            (assembly, "check_whole", lambda *_, **_named: None),
            (Axis, "start_to_host", lambda *_: None),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


def counted_step(config: Config) -> tuple[Counted, Counted]:
    """One step of a config: (everything before the optimizer, its update)."""
    config = replace(config, train=replace(config.train, kernels="triton"))
    counted = Counted()
    with on_meta(counted):
        run = assembly.assemble(config, ParallelContext.single("meta"), Zeros(config), config.model.vocab_size or 0)  # type: ignore[arg-type]
        parts = []

        @contextmanager
        def apart(phase: training.Phase) -> Iterator[None]:
            if phase == "optimizer":
                parts.append(counted.taken())
            yield
            if phase == "optimizer":
                parts.append(counted.taken())

        run.observers.phase = apart
        with counted:
            training.queue_step(run)
    return parts[0], parts[1]


SHAPES: dict[str, dict[str, Any]] = {
    "124m": {"hidden_size": 768, "num_attention_heads": 12, "vocab_size": 50304, "seq_length": 1024},
    "8b shape": {
        "preset": "llama3_8b",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "ffn_hidden_size": 14336,
        "vocab_size": 128256,
        "seq_length": 4096,
    },
    "1.3b": {"hidden_size": 2048, "num_attention_heads": 16, "vocab_size": 50304, "seq_length": 2048},
}
"""The models of docs/benchmarks/gpu_models.py."""
MICRO_BATCH = {"124m": 32, "8b shape": 1, "1.3b": 4}


def config_of(name: str, layers: int, micro_batches: int) -> Config:
    """A shape with so many layers."""
    size = MICRO_BATCH[name]
    train = {"precision": "bf16", "micro_batch_size": size, "global_batch_size": size * micro_batches}
    tree = {"model": SHAPES[name] | {"num_layers": layers}, "train": train, "parallel": {"device": "cpu"}}
    return from_dict(tree)


@dataclass(frozen=True)
class Costs:
    """Of one shape. A micro-batch: of those after the first, which find gradients to add to."""

    layer: Tally
    """A layer's, in a micro-batch."""
    ends: Tally
    """Embedding, final norm, head and loss, in a micro-batch."""
    update: Tally
    """The optimizer's, of one layer."""
    kinds: Counter[str]
    """Launches of a layer by name."""
    moved: Counter[str]
    """Their bytes."""


def costs(name: str) -> Costs:
    """From the four steps' differences."""
    (one, update), (more, _), (deep, deeper_update), (both, _) = (
        counted_step(config_of(name, layers, micro_batches)) for layers, micro_batches in ((1, 2), (1, 3), (2, 2), (2, 3))
    )
    layer = (both.tally() - deep.tally()) - (more.tally() - one.tally())

    def of_layer(kind: str) -> Counter[str]:
        found = [getattr(part, kind) for part in (one, more, deep, both)]
        each = {n: found[3][n] - found[2][n] - found[1][n] + found[0][n] for n in found[3]}
        return Counter({n: count for n, count in each.items() if count})

    return Costs(
        layer,
        more.tally() - one.tally() - layer,
        deeper_update.tally() - update.tally(),
        of_layer("launches"),
        of_layer("moved"),
    )


if __name__ == "__main__":
    for name in SHAPES:
        found = costs(name)
        print(name)
        for what in ("layer", "ends", "update"):
            print("  ", what, getattr(found, what))
        for kind, count in sorted(found.kinds.items(), key=lambda x: -found.moved[x[0]]):
            print(f"     {kind:36} {count:3} {found.moved[kind] / 1e6:9.1f} MB")
