"""A model that reads pieces of several sequences at a time over paged keys and values, and chooses and scores tokens.

One step is the forward-only schedule with one micro-batch, whose single "sequence" [n, 1] is the pieces' tokens one after the other.
The last stage chooses; what every rank gets is a few numbers for each token that was asked for, never the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, cast

import numpy as np
import torch
from torch.nn import functional

from megatrain.inference.paged_cache import LayerPages, PagedCache, StepPages
from megatrain.inference.requests import Scored
from megatrain.inference.sampling import TokenChoice, choose, without_never
from megatrain.inference.scheduling import StepPiece
from megatrain.kernels.attention_mask import CAUSAL
from megatrain.kernels.matmul import steady_rows
from megatrain.kernels.paged_attention import Pages
from megatrain.models.batch import Loss, MicroBatch, NextToken, Scorer
from megatrain.models.gpt import GPT, Head
from megatrain.parallel.mesh import Axis, ParallelContext, Rows
from megatrain.parallel.param import Postponed
from megatrain.parallel.pipeline_parallel import Chunk as Virtual
from megatrain.parallel.pipeline_parallel import Executed, Parameters, Stage, run_schedule
from megatrain.parallel.schedules import Schedule
from megatrain.transport.host import to_device

LOGIT_ROWS = 256
"""Rows of a prompt whose whole logits are in memory at a time, where the most probable tokens are asked for."""


@dataclass(frozen=True)
class ForwardModel:
    """A model's weights on this rank, as the executor runs them forward."""

    ctx: ParallelContext
    chunks: Sequence[GPT]
    schedule: Schedule
    """The program of one micro-batch, without backwards."""
    parameters: Parameters
    """Where the weights come from, if they lie in shards."""
    alike: Axis = field(default_factory=lambda: Axis("alike"))
    """Replicas that work on the same requests, step by step, as each has a shard of the weights: what the first has found counts."""
    without_gradients: Callable[[], AbstractContextManager[object]] = torch.inference_mode
    """Entered for each step. What is made within torch.inference_mode, gathered weights too, can never be trained with."""


class Read(NamedTuple):
    """The results of a step for one piece."""

    piece: StepPiece
    scored: list[Scored]
    """Tokens of the prompt."""
    drawn: Scored | None
    """The token chosen after the piece."""


class _Wanted(NamedTuple):
    """Rows of a step at which a token is chosen or scored."""

    drawn: list[int]
    choices: list[TokenChoice]
    scored: list[int]
    labels: list[int]
    told: list[int]
    """Rows that are scored and whose most probable tokens are wanted as well."""
    told_labels: list[int]
    top: int
    """Most probable tokens that any of the requests wants to be told."""


class PagedModel:
    """A model with its keys and values in `blocks` blocks of `block` tokens."""

    def __init__(self, weights: ForwardModel, blocks: int, block: int) -> None:
        self.weights, self.block = weights, block
        build = weights.chunks[0].build
        self.layers = [
            [
                LayerPages(blocks * block, *layer.attention.cache_shape, build.dtype, build.device)
                for layer in chunk.stack.blocks
            ]
            for chunk in weights.chunks
        ]
        self.vocab_size = build.vocab_size

    def read(self, pieces: Sequence[StepPiece]) -> list[Read]:
        """Read the pieces, in any order (collective over tp, pp and replicas that are alike). Raises ValueError where logits
        are not finite.

        The result is the same on every rank.
        """
        with self.weights.without_gradients():
            return self._read(pieces)

    def _read(self, pieces: Sequence[StepPiece]) -> list[Read]:
        pieces = sorted(pieces, key=lambda piece: not piece.single)
        device = self.weights.ctx.device
        tokens, positions, inside = to_device(self._rows(pieces), device)
        batch = MicroBatch(
            tokens=tokens,
            labels=tokens,
            loss_weights=torch.zeros(tokens.shape, device=device),
            positions=positions,
            samples=torch.zeros(1, dtype=torch.int64, device=device),
            mask=CAUSAL,
            block_positions=inside,
        )
        wanted = _wanted(pieces)
        stage = self._stage(self._pages(pieces), wanted)
        (numbers,) = run_schedule(stage, self.weights.schedule, [batch], scale=1.0).outputs
        count = len(wanted.drawn) + len(wanted.scored) + len(wanted.told)
        if numbers is None:  # they are another stage's
            numbers = torch.zeros(count, 3 + 2 * wanted.top, dtype=torch.float64, device=device)
        numbers, alike = self.weights.ctx.pp.all_reduce(numbers), self.weights.alike
        numbers = alike.all_reduce(numbers if alike.rank == 0 else torch.zeros_like(numbers))
        return _sorted_out(pieces, wanted, self.weights.ctx.pp.to_host(numbers))

    def _rows(self, pieces: Sequence[StepPiece]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, positions and positions within blanks, [n, 1] each, n `_filled`: zeros stand behind the pieces' tokens."""
        read = np.array([token for p in pieces for token in p.sequence.tokens[p.start : p.end]])
        places = [p.sequence.request.places.positions(p.start, p.end) for p in pieces]
        positions, inside = (np.concatenate(x) for x in zip(*places, strict=True))
        build = self.weights.chunks[0].build
        more = _filled(len(read), build.rows, build.device, build.dtype) - len(read)
        filled = [torch.from_numpy(np.pad(x, (0, more)))[:, None] for x in (read, positions, inside)]
        return filled[0], filled[1], filled[2]

    def _pages(self, pieces: Sequence[StepPiece]) -> StepPages:
        """Where the rows' keys go, and where those that they see lie: of the pieces of a single token, and of the others after them."""
        slots = np.concatenate([self._slots(p) for p in pieces])
        single = sum(piece.single for piece in pieces)
        parts = [(slice(0, single), self._seen(pieces[:single])), (slice(single, len(slots)), self._seen(pieces[single:]))]
        (there,) = to_device([torch.from_numpy(slots)], self.weights.ctx.device)
        return StepPages(there, [(rows, of) for rows, of in parts if rows.start < rows.stop])

    def _seen(self, pieces: Sequence[StepPiece]) -> Pages:
        """The pages of some pieces."""
        table = np.zeros((len(pieces), max((len(p.sequence.blocks) for p in pieces), default=0)), np.int32)
        for place, piece in enumerate(pieces):
            table[place, : len(piece.sequence.blocks)] = piece.sequence.blocks
        ends, prefixes = ([of(p) for p in pieces] for of in (lambda p: p.end, lambda p: p.sequence.request.places.prefix))
        host = [torch.from_numpy(table), *(torch.tensor(x, dtype=torch.int32) for x in (ends, prefixes))]
        there, lengths, prefix = to_device(host, self.weights.ctx.device)
        counts = None if all(piece.single for piece in pieces) else tuple(piece.end - piece.start for piece in pieces)
        return Pages(there, lengths, self.block, counts, prefix if any(prefixes) else None)

    def _slots(self, piece: StepPiece) -> np.ndarray:
        """[m] slots of a piece's tokens, int64."""
        places = np.arange(piece.start, piece.end)
        return np.asarray(piece.sequence.blocks, np.int64)[places // self.block] * self.block + places % self.block

    def _stage(self, pages: StepPages, wanted: _Wanted) -> Stage:
        """This rank's stage of the pipeline; the last stage puts out the numbers that `_sorted_out` reads."""
        chunks = self.weights.chunks
        head = cast(Head, chunks[-1].head)  # on the rank of the last virtual stage, which is the one that is asked for it

        def numbers(hidden: torch.Tensor, batch: MicroBatch) -> Loss:
            return head(hidden, _Numbers(wanted), batch)

        runs = [_over(chunk, layers, pages) for chunk, layers in zip(chunks, self.layers, strict=True)]
        return Stage(self.weights.ctx, runs, numbers, chunks[0].boundary, parameters=self.weights.parameters)


def _over(chunk: GPT, layers: Sequence[LayerPages], pages: StepPages) -> Virtual:
    caches = [PagedCache(layer, pages) for layer in layers]

    def forward(hidden: torch.Tensor | None, batch: MicroBatch, _sums: Executed, _postponed: Postponed | None) -> torch.Tensor:
        return chunk(hidden, batch, caches)

    return forward


def _wanted(pieces: Sequence[StepPiece]) -> _Wanted:
    """The rows at which tokens are chosen and scored."""
    wanted = _Wanted([], [], [], [], [], [], max(p.sequence.request.top or 0 for p in pieces))
    row = 0
    for piece in pieces:
        sequence, request = piece.sequence, piece.sequence.request
        scored, labels = (wanted.told, wanted.told_labels) if request.top else (wanted.scored, wanted.labels)
        for place in piece.scores:
            scored.append(row + place - 1 - piece.start)
            labels.append(request.tokens[place])
        row += piece.end - piece.start
        if piece.draws:
            so_far = (request.tokens, sequence.tokens[len(request.tokens) :]) if request.sampling.penalises else ()
            wanted.drawn.append(row - 1)
            number = request.first_draw + piece.end - len(request.tokens)
            wanted.choices.append(TokenChoice(request.sampling, request.seed, number, *so_far))
    return wanted


@dataclass(frozen=True)
class _Numbers(NextToken):
    """The numbers of a step in the place of a loss: the head is called as in training, and so has its weights."""

    wanted: _Wanted

    def __call__(self, head: Scorer, hidden: torch.Tensor, _batch: MicroBatch) -> Loss:
        """A loss of 0; the numbers are the output."""
        return Loss(hidden.new_zeros(()), output=_numbers(cast(Head, head), hidden, self.wanted))


def _numbers(head: Head, hidden: torch.Tensor, wanted: _Wanted) -> torch.Tensor:
    """Hidden states [n/t or n, 1, h] -> for each row drawn, scored and told: token, log-probability, whether it is the most probable,
    and the `top` most probable ones with theirs; float64 [rows, 3 + 2 top]."""
    parts, hidden = [], head.build.rows.enter(hidden)
    if wanted.drawn:
        logits = _logits(head, hidden, *_sent(hidden.device, wanted.drawn))
        logits = without_never(logits, wanted.choices)
        parts.append(_told(logits, choose(logits, wanted.choices), wanted.top))
    if wanted.scored:
        rows, labels = _sent(hidden.device, wanted.scored, wanted.labels)
        found = head.cross_entropy(_picked(hidden, rows, head.build.rows), _steady(labels, hidden, head.build.rows)[:, None])
        loss, right = (x[: len(rows), 0].double() for x in found)
        parts.append(functional.pad(torch.stack([labels.double(), -loss, right], -1), (0, 2 * wanted.top)))
    if wanted.told:
        rows, labels = _sent(hidden.device, wanted.told, wanted.told_labels)
        for some, of in zip(rows.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True):
            parts.append(_told(_logits(head, hidden, some), of, wanted.top))
    return torch.cat(parts) if parts else hidden.new_zeros(0, 3 + 2 * wanted.top, dtype=torch.float64)


def _sent(device: torch.device, *numbers: Sequence[int]) -> list[torch.Tensor]:
    """Tensors of numbers on the device, for which the host does not wait."""
    return to_device([torch.tensor(x, dtype=torch.int64) for x in numbers], device)


def _logits(head: Head, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The float32 logits [m, v] of rows [m] of the hidden states [n, 1, h]."""
    return head.logits(_picked(hidden, rows, head.build.rows))[: len(rows), 0].float()


def _picked(hidden: torch.Tensor, numbers: torch.Tensor, rows: Rows) -> torch.Tensor:
    """This rank's share of rows [m] of the hidden states [n, 1, h], with others behind them: `_filled`."""
    return rows.of(hidden[_steady(numbers, hidden, rows)])


def _steady(numbers: torch.Tensor, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Numbers [m] of rows of `hidden`, or of labels, with zeros behind them: `_filled`."""
    return functional.pad(numbers, (0, _filled(len(numbers), rows, hidden.device, hidden.dtype) - len(numbers)))


def _filled(count: int, rows: Rows, device: torch.device, dtype: torch.dtype) -> int:
    """The number of rows that a step computes for `count`: `steady_rows`, and as many for each rank of tp where rows are split."""
    shares = rows.tp.size if rows.split else 1
    return shares * steady_rows(-(-count // shares), device, dtype)


def _told(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> torch.Tensor:
    """Logits [n, v] and tokens [n] -> [n, 3 + 2 top], as `_numbers`."""
    logprobs = torch.log_softmax(logits, -1)
    own = logprobs.gather(-1, tokens[:, None])
    greedy = own >= logprobs.amax(-1, keepdim=True)
    best = logprobs.topk(top, -1)
    return torch.cat([x.double() for x in (tokens[:, None], own, greedy, best.indices, best.values)], -1)


def _sorted_out(pieces: Sequence[StepPiece], wanted: _Wanted, numbers: torch.Tensor) -> list[Read]:
    """The numbers [rows, 3 + 2 top] of all pieces, for each piece."""
    if not bool(numbers[:, 1].isfinite().all()):
        raise ValueError("the model's logits are not finite numbers: its training has diverged. Take an earlier checkpoint.")
    rows = iter(numbers.tolist())
    drawn, scored, told = (iter(list(islice(rows, len(x)))) for x in (wanted.drawn, wanted.scored, wanted.told))
    found = []
    for piece in pieces:
        top = piece.sequence.request.top or 0
        labels = [_scored(next(told if top else scored), wanted.top, top) for _ in piece.scores]
        found.append(Read(piece, labels, _scored(next(drawn), wanted.top, top) if piece.draws else None))
    return found


def _scored(row: Sequence[float], most: int, top: int) -> Scored:
    """A row of numbers, of which the `top` first of the `most` most probable tokens are kept."""
    best = tuple(zip(map(int, row[3 : 3 + top]), row[3 + most : 3 + most + top], strict=True))
    return Scored(int(row[0]), row[1], bool(row[2]), best)
