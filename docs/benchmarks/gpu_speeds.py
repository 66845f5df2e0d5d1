"""What the device itself does: copies, matrix products at the shapes of three models, SDPA's backends, sums of products in float32."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from isolated import Note
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatrain.kernels.matmul import add_matmul
from megatrain.kernels.sdpa import Case, Shape, choose

# tokens of a micro-batch, in, out
PRODUCTS = {
    "124m qkv": (32768, 768, 2304),
    "124m up": (32768, 768, 3072),
    "124m head 50257": (32768, 768, 50257),
    "124m head 50304": (32768, 768, 50304),
    "1.3b qkv": (8192, 2048, 6144),
    "1.3b down": (8192, 8192, 2048),
    "1.3b head": (8192, 2048, 50304),
    "8b qkv": (4096, 4096, 6144),
    "8b gate up": (4096, 4096, 28672),
    "8b down": (4096, 14336, 4096),
    "8b head": (4096, 4096, 128256),
}
# b, heads, key heads, s, d
ATTENTIONS = {"124m": (32, 12, 12, 1024, 64), "1.3b": (4, 16, 16, 2048, 128), "8b": (1, 32, 8, 4096, 128)}
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
BACKWARD_OF_ATTENTION = 2.5
"""Five products where the forward has two."""


def seconds_of(call: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """Seconds of a call: on a GPU the least of three means over `rounds` calls in a row, on CPU the median of the calls."""
    if device.type != "cuda":
        call()
        found = []
        for _ in range(rounds):
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
        return statistics.median(found)
    for _ in range(3):
        call()
    found = []
    for _ in range(3):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        for _ in range(rounds):
            call()
        ended.record()
        ended.synchronize()
        found.append(began.elapsed_time(ended) / 1e3 / rounds)
    return min(found)


def copy_speed(device: torch.device, elements: int) -> float:
    """Bytes per second, read and written, of y.copy_(x)."""
    x = torch.empty(elements, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds_of(lambda: y.copy_(x), device)


def matmul_speed(device: torch.device, n: int) -> float:
    """FLOP/s of a bf16 matrix product [n, n] x [n, n]."""
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * n**3 / seconds_of(lambda: a @ b, device)


def versions(device: torch.device) -> dict[str, Any]:
    """Of what the figures depend on."""
    try:
        import triton

        found: dict[str, Any] = {"triton": triton.__version__}
    except ImportError:
        found = {"triton": None}
    found |= {"torch": torch.__version__, "cores": os.cpu_count(), "device": "cpu"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        found |= {"multiprocessors": properties.multi_processor_count, "cudnn": torch.backends.cudnn.version()}
        fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        try:
            asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
            found["nvidia-smi"] = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            found["nvidia-smi"] = repr(error)
    return found


def tried(measure: Callable[[], Any]) -> Any:
    """What it gives, or why it gives nothing."""
    try:
        return measure()
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"[:200]}


def product_row(device: torch.device, tokens: int, inner: int, out: int) -> dict[str, float]:
    """TFLOP/s of the three bf16 products of a matrix: forward, gradient of the input, gradient of the weight."""
    bf16 = {"dtype": torch.bfloat16, "device": device}
    x, dy, weight = torch.randn(tokens, inner, **bf16), torch.randn(tokens, out, **bf16), torch.randn(out, inner, **bf16)
    work = 2 * tokens * inner * out / 1e12
    calls = {"forward": lambda: x @ weight.t(), "input": lambda: dy @ weight, "weight": lambda: dy.t() @ x}
    return {name: work / seconds_of(call, device) for name, call in calls.items()}


def attention_row(device: torch.device, shape: tuple[int, ...], backend: SDPBackend) -> dict[str, float]:
    """TFLOP/s of causal attention, forward and both ways, of q, k, v that are parts of one product, as ours are."""
    b, heads, groups, s, d = shape
    case = Case.of(Shape(s, b, heads, groups, d), torch.bfloat16, device)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (case.q, case.k, case.v))

    def forward() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)

    work = 2 * b * heads * s * s * d / 1e12  # two products, half of each
    with sdpa_kernel(backend):
        alone = seconds_of(forward, device)
        both = seconds_of(case.results, device)
    return {"forward": work / alone, "both": (1 + BACKWARD_OF_ATTENTION) * work / both}


def sums_row(device: torch.device, tokens: int, inner: int, out: int) -> dict[str, Any]:
    """Milliseconds of a weight gradient that is added to float32, in three ways, and the error of torch's own."""
    bf16 = {"dtype": torch.bfloat16, "device": device}
    x, dy, total = torch.randn(tokens, inner, **bf16), torch.randn(tokens, out, **bf16), torch.zeros(out, inner, device=device)

    def inside() -> torch.Tensor:
        return torch.addmm(total, dy.t(), x, out_dtype=torch.float32, out=total)

    row: dict[str, Any] = {
        "product_ms": 1e3 * seconds_of(lambda: dy.t() @ x, device),
        "add_matmul_ms": 1e3 * seconds_of(lambda: add_matmul(total, dy.t(), x), device),
        "addmm_out_dtype": tried(lambda: {"ms": 1e3 * seconds_of(inside, device)}),
    }
    if "ms" in row["addmm_out_dtype"]:
        total.zero_()
        inside()
        exact = dy[:, :64].t().double() @ x.double()
        row["addmm_out_dtype"]["error"] = float((total[:64].double() - exact).abs().max() / exact.abs().max())
    return row


def speeds(note: Note, smoke: bool) -> None:
    """All of it, noted row by row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {"versions": versions(device)}
    note(found)
    found["copy_gb_per_s"] = copy_speed(device, 1 << (16 if smoke else 28)) / 1e9
    found["matmul_tflops"] = matmul_speed(device, 128 if smoke else 8192) / 1e12
    for key in ("sums", "attention", "products"):
        found[key] = {}
    for name, shape in PRODUCTS.items():
        small = tuple(1 + size // 512 for size in shape) if smoke else shape
        found["products"][name] = tried(lambda small=small: product_row(device, *small))
        note(found)
    for name in ("124m up", "1.3b down", "8b gate up"):
        small = (64, 32, 32) if smoke else PRODUCTS[name]
        found["sums"][name] = tried(lambda small=small: sums_row(device, *small))
        note(found)
    for name, real in ATTENTIONS.items():
        small = (1, 4, 4 * real[2] // real[1], 32, 16) if smoke else real
        for backend in BACKENDS:
            row = tried(lambda small=small, backend=backend: attention_row(device, small, backend))
            found["attention"][f"{name}, {backend.name.removesuffix('_ATTENTION').lower()}"] = row
            note(found)
        b, *rest, s, d = small
        shape = Shape(s, b, *rest, d)
        found["attention"][f"{name}, chosen"] = tried(
            lambda shape=shape: {"note": choose(shape, torch.bfloat16, device, False).note}
        )
        note(found)
