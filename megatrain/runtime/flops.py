"""FLOPs of a token, peak FLOP/s of a device, and utilisation as their quotient (MFU, HFU).

One floating-point multiply and one add are 2 FLOPs. A matrix of n weights costs 2 n FLOPs per token forward and 4 n backward (one matmul
for the gradient of its input, one for that of its weights). Attention has no weights: a query that meets k keys costs 2 a d k for the
scores and 2 a d k for the weighted sum, in each layer, and twice that backward. Per trained token, then,

    model FLOPs = 6 N + 12 L a d k          N = weights that are multiplied: all matrices of the blocks, and the head

with a heads of width d (a d = h) in L layers. Input embeddings are looked up, not multiplied, and norms, activations and the softmax are
not counted, as is usual (PaLM, arXiv:2204.02311 appendix B; Megatron, arXiv:2104.04473 section 5.1).

**Causal attention counts half here**: a query meets its own and earlier keys only, k = s/2 on average, and this is what a causal kernel
computes (with a window or sparse blocks, the keys that are seen). PaLM, nanoGPT, llm-foundry, torchtitan and Megatron up to 2024 count k =
s (`causal_half=False`), which flatters long sequences; comparing with their MFU needs their count. For 8 layers of h = 512 at s = 512 and a
vocabulary of 8192 theirs is 7% higher.

Hardware FLOPs include recomputation, so HFU = MFU where nothing is recomputed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Literal

import torch

from megatrain.config.schema import ModelConfig
from megatrain.kernels.attention_mask import CAUSAL, keys_seen
from megatrain.kernels.matmul import matmul
from megatrain.runtime.distributed import Session, cores_here

Recompute = Literal["none", "selective", "full"]

BACKWARD = 2
"""A backward pass costs twice the forward: each product has a gradient for each of its two factors."""


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """Logical parameters of a GPT, with biases, norms and learned positions; without padding, and a tied head once."""
    h, query, key, f = _widths(model)
    matrices = _block_matrices(model)
    biases = h + (f * (2 if model.gated else 1) + h) if model.bias else 0
    biases += query + 2 * key if model.qkv_biased else 0
    each = 2 if model.norm == "layernorm" and model.bias else 1
    norm, head_norms = h * each, (2 * model.head_size * each if model.qk_norm else 0)
    norms = 4 if model.norm_placement == "sandwich" else 2
    blocks = model.num_layers * (matrices + biases + norms * norm + head_norms)
    tables = {"learned": 1, "learned_2d": 2}.get(model.position, 0)
    positions = tables * model.position_rows * h
    embeddings = vocab_size * h * (1 if model.tied_embeddings else 2)
    others = (model.norm_placement != "post") + model.embedding_norm  # the final norm, and that of the embedding
    return embeddings + positions + blocks + others * norm


def forward_flops(model: ModelConfig, vocab_size: int, causal_half: bool = True) -> tuple[float, float]:
    """FLOPs of the forward pass for one token: (of one block, of the head)."""
    return matrix_flops(model) + _attention(model, causal_half), 2 * model.hidden_size * vocab_size


def matrix_flops(model: ModelConfig) -> float:
    """Forward FLOPs per token of the matrices of one block, which is also what their weight gradients cost."""
    return 2 * _block_matrices(model)


def model_flops_per_token(model: ModelConfig, vocab_size: int, causal_half: bool = True) -> float:
    """FLOPs per trained token, forward and backward, without recomputation (for MFU).

    Matrices are counted exactly (grouped-query keys and values, gated MLP, head, unpadded vocabulary). `causal_half` counts s/2 keys for
    each query, the work of a causal kernel; False counts all s, as PaLM and nanoGPT do.
    """
    block, head = forward_flops(model, vocab_size, causal_half)
    return (1 + BACKWARD) * (model.num_layers * block + head)


def hardware_flops_per_token(
    model: ModelConfig, vocab_size: int, recompute: Recompute = "none", causal_half: bool = True
) -> float:
    """FLOPs per trained token, recomputation included (for HFU).

    `full` runs each whole block again; the head is never recomputed (96 B s L h^2 (1 + s/6h + V/16Lh) of arXiv:2104.04473 with all s keys).
    `selective` runs no matrix product twice here (`models/recompute.py`): the attention products that it costs in arXiv:2205.05198, section
    5, belong to an unfused core.
    """
    attention = _attention(model, causal_half)
    again = {"none": 0.0, "selective": 0.0, "full": 2 * _block_matrices(model) + attention}[recompute]
    return model_flops_per_token(model, vocab_size, causal_half) + model.num_layers * again


def _widths(model: ModelConfig) -> tuple[int, int, int, int]:
    """Widths: h, a d (queries), g d (keys, and as many values), f (MLP)."""
    d = model.head_size
    return model.hidden_size, model.num_attention_heads * d, model.query_groups * d, model.ffn_size


def _block_matrices(model: ModelConfig) -> int:
    """Weights in the matrices of one block: query, key, value, output; up and down, and a gate if there is one."""
    h, query, key, f = _widths(model)
    return h * (query + 2 * key + query) + h * f * (3 if model.gated else 2)


def _attention(model: ModelConfig, causal_half: bool) -> float:
    """Forward FLOPs per token of a layer's two attention products, on average over the layers."""
    layers = Counter(model.windows)
    seen = {window: keys_seen(CAUSAL.within(window, model.sparse), model.seq_length) for window in layers}
    keys = sum(seen[window] * count for window, count in layers.items()) / model.num_layers
    return 4 * model.num_attention_heads * model.head_size * (keys if causal_half else model.seq_length)


@dataclass(frozen=True)
class Peak:
    """The highest speed of one device."""

    flops: float | None
    """FLOP/s; None if unknown, and then there is no MFU."""
    note: str
    """Source of the number, for the start-up line: given, published, measured, or why there is none."""


@dataclass(frozen=True)
class _Published:
    """Dense peaks of one GPU in TFLOP/s, without sparsity, accumulating in FP32; 0 where the data sheet has no number."""

    half: float
    """FP16 and BF16 tensor cores."""
    tf32: float
    fp32: float
    fp64: float
    bf16: bool = True


_H100_SXM = _Published(989.4, 494.7, 67.0, 67.0)
_H100_NVL = _Published(835.5, 417.5, 60.0, 60.0)
_A100 = _Published(312.0, 156.0, 19.5, 19.5)

# The first pattern found in torch.cuda.get_device_name() counts, so special names come before general ones. Sources: NVIDIA's
# data sheets (B200: HGX page), halved where a sheet gives sparsity; for GeForce and RTX A6000 the appendices of the Ada and
# GA102 architecture papers, with FP32 accumulation. A100, H100, H200, L40S and B200 are also in the table of
# stas00/ml-engineering (compute/accelerator).
_PUBLISHED: tuple[tuple[str, _Published], ...] = (
    (r"B200", _Published(2250.0, 1125.0, 75.0, 37.0)),
    (r"H200 NVL|H100 NVL", _H100_NVL),
    (r"H100 PCIe", _Published(756.0, 378.0, 51.0, 51.0)),
    (r"GH200|H200|H100", _H100_SXM),
    (r"A100", _A100),
    (r"A40", _Published(149.7, 74.8, 37.4, 0.0)),
    (r"A30", _Published(165.0, 82.0, 10.3, 10.3)),
    (r"A10", _Published(125.0, 62.5, 31.2, 0.0)),
    (r"RTX A6000", _Published(154.8, 77.4, 38.7, 0.0)),
    (r"L40S", _Published(362.05, 183.0, 91.6, 0.0)),
    (r"L40", _Published(181.05, 90.5, 90.5, 0.0)),
    (r"L4", _Published(121.0, 60.0, 30.3, 0.0)),
    (r"RTX 4090", _Published(165.2, 82.6, 82.6, 0.0)),
    (r"RTX 3090", _Published(71.0, 35.6, 35.6, 0.0)),
    (r"V100-SXM2", _Published(125.0, 0.0, 15.7, 7.8, bf16=False)),
    (r"V100-PCIE", _Published(112.0, 0.0, 14.0, 7.0, bf16=False)),
    (r"T4", _Published(65.0, 0.0, 8.1, 0.0, bf16=False)),
)


def peak_flops(device: torch.device | str, dtype: torch.dtype, override_tflops: float | None = None) -> Peak:
    """Peak of one device for matmuls in `dtype`, as seen by one process; for several use `peak_of_job`.

    It is `override_tflops` (log.peak_tflops) if given, the published dense peak of a known GPU, or on CPU the speed of a matmul here
    (`measure_peak`). Raises ValueError if the override is not positive.
    """
    if override_tflops is not None:
        if override_tflops <= 0:
            raise ValueError(f"log.peak_tflops={override_tflops} is no speed. Use TFLOP/s of one device, such as 312, or null.")
        return Peak(override_tflops * 1e12, "given")
    device = torch.device(device)
    if device.type == "cuda":
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return published_peak(torch.cuda.get_device_name(device), dtype, tf32)
    return Peak(measure_peak(device, dtype), "measured")


def published_peak(name: str, dtype: torch.dtype, tf32: bool = False) -> Peak:
    """Published dense peak of the GPU that torch calls `name`. tf32: whether float32 matmuls may use TF32.

    A GPU or dtype that is not in the table has no peak; the note then says which key sets one.
    """
    for pattern, row in _PUBLISHED:
        if re.search(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", name):
            tflops = {
                torch.bfloat16: row.half if row.bf16 else 0.0,
                torch.float16: row.half,
                torch.float32: row.tf32 if tf32 and row.tf32 else row.fp32,
                torch.float64: row.fp64,
            }.get(dtype, 0.0)
            if tflops:
                return Peak(tflops * 1e12, f"published, {name}")
    short = str(dtype).removeprefix("torch.")
    return Peak(None, f"no published {short} peak of {name!r} is known here: set log.peak_tflops to have MFU")


def peak_of_job(session: Session, dtype: torch.dtype, override_tflops: float | None = None) -> Peak:
    """Peak of one device of a job, the same on every rank (on CPU collective over the world: 32 bytes, about 0.15 s).

    On CPU one rank of each node measures alone, while the others wait: if all measured, each would find less than a device can do,
    and MFU would exceed 100%. If the threads of a node's ranks are more than its cores, each rank gets its share. Raises ValueError as
    `peak_flops` does.
    """
    if override_tflops is not None or session.device.type != "cpu":
        return peak_flops(session.device, dtype, override_tflops)
    lowest, here = float(min(cores_here())), session.launch.local_world_size
    highest, negative = _over_all(session, [lowest, -lowest], "max")  # a barrier too: after it no rank computes
    own = session.launch.cores is not None or highest != -negative  # cores of this rank alone, as SLURM or taskset gave them
    cores = session.launch.cores or len(cores_here()) / (1 if own else here)
    share = min(1.0, cores / torch.get_num_threads())
    mine = here * share * measure_peak(session.device, dtype) if session.launch.local_rank == 0 else 0.0
    flops = _over_all(session, [mine], "sum")[0] / session.world.size
    sharing = "" if share == 1 else f", {share:.2g} of it for each of {here} ranks that share cores"
    return Peak(flops, f"measured by one rank alone{sharing}: {flops / 1e12:.3g} TFLOP/s a rank")


def _over_all(session: Session, numbers: list[float], op: Literal["sum", "max"]) -> list[float]:
    """The sum or maximum of each number over all ranks."""
    message = torch.tensor(numbers, dtype=torch.float64, device=session.device)
    if session.everyone is not None:
        session.everyone.all_reduce(message, op)
    found: list[float] = message.tolist()
    return found


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOP/s of the best square matmul of 256 to 2048 rows found in about `seconds`, in `dtype`, with the present number of threads.

    Sizes take turns, and the next larger one joins while time remains to run it twice: large matmuls are faster, and small ones end before
    other work on the machine interrupts them. The best time counts, since interruptions can only slow a matmul down.
    """
    start, best = perf_counter(), 0.0
    sizes = {256: _multiplication(256, dtype, device)}
    while not best or perf_counter() - start < seconds:
        for n, multiply in sizes.items():
            before = perf_counter()
            multiply()
            took = max(perf_counter() - before, 1e-9)
            best = max(best, 2 * n**3 / took)
        if n < 2048 and perf_counter() - start + 16 * took <= seconds:  # twice the rows are 8 times the work; run twice
            sizes[2 * n] = _multiplication(2 * n, dtype, device)
    return best


def _multiplication(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """A function that multiplies two [n, n] matrices; it has run once, so that kernels are set up and memory is touched."""
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    multiply = partial(matmul, a, b)
    multiply()
    return multiply


@dataclass(frozen=True)
class Speed:
    """Turns tokens per second of the whole job into TFLOP/s per device, MFU and HFU."""

    model_flops: float
    """FLOPs per token of the whole model, independent of the layout."""
    hardware_flops: float
    devices: int
    peak: Peak

    def tflops_per_device(self, tokens_per_second: float) -> float:
        """Model TFLOP/s of each device, without recomputation."""
        return self.model_flops * tokens_per_second / self.devices / 1e12

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOP/s as a share of the peak (arXiv:2204.02311); None if the peak is unknown."""
        return self._share(self.model_flops * tokens_per_second)

    def hfu(self, tokens_per_second: float) -> float | None:
        """FLOP/s with recomputation as a share of the peak; None if the peak is unknown."""
        return self._share(self.hardware_flops * tokens_per_second)

    def doubt(self, tokens_per_second: float) -> str | None:
        """An explanation if a share is above 100%, which is impossible; None otherwise."""
        share = self.hfu(tokens_per_second)
        if share is None or share <= 1:
            return None
        reached = share * (self.peak.flops or 0) / 1e12
        return (
            f"{100 * share:.0f}% of the peak cannot be: the peak of a device ({self.peak.note}) is too low. A measurement is, when "
            f"other programs keep the machine busy meanwhile; log.peak_tflops={reached:.2g} is what was reached now"
        )

    def _share(self, flops_per_second: float) -> float | None:
        return flops_per_second / (self.devices * self.peak.flops) if self.peak.flops else None
