"""Does a GLM use what stands right of a blank? Trains it on the quickstart's corpus beside the same model that sees the left alone.

    python docs/benchmarks/glm_context.py --data runs/quickstart/data_* --steps 600 --seed 1 --out runs/glm_context

    both   the model as it is: part A sees all of itself, part B all of part A
    left   part A is causal, and what fills a blank sees only the text left of it, and its own beginning

Both take the same steps on the same blanks. Then every held-out document is judged by both, with the same blanks, and the difference is
reported beside its standard error over documents, and beside the entropy of the targets' own frequencies. One JSON object a seed.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import megatrain
from megatrain.config.load import load
from megatrain.data.draws import Draws
from megatrain.data.indexed import TokenStore
from megatrain.data.samples.glm import Drawn, GlmBatches, assembled
from megatrain.data.samples.infilling import InfillingText
from megatrain.job import Job
from megatrain.kernels.attention_mask import AttentionMask
from megatrain.models.batch import MicroBatch
from megatrain.program import train
from megatrain.training import to_micro_batches

ROOT = Path(__file__).resolve().parents[2]
SIZES = [
    "model.num_layers=4",
    "model.hidden_size=256",
    "model.num_attention_heads=4",
    "model.seq_length=128",
    "optim.warmup_steps=30",
]
FIXED = ["data.glm.objective_mix={blank: 1.0, sentence: 0.0, document: 0.0}", "parallel.tensor_parallel_size=1"]
FIXED += ["parallel.sequence_parallel=false", "train.precision=bf16", "train.global_batch_size=32", "train.micro_batch_size=16"]
FIXED += ["checkpoint.resume=never", "checkpoint.save_every=0", "log.to=[]"]


@dataclass(frozen=True, eq=False)
class LeftOnly(AttentionMask):
    """What a blank sees of the text ends where the blank stands."""

    blank: torch.Tensor = field(kw_only=True)
    """[s, b] number of the blank that each token of part B fills; 0 in part A."""
    at: torch.Tensor = field(kw_only=True)
    """[s, b] place of that blank in part A."""

    @property
    def uniform(self) -> bool:
        """Every sequence has its own."""
        return False

    def seen_by_all(self, start: int) -> int:
        """Nothing is certain."""
        return 0

    def allowed(self, queries: torch.Tensor, keys: torch.Tensor, sequences: torch.Tensor | None = None) -> torch.Tensor:
        """[n, q, k] as AttentionMask has it."""
        of = slice(None) if sequences is None else sequences
        mine, theirs = self.blank[queries][:, of].t()[:, :, None], self.blank[keys][:, of].t()[:, None, :]
        at = self.at[queries][:, of].t()[:, :, None]
        text = (theirs == 0) & ((mine == 0) | (keys[None, None, :] <= at))
        return (keys[None, :] <= queries[:, None]) & (text | ((mine > 0) & (mine == theirs)))


def left_only(batch: MicroBatch) -> MicroBatch:
    """The batch seen from the left alone."""
    blank = (batch.second_positions == 1).cumsum(0) * (batch.second_positions > 0)
    return replace(batch, mask=LeftOnly(blank=blank, at=batch.positions))


def main() -> None:
    """Train, judge, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train, valid and tokenizer.json")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/glm_context")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    judged = {variant: trained(options, variant) for variant in ("both", "left")}
    report = compare(judged, options)
    (options.out / f"seed_{options.seed}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def trained(options: argparse.Namespace, variant: str) -> np.ndarray:
    """[documents, 2] summed loss of a trained variant on every held-out document, and its targets."""
    log = options.out / f"{variant}_{options.seed}"
    overrides = [f"data.train={options.data / 'train'}", f"data.valid={options.data / 'valid'}", f"log.dir={log}"]
    overrides += [
        f"data.tokenizer={options.data / 'tokenizer.json'}",
        f"train.steps={options.steps}",
        f"train.seed={options.seed}",
    ]
    overrides += [f"train.eval_every={max(1, options.steps // 10)}", "train.eval_batches=8", f"log.every={options.steps // 10}"]
    job = megatrain.build(ROOT / "launch/configs/glm_tiny.yaml", [*SIZES, *FIXED, *overrides])
    if variant == "left":
        for chunk in job.chunks:
            chunk.register_forward_pre_hook(lambda _module, given: (given[0], left_only(given[1]), *given[2:]))
    try:
        train(job)
        return judge(job, options.data / "valid")
    finally:
        job.close()


@torch.inference_mode()
def judge(job: Job, prefix: Path) -> np.ndarray:
    """[documents, 2] summed loss and targets of every held-out document; the same blanks for every model of a seed."""
    blanks: Any = next(iter(job.held_out.values()))
    compose, store = GlmBatches(blanks.plan), TokenStore(prefix)
    size, found = blanks.plan.text_length - 1, np.zeros((store.documents, 2))
    (chunk,) = job.chunks
    chunk.eval()
    for document in range(store.documents):
        tokens = np.asarray(store.document(document), np.int64)
        rows: list[list[InfillingText]] = []
        for window, begin in enumerate(range(0, tokens.size, size)):
            piece = tokens[begin : begin + size]
            text = compose.documents(piece, np.zeros(piece.size, np.int64))
            rows.append(compose.lay_out(Draws(7, document, window), text, Drawn(0)))
        for first in range(0, len(rows), 16):
            part = rows[first : first + 16]
            places = np.arange(len(part))[None]
            (batch,) = to_micro_batches(assembled(part, [0] * len(part), places, blanks.plan), job)
            loss, _ = chunk.head.cross_entropy(chunk(None, batch), batch.labels)
            found[document] += float((loss * batch.loss_weights).sum()), float(batch.loss_weights.sum())
    return found


def targets_entropy(options: argparse.Namespace) -> float:
    """Nats a target of the held-out targets' own frequencies: what no model without context falls below."""
    overrides = [*SIZES, *FIXED, f"data.train={options.data / 'train'}", f"data.valid={options.data / 'valid'}"]
    overrides += [f"data.tokenizer={options.data / 'tokenizer.json'}", f"train.seed={options.seed}", f"log.dir={options.out}"]
    config = load(ROOT / "launch/configs/glm_tiny.yaml", overrides).config
    job = megatrain.build(config)
    try:
        (judged,) = job.held_out.values()
        batch = judged.batch(0, np.arange(len(judged))[:, None])
        counts = np.bincount(batch.labels[batch.loss_weights > 0])
    finally:
        job.close()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def compare(judged: dict[str, np.ndarray], options: argparse.Namespace) -> dict[str, Any]:
    """Losses, and the paired difference over documents that have targets."""
    counted = judged["both"][:, 1] > 0
    means = {variant: of[counted, 0] / of[counted, 1] for variant, of in judged.items()}
    difference = means["left"] - means["both"]
    return {
        "seed": options.seed,
        "steps": options.steps,
        "documents": int(counted.sum()),
        "loss": {variant: float(of[:, 0].sum() / of[:, 1].sum()) for variant, of in judged.items()},
        "unigram_entropy": targets_entropy(options),
        "difference": float(difference.mean()),
        "standard_error": float(difference.std(ddof=1) / math.sqrt(difference.size)),
    }


if __name__ == "__main__":
    main()
