"""What a line of metrics.jsonl says, and the rows of such a file that count.

JSON has no NaN: a value that is not finite is null and the row then has `nonfinite`, which says what it was:
{"step": 7, "loss": null, ..., "nonfinite": {"loss": "nan"}}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepRow:
    """One optimizer update, as in metrics.jsonl."""

    step: int
    """Updates so far, this one included: the first is 1."""
    loss: float
    """Mean over the valid tokens of the global batch, before the update, in nats."""
    token_accuracy: float | None
    """Share of these tokens whose most probable prediction was right."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    tokens: int
    """Tokens consumed since the first step, this one included."""
    tokens_per_second: float
    """Of the whole job, in this step."""
    step_seconds: float
    tflops_per_device: float
    mfu: float | None
    hfu: float | None
    memory_peak_bytes: int
    """Largest so far on this rank."""
    skipped: bool = False
    """The weights were left alone: the gradient was not finite, or train.skip_steps said so."""
    loss_scale: float | None = None
    """Of the next step, in fp16."""
    wait_seconds: float = 0.0
    """In which rank 0 waited for its batch: more than a few thousandths of a step mean that the data cannot keep up."""


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluation on held-out tokens, as in metrics.jsonl."""

    step: int
    """Updates done before it."""
    valid_loss: float
    """Mean over the held-out tokens, in nats."""
    valid_tokens: int
    valid_token_accuracy: float | None
    tokens: int
    """Training tokens consumed before it."""
    eval_seconds: float
    valid_losses: dict[str, float] = field(default_factory=dict)
    """Of each named validation set."""
    cloze_accuracy: float | None = None
    """Share of the blanks of which every token is predicted right; None where there are none."""


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with null for every value that JSON cannot hold, and then `nonfinite`, which says what these were."""
    lost = {key: str(value) for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    kept = {key: None if key in lost else value for key, value in record.items()}
    return {**kept, "nonfinite": lost} if lost else kept


def read_metrics(path: Path | str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a metrics.jsonl that count: (steps, evaluations), each in order of step.

    A run that goes back to an earlier step (a resume) takes back what was written from there on: the last row of a step counts.
    Lines that are no whole JSON object (the end of a file after a crash) are skipped. A file that is not there is an OSError.
    """
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    latest = -1
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                step = int(row["step"])
            except (ValueError, KeyError, TypeError):
                continue
            if "valid_loss" in row:
                evaluations[step] = row
                continue
            if step <= latest:
                steps = {s: r for s, r in steps.items() if s < step}
                evaluations = {s: r for s, r in evaluations.items() if s < step}
            steps[step] = row
            latest = step
    return list(steps.values()), [evaluations[step] for step in sorted(evaluations)]


def perplexity(loss: float) -> float:
    """exp(loss), of at most 20 nats as in Megatron, so that a diverged run still has a number."""
    return math.exp(min(20.0, loss))
