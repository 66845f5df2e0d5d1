"""Speed of an optimizer step, in interleaved pairs: float32 against torch's fused AdamW, BF16 with masters against the memory's speed.

    python docs/benchmarks/optimizer_speed.py                    # 30 million parameters, on the CPU or, where there is one, the GPU

The bytes that a BF16 step with AdamW must move: gradient 4, master 4 + 4, two states 4 + 4 each, parameter 2: 30 a parameter; with masters
in halves 4 + (2 + 2) + (2 + 2) + 16 = 28. They are held against the speed of y.copy_(x) on arrays as large, which counts 2 bytes a byte.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from megatrain.config.schema import OptimConfig
from megatrain.optim.optimizer import Optimizer
from megatrain.parallel.flat import Unit
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import Parameter, ParamSpec
from megatrain.parallel.zero import FlatParameters
from megatrain.runtime.allocator import tune_allocator

HIDDEN, LAYERS = 512, 9  # 12 h^2 parameters a layer: about 28 million


def shapes() -> list[tuple[str, tuple[int, ...]]]:
    """The matrices and vectors of a small GPT."""
    h = HIDDEN
    layer = {"qkv": (3 * h, h), "o": (h, h), "up": (4 * h, h), "down": (h, 4 * h), "norm": (h,), "bias": (9 * h,)}
    return [(f"{i}.{name}", shape) for i in range(LAYERS) for name, shape in layer.items()]


def ours(dtype: torch.dtype, master: str, device: str) -> tuple[Callable[[], None], int]:
    """(one step, parameters)."""
    ctx = ParallelContext.single(device)
    made = [
        Parameter(torch.randn(shape, dtype=dtype, device=device), ParamSpec(name, shape, decay=len(shape) > 1))
        for name, shape in shapes()
    ]
    flat = FlatParameters([Unit(tuple(made))], ctx)
    flat.grads.normal_()
    optimizer = Optimizer(flat, OptimConfig(master=master))
    one, zero = torch.ones((), dtype=torch.float64, device=device), torch.zeros((), device=device)
    return lambda: optimizer.step(1e-4, one, zero), flat.weights.numel()


def theirs(device: str) -> Callable[[], None]:
    """torch's fused AdamW on the same tensors."""
    tensors = [torch.nn.Parameter(torch.randn(shape, device=device)) for _, shape in shapes()]
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor)
    groups = [
        {"params": [t for t in tensors if t.dim() > 1]},
        {"params": [t for t in tensors if t.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.1, fused=True).step


def seconds(step: Callable[[], None], device: str) -> float:
    """Of one call."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tune_allocator()
    device = args.device
    fp32, count = ours(torch.float32, "fp32", device)
    whole, _ = ours(torch.bfloat16, "fp32", device)
    halves, _ = ours(torch.bfloat16, "split", device)
    x = torch.randn(count, device=device)
    y = torch.empty_like(x)
    sides = {"torch": theirs(device), "fp32": fp32, "bf16": whole, "split": halves, "copy": lambda: y.copy_(x)}
    for step in sides.values():
        step()
        step()
    times = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, step in sides.items():
            times[name].append(seconds(step, device))
    bandwidth = [8 * count / t for t in times["copy"]]
    ratios = {
        "fp32_over_torch_fused": [a / b for a, b in zip(times["torch"], times["fp32"], strict=True)],
        "bf16_over_bytes_at_copy_speed": [30 * count / w / t for w, t in zip(bandwidth, times["bf16"], strict=True)],
        "split_over_bytes_at_copy_speed": [28 * count / w / t for w, t in zip(bandwidth, times["split"], strict=True)],
    }
    print(
        json.dumps(
            {
                "parameters": count,
                "device": device,
                "threads": torch.get_num_threads(),
                "milliseconds": {name: round(1e3 * statistics.median(t), 2) for name, t in times.items()},
                "copy_gb_per_second": round(statistics.median(bandwidth) / 1e9, 1),
                **{name: [round(f(r), 3) for f in (min, statistics.median, max)] for name, r in ratios.items()},
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
