"""Speed of a plain PyTorch GPT of nanoGPT's design, the yardstick for megatrain on one CPU or GPU.

    python docs/benchmarks/plain_gpt.py --precision bf16 --threads 2 --steps 10

prints one JSON line: seconds of every timed step, and the median tokens per second. The design is nanoGPT's (learned
positions, fused q|k|v, exact GELU, biases, tied head, cross-entropy over all logits, fused AdamW, bf16 as autocast over float32
weights), written here anew and with nothing of megatrain. Tokens are random. The allocator is what the environment says;
nothing is set here.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from plain_llama import PlainLlama
from torch import nn


class Block(nn.Module):
    """Pre-norm attention and MLP on x [b, s, h]."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.output = nn.Linear(hidden, hidden)
        self.mlp_norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        qkv = self.qkv(self.attention_norm(x)).split(h, dim=2)
        q, k, v = (t.view(b, s, self.heads, h // self.heads).transpose(1, 2) for t in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(b, s, h))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class PlainGPT(nn.Module):
    """Tokens and labels [b, s] to the mean loss."""

    def __init__(self, layers: int, hidden: int, heads: int, vocab: int, seq_length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(seq_length, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.loss(x, labels)

    def loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What stands behind the blocks."""
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    autocast: torch.autocast,
    clip: float,
    around: Callable[[int], AbstractContextManager] = lambda number: nullcontext(),
) -> float:
    """One update on tokens [micro-batches, b, s + 1], each under around(its number); returns the mean loss."""
    total = torch.zeros((), device=tokens.device)
    for number, micro_batch in enumerate(tokens):
        with around(number):
            with autocast:
                loss = model(micro_batch[:, :-1].contiguous(), micro_batch[:, 1:].contiguous()) / len(tokens)
            loss.backward()
        total += loss.detach()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total.item()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW with nanoGPT's settings: only matrices decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)


def compiled(model: PlainGPT | PlainLlama, how: str, backend: str = "inductor") -> nn.Module:
    """The model under torch.compile: `model` as one graph, `blocks` one for all blocks, which are alike, and one for the loss."""
    if how == "model":
        return torch.compile(model, backend=backend)
    if how == "blocks":
        for block in model.blocks:
            block.compile(backend=backend)
        model.loss = torch.compile(model.loss, backend=backend)
    return model


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast over float32 weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="intra-op threads (default: torch's)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock runs")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches accumulated in a step")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="sequences")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--seq-length", type=int, default=512, help="tokens")
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    parser.add_argument("--kind", choices=("gpt", "llama"), default="gpt", help="llama: plain_llama.py")
    parser.add_argument("--groups", type=int, default=8, help="key/value heads of a llama")
    parser.add_argument("--ffn", type=int, default=14336, help="inner width of a llama's MLP")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="model",
        default="none",
        choices=("none", "model", "blocks"),
        help="what torch.compile sees",
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--seed", type=int, default=1234)
    return parser.parse_args(words)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train on random tokens; the measurements."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    shape_of_model = (args.layers, args.hidden, args.heads, args.vocab, args.seq_length)
    with torch.device(args.device):
        made = PlainLlama(*shape_of_model, args.groups, args.ffn) if args.kind == "llama" else PlainGPT(*shape_of_model)
    optimizer = make_optimizer(made)
    model = compiled(made, args.compile, args.backend)
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    shape = (args.micro_batches, args.micro_batch_size, args.seq_length + 1)
    seconds = []
    loss = math.nan
    for step in range(args.warmup + args.steps):
        tokens = torch.randint(args.vocab, shape).to(args.device)
        start = time.perf_counter()
        loss = train_step(model, optimizer, tokens, autocast, args.clip)
        if args.device != "cpu":
            torch.cuda.synchronize()
        if step >= args.warmup:
            seconds.append(time.perf_counter() - start)
    tokens_per_step = args.micro_batches * args.micro_batch_size * args.seq_length
    return {
        "program": f"plain_{args.kind}",
        "precision": args.precision,
        "device": args.device,
        "compile": args.compile,
        "memory": torch.cuda.max_memory_allocated() if args.device != "cpu" else None,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_step": tokens_per_step,
        "step_seconds": [round(s, 4) for s in seconds],
        "tokens_per_second": round(tokens_per_step / statistics.median(seconds), 1),
        "loss": round(loss, 4),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    print(json.dumps(measure(parse())))
