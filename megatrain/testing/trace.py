"""Train a few steps on one rank of any layout and record everything that must agree between layouts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from megatrain.assembly import assemble
from megatrain.config.budget import budget_of
from megatrain.config.schema import Config, CorpusConfig
from megatrain.data.boundaries import Beginning, Ending, NamedToken
from megatrain.data.draws import hash64, hash64_each
from megatrain.data.loader import Compose, Loader
from megatrain.data.samples.sentinels import NAMES
from megatrain.data.sources import source_of
from megatrain.data.tokenizers.token_ids import EncodedTexts
from megatrain.models.batch import Objective
from megatrain.models.gpt import MakeBlock, gpt_block
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.param import ParamSpec
from megatrain.testing.agree import Trace
from megatrain.training import Run, train_step
from megatrain.transport.consensus import gather_texts

ANY_DATA = (CorpusConfig(path="none: tokens are random"),)
"""A value for data.train, required by the rules between keys, in runs on random tokens."""


class RandomSamples:
    """Endless random samples: tokens [seq_length + 1] below `vocab_size`, a pure function of (seed, n)."""

    def __init__(self, vocab_size: int, seq_length: int, seed: int = 0, document_length: int = 3) -> None:
        """document_length: mean number of tokens of a document."""
        self.vocab_size, self.seq_length, self.seed, self.document_length = vocab_size, seq_length, seed, document_length

    def sample(self, n: int) -> npt.NDArray[np.int64]:
        """Tokens of sample n."""
        return (self._hashes(1, n) % np.uint64(self.vocab_size)).astype(np.int64)

    def document_numbers(self, n: int) -> npt.NDArray[np.int64]:
        """Number of the document that each token belongs to, [seq_length + 1]."""
        begins = self._hashes(2, n) % np.uint64(self.document_length) == 0
        begins[0] = False
        return np.cumsum(begins, dtype=np.int64)

    def _hashes(self, purpose: int, n: int) -> npt.NDArray[np.uint64]:
        """[seq_length + 1] random 64-bit numbers of sample n."""
        start = np.uint64(hash64(hash64(self.seed + purpose) ^ n))
        return hash64_each(start + np.arange(self.seq_length + 1, dtype=np.uint64))

    def pairs(self, n: int) -> None:
        """None: the samples are text, not prompts with answers."""


def mesh_shape(config: Config, data_parallel_size: int = 1) -> MeshShape:
    """The mesh that `config.parallel` describes, with `data_parallel_size` replicas."""
    p = config.parallel
    sides = p.tensor_parallel_size, p.context_parallel_size, data_parallel_size, p.pipeline_parallel_size
    return MeshShape(*sides, zero_ranks=p.zero_ranks)


def trace_run(
    ctx: ParallelContext,
    config: Config,
    steps: int = 5,
    *,
    objective: Objective | None = None,
    block: MakeBlock = gpt_block,
    prepare: Callable[[Run], None] | None = None,
    between: Callable[[int, Run], Run] | None = None,
) -> Trace:
    """Take `steps` steps of `config` on random tokens (model.vocab_size must be given); returns the whole logical trace, on every rank.

    `block` makes the block of each layer. `prepare` is called with the run before the first step; `between` before each step, with its
    number and the run, and returns the run to continue with. Collective over the world of `ctx`.
    """
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        raise ValueError("model.vocab_size is null, and a traced run has no tokenizer to ask. Set model.vocab_size=101.")
    samples, compose = random_source(config, vocab_size)
    sizes = (budget_of(config).batch_size, config.train.micro_batch_size, ctx.dp.rank, ctx.dp.size)
    with Loader(samples, *sizes, compose=compose) as loader:
        run = assemble(config, ctx, loader, vocab_size, objective=objective, block=block)
        if prepare is not None:
            prepare(run)
        gradients: dict[str, torch.Tensor] = {}
        reports = []
        for step in range(steps):
            run = run if between is None else between(step, run)
            if step == 0:
                run.observers.before_update.append(partial(_keep_first_gradients, gradients))
            reports.append(train_step(run))
    weights, *states = (_whole_of_all(ctx, kind) for kind in run.optimizer.tensors().values())
    return Trace(
        losses=[r.loss for r in reports],
        grad_norms=[r.grad_norm for r in reports],
        gradients=gradients,
        weights=weights,
        states=dict(zip(run.optimizer.kinds, states, strict=True)),
        learning_rate=config.optim.lr,
        dtype=config.train.precision,
    )


def random_source(config: Config, vocab_size: int) -> tuple[RandomSamples, Compose]:
    """Random text for a config, and the function that composes its batches; every seventh token ends a sentence.

    Raises ValueError if the vocabulary has no tokens left for text beside GLM's special tokens.
    """
    source = source_of(config, vocab_size, AnyTokens(vocab_size), closed=False)
    if source.text_vocab < 1:
        raise ValueError(
            f"model.vocab_size={vocab_size} leaves no token for text beside GLM's special tokens. Use model.vocab_size="
            f"{vocab_size - source.text_vocab + 1} or more."
        )
    length = 3 if config.data.objective == "next_token" else max(3, source.sample_length // 2)
    return RandomSamples(source.text_vocab, source.sample_length, config.train.seed, length), source.compose


class AnyTokens:
    """A tokenizer for random tokens; the last ids of the vocabulary are left to GLM's special tokens."""

    eod: int | None = None
    ending, beginning = Ending(None), Beginning(None)
    divisible = False
    label = identity = "any tokens"
    named_tokens: Sequence[NamedToken] = ()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size - len(NAMES)

    def special_id(self, name: str) -> int | None:
        """None: no token has a name."""
        return None

    def name_of(self, token: int) -> str:
        """The token's id as text."""
        return str(token)

    def encode(self, text: str) -> list[int]:
        """No tokens, whatever the text."""
        return []

    encode_inside = encode

    def encode_batch(self, texts: Sequence[str]) -> EncodedTexts:
        """No tokens for any text."""
        return EncodedTexts(np.zeros(0, np.int64), np.zeros(len(texts), np.int64))

    def decode(self, ids: Iterable[int]) -> str:
        """Text with a full stop for every id that 7 divides."""
        return "".join("." if number % 7 == 0 else "x" for number in ids)

    def unfinished(self, ids: Sequence[int]) -> int:
        """0: every token is a whole character."""
        return 0


def round_weights(run: Run) -> None:
    """Round a float32 run's weights to those of a bfloat16 run. For `prepare` of `trace_run`, on one process."""
    with torch.no_grad():
        for parameter in run.flat.parameters:
            parameter.copy_(parameter.to(torch.bfloat16))


def _keep_first_gradients(gradients: dict[str, torch.Tensor], run: Run) -> None:
    """Fill `gradients` with the logical gradients of the first step. Observes a run before its update, which may overwrite them."""
    if not gradients:
        local = run.flat.whole([(local, local.own_grads) for local in run.flat.trained])
        gradients.update(_whole_of_all(run.ctx, local))


def _whole_of_all(ctx: ParallelContext, local: Mapping[str, tuple[ParamSpec, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The logical tensors of all stages, on every rank. Collective over the ranks of one replica."""
    shapes = {name: (spec.shape, str(tensor.dtype)) for name, (spec, tensor) in local.items()}
    texts = gather_texts(json.dumps(shapes), ctx.pp.group, ctx.device)
    everywhere = {name: what for text in texts for name, what in json.loads(text).items()}
    sizes = [math.prod(shape) for shape, _ in everywhere.values()]
    message = torch.zeros(sum(sizes), dtype=torch.float64, device=ctx.device)  # all in one sum; it holds any float exactly
    found = {}
    for (name, (shape, dtype)), piece in zip(everywhere.items(), message.split(sizes), strict=True):
        logical = piece.view(shape)
        if name in local:
            _fill(logical, ctx, *local[name])
        found[name] = logical, getattr(torch, dtype.removeprefix("torch."))
    ctx.pp.all_reduce(ctx.tp.all_reduce(message))
    # A copy each: a pickled view takes its whole storage along, here that of all the others.
    return {name: logical.to("cpu", dtype, copy=True) for name, (logical, dtype) in found.items()}


def whole(ctx: ParallelContext, spec: ParamSpec, local: torch.Tensor) -> torch.Tensor:
    """The logical tensor of `spec` on the CPU, put together from every tensor-parallel rank's `local`. Collective over tp."""
    logical = torch.zeros(spec.shape, dtype=local.dtype, device=local.device)
    _fill(logical, ctx, spec, local)
    return ctx.tp.all_reduce(logical).cpu()


def _fill(logical: torch.Tensor, ctx: ParallelContext, spec: ParamSpec, local: torch.Tensor) -> None:
    """Copy the elements that this rank owns to their place in `logical`."""
    if spec.owned(ctx):
        slices = spec.slices(ctx.tp.size, ctx.tp.rank)
        logical[slices] = local[tuple(slice(0, s.stop - s.start) for s in slices)]
