"""The rows of metrics.jsonl: their fields, and which rows of a file count.

JSON has no NaN: a value that is not finite is null, and the row then has `nonfinite` with the value as text:
{"step": 7, "loss": null, ..., "nonfinite": {"loss": "nan"}}.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatrain.files import opened_plain


@dataclass(frozen=True)
class StepRow:
    """One optimizer update, as in metrics.jsonl."""

    step: int
    """Number of updates done, this one included: the first has 1."""
    loss: float
    """Mean loss over the tokens of the global batch that count, before the update, in nats."""
    token_accuracy: float | None
    """Share of these tokens whose most probable prediction is right."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    tokens: int
    """Tokens consumed since the first step, this one included."""
    tokens_per_second: float
    """Speed of the whole job in this step."""
    step_seconds: float
    tflops_per_device: float
    mfu: float | None
    hfu: float | None
    memory_peak_bytes: int
    """Largest memory of rank 0 so far."""
    skipped: bool = False
    """Whether the weights were left unchanged: the gradient was not finite, or train.skip_steps lists the step."""
    loss_scale: float | None = None
    """Loss scale of the next step; fp16 only."""
    wait_seconds: float = 0.0
    """Time for which rank 0 waited for its batch. More than a few thousandths of the step mean that the data cannot keep up."""
    spike: bool = False
    """Whether the loss or a norm of the gradient was beyond its limit, and those of the step before were not."""


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluation on held-out tokens, as in metrics.jsonl."""

    step: int
    """Updates done before the evaluation."""
    valid_loss: float
    """Mean over the held-out tokens, in nats."""
    valid_tokens: int
    valid_token_accuracy: float | None
    tokens: int
    """Training tokens consumed before the evaluation."""
    eval_seconds: float
    valid_losses: dict[str, float] = field(default_factory=dict)
    """Loss of each named validation set."""
    cloze_accuracy: float | None = None
    """Share of the blanks of which every token is predicted right; None without blanks."""


@dataclass(frozen=True)
class TasksRow:
    """Tasks that the running weights were asked (eval.tasks), as in metrics.jsonl."""

    tasks_of_step: int
    """Updates done before; no `step`, as this is no update's row."""
    tokens: int
    """Training tokens consumed before."""
    tasks: dict[str, dict[str, float | None]]
    """Task -> metric -> value; None where it is not finite."""
    tasks_low: dict[str, dict[str, float | None]]
    """Lower ends of the 95% intervals."""
    tasks_high: dict[str, dict[str, float | None]]
    """Their upper ends."""
    task_items: dict[str, int]
    """Items of each task that were asked."""
    task_seconds: float


@dataclass(frozen=True)
class ComputeRow:
    """The ranks' own times in an interval of steps, without their waits for each other, as in metrics.jsonl."""

    compute_of_step: int
    """The last step of the interval; no `step`, as this is no update's row."""
    compute_seconds_min: float
    """Mean seconds a step of the rank that needed least."""
    compute_seconds_median: float
    compute_seconds_max: float
    slowest_rank: int
    """The rank that stands out beside the others of its pipeline stage, or by its stage's past; else the one that took longest."""
    slowest_host: str
    slowest_ratio: float
    """Its time by the median of theirs, or by its stage's past; not a number where neither is known."""


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with null for every value that JSON cannot hold, and if there are any, `nonfinite`: key -> the value as text."""
    lost = {key: str(value) for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    kept = {key: None if key in lost else value for key, value in record.items()}
    return {**kept, "nonfinite": lost} if lost else kept


def read_metrics(path: Path | str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a metrics.jsonl that count: (steps, evaluations), each in order of step.

    When a run goes back to an earlier step (a resume), rows from that step on are replaced by those that follow. Lines that are not a
    whole JSON object (the end of a file after a crash) are skipped. Raises OSError if the file does not exist.
    """
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    latest = -1
    for row in _objects(path):
        try:
            step = int(row["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
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


def read_tasks(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl that have tasks and count, in order of step; as `read_metrics` where a run has gone back."""
    found: dict[int, dict[str, Any]] = {}
    latest = -1
    for row in _objects(path):
        step, tasks = row.get("step"), row.get("tasks_of_step")
        if isinstance(tasks, int) and isinstance(row.get("tasks"), dict):
            found[tasks] = row
        elif isinstance(step, int) and "valid_loss" not in row:
            if step <= latest:
                found = {at: kept for at, kept in found.items() if at < step}
            latest = step
    return [found[at] for at in sorted(found)]


def _objects(path: Path | str) -> Iterator[dict[str, Any]]:
    """The whole JSON objects of a file's lines; other lines are skipped."""
    with io.TextIOWrapper(opened_plain(path), encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def perplexity(loss: float) -> float:
    """exp(loss); a loss above 20 nats counts as 20, as in Megatron, so that a diverged run still has a number."""
    return math.exp(min(20.0, loss))
