"""The choice of the next tokens from their logits, for many sequences at a time, each in its own way.

Token n of an answer is drawn with a number that is a function of (seed, n), by the inverse of the distribution in the order of token
ids: a text depends neither on its neighbours in a batch nor on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatrain.inference.requests import Sampling
from megatrain.parallel import rng
from megatrain.transport.host import to_device


@dataclass(frozen=True)
class TokenChoice:
    """How the token of one row is chosen."""

    sampling: Sampling
    seed: int
    number: int
    """The token's number in its answer."""
    prompt: Sequence[int] = ()
    """The prompt's tokens; read where there are penalties."""
    answer: Sequence[int] = ()
    """The answer's tokens so far; read where there are penalties."""


def choose(logits: torch.Tensor, choices: Sequence[TokenChoice]) -> torch.Tensor:
    """Logits [n, v] -> token ids [n], on their device; nothing waits for it. Rows with logits that are not finite have no meaning."""
    logits = _changed(logits.float(), choices)
    ids = logits.argmax(-1)
    drawn = [row for row, choice in enumerate(choices) if not choice.sampling.greedy]
    if drawn:
        (rows,) = _sent(logits.device, drawn)
        ids = ids.index_copy(0, rows, _draw(logits[rows], [choices[row] for row in drawn]))
    return ids


def without_never(logits: torch.Tensor, choices: Sequence[TokenChoice]) -> torch.Tensor:
    """Logits [n, v] with those of tokens that are never chosen at -inf: they are not in the distribution at all."""
    barred = {choice.sampling.never for choice in choices}
    for never in barred - {()}:
        rows = [row for row, choice in enumerate(choices) if choice.sampling.never == never]
        at, never_at = _sent(logits.device, rows, never)
        logits = logits.index_put((at[:, None], never_at[None, :]), logits.new_full((), -torch.inf))
    return logits


def probabilities(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Logits [n, v] after bias and penalties -> probabilities [n, v] of what may be drawn."""
    device = logits.device
    temperature, least = _sent(device, [float(s.temperature) for s in samplings], [float(s.min_p or 0) for s in samplings])
    logits = logits.sub(logits.amax(-1, keepdim=True)).div_(temperature[:, None])
    cut = [row for row, s in enumerate(samplings) if s.top_k is not None or s.top_p is not None]
    if cut:
        (rows,) = _sent(device, cut)
        logits = logits.index_copy(0, rows, _cut(logits[rows], [samplings[row] for row in cut]))
    p = torch.softmax(logits, -1)
    if any(s.min_p for s in samplings):
        p = torch.where(p >= least[:, None] * p.amax(-1, keepdim=True), p, 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def _sent(device: torch.device, *numbers: Sequence[float]) -> list[torch.Tensor]:
    """Tensors of numbers on the device, for which the host does not wait."""
    return to_device([torch.tensor(x) for x in numbers], device)


def _draw(logits: torch.Tensor, choices: Sequence[TokenChoice]) -> torch.Tensor:
    """Logits [n, v] -> drawn ids [n]."""
    p = probabilities(logits, [choice.sampling for choice in choices])
    drawn = torch.tensor([_uniform(choice.seed, choice.number) for choice in choices], dtype=torch.float64)
    (numbers,) = to_device([drawn], logits.device)
    sums = p.cumsum(-1, dtype=torch.float64)
    whole = sums[:, -1:].contiguous()
    found, last = torch.searchsorted(sums, numbers[:, None] * whole, right=True), torch.searchsorted(sums, whole)
    # The last token that adds to the sum, where rounding leads beyond it; some token, where the sum is no number.
    return torch.minimum(found, last)[:, 0].clamp_max(p.shape[-1] - 1)


def _uniform(seed: int, number: int) -> float:
    """A number from 0 to below 1, of 53 bits."""
    key = rng.key(seed, "token", number)
    return (((key.first & 0xFFFFFFFF) << 21) | ((key.second & 0xFFFFFFFF) >> 11)) * 2.0**-53


def _cut(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Logits [n, v] with those beyond top-k and top-p at -inf; of equal ones the lowest id is kept first."""
    size, device = logits.shape[-1], logits.device
    most, share = _sent(
        device, [min(s.top_k or size, size) for s in samplings], [1.0 if s.top_p is None else float(s.top_p) for s in samplings]
    )
    order = torch.sort(logits, dim=-1, descending=True, stable=True)
    ranks = torch.arange(size, device=device)
    ordered = order.values.masked_fill(ranks >= most[:, None], -torch.inf)
    p = torch.softmax(ordered, -1)
    beyond = (p.cumsum(-1) - p >= share[:, None]) & (share[:, None] < 1)
    return torch.empty_like(logits).scatter_(-1, order.indices, ordered.masked_fill(beyond, -torch.inf))


def _changed(logits: torch.Tensor, choices: Sequence[TokenChoice]) -> torch.Tensor:
    """Logits [n, v] with penalties and bias."""
    rows: list[int] = []
    columns: list[int] = []
    divided: list[float] = []
    added: list[float] = []
    for row, choice in enumerate(choices):
        sampling = choice.sampling
        change: dict[int, list[float]] = {}
        if sampling.penalises:
            repeated = set(choice.answer) if sampling.repetition_penalty == 1 else {*choice.prompt, *choice.answer}
            change = {token: [sampling.repetition_penalty, 0.0] for token in repeated}
            for token in choice.answer:
                change[token][1] -= sampling.frequency_penalty
            for token in set(choice.answer):
                change[token][1] -= sampling.presence_penalty
        for token, bias in sampling.logit_bias:
            change.setdefault(token, [1.0, 0.0])[1] += bias
        for token, (penalty, bias) in change.items():
            rows.append(row)
            columns.append(token)
            divided.append(penalty)
            added.append(bias)
    if rows:
        at_rows, at_columns, penalties, biases = _sent(logits.device, rows, columns, divided, added)
        at, value = (at_rows, at_columns), logits[at_rows, at_columns]
        logits = logits.index_put(at, torch.where(value > 0, value / penalties, value * penalties) + biases)
    return logits
