"""GPT: token embedding, a stack of blocks, a final norm and an output head; as a whole or as one pipeline chunk of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from megatrain.config.schema import ModelConfig
from megatrain.kernels.dispatch import Kernels
from megatrain.kernels.sdpa import STEADY, Fused
from megatrain.models.attention import KeyValueCache
from megatrain.models.batch import MicroBatch
from megatrain.models.layers import Build, Dropout, Norm, scaled_gradient
from megatrain.models.objective import Objective
from megatrain.models.position import LearnedPositions
from megatrain.models.transformer import Stack
from megatrain.parallel.collectives import gathered
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import Parameter, initialise
from megatrain.parallel.vocabulary import (
    Target,
    VocabParallelEmbedding,
    capped,
    vocab_parallel_logits,
    vocab_parallel_loss,
    vocab_parameter,
)


class Embedding(nn.Module):
    """Token embedding plus learned positions, normalised where asked for, with dropout."""

    def __init__(self, vocab_size: int, build: Build) -> None:
        super().__init__()
        self.build = build
        self.tokens = VocabParallelEmbedding(
            "embedding.tokens",
            vocab_size,
            build.config.hidden_size,
            build.tp,
            sequence_parallel=build.sequence_parallel,
            init=build.embedding_init,
            dtype=build.dtype,
            device=build.device,
            tied=build.tied_over,
        )
        learned = build.config.learned_positions
        self.positions = LearnedPositions("embedding.positions", build) if learned else None
        two = build.config.position == "learned_2d"
        self.block_positions = LearnedPositions("embedding.block_positions", build) if two else None
        self.norm = Norm("embedding.norm", build) if build.config.embedding_norm else None
        self.dropout = Dropout(build, "embedding")

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Tokens [s, b] -> [s/t or s, b, h], of the residual stream's dtype."""
        x = scaled_gradient(self.tokens(batch.tokens), self.build.config.embedding_grad(batch.step))
        x = x.to(self.build.residual_dtype)
        if self.positions is not None:
            x = self.positions(x, batch.positions)
        if self.block_positions is not None:
            x = self.block_positions(x, batch.second_positions)
        if self.norm is not None:
            x = self.norm(x)
        return self.dropout(x, batch)


class Head(nn.Module):
    """Final norm and output matrix: turns hidden states into losses or logits without gathering logits in training."""

    def __init__(self, vocab_size: int, build: Build, tied: Parameter | None) -> None:
        super().__init__()
        self.build, self.vocab_size = build, vocab_size
        # With post-norm blocks the last one's output is normalised already.
        self.norm = Norm("final_norm", build) if build.config.norm_placement != "post" else None
        self.weight = _head_weight(vocab_size, build) if tied is None else tied

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """[s/t or s, b, h] -> what the output matrix is multiplied with."""
        return (x if self.norm is None else self.norm(x)).to(self.build.dtype)

    def local_logits(self, x: torch.Tensor) -> torch.Tensor:
        """[s/t or s, b, h] -> logits [s, b, v_local] of this rank's ids."""
        logits = vocab_parallel_logits(self.normed(x), self.weight, self.build.tp, self.build.sequence_parallel)
        return capped(logits, self.build.config.logit_softcap)

    def forward(
        self, x: torch.Tensor, objective: Objective, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[s/t or s, b, h] -> what the objective makes of them: (summed loss, weight predicted right, [2] blanks right and blanks)."""
        loss = objective(self, x, batch)
        none = torch.zeros(2, dtype=torch.float64, device=x.device)
        return loss.total, loss.correct, none if loss.blanks is None else loss.blanks

    def cross_entropy(
        self, x: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[s/t or s, b, h], labels [s, b] -> (loss [s, b] in nats, whether the label had the largest logit [s, b])."""
        build = self.build
        target = Target(label_smoothing, z_loss, build.config.logit_softcap)
        return vocab_parallel_loss(
            self.normed(x), labels, self.weight, build.tp, build.sequence_parallel, target, build.loss_chunk, build.kernels
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[s/t or s, b, h] -> whole logits [s, b, v] without padding, on every rank; no gradient."""
        local = self.local_logits(x)
        most = self.weight.spec.slices(self.build.tp.size, 0)[0].stop  # of the first rank; the last may have fewer
        even = local.new_zeros(most, *local.shape[:2])
        even[: local.shape[-1]] = local.permute(2, 0, 1)
        return gathered(even, self.build.tp)[: self.vocab_size].permute(1, 2, 0)


def _head_weight(vocab_size: int, build: Build) -> Parameter:
    """The head's own matrix, or its copy of the embedding's."""
    h, of = build.config.hidden_size, (vocab_size, build.config.hidden_size, build.tp)
    if build.config.tied_embeddings:
        return vocab_parameter(
            "embedding.tokens", *of, build.embedding_init, build.dtype, build.device, tied=build.tied_over, part="embedding"
        )
    return vocab_parameter("head.weight", *of, build.init(h, vocab_size), build.dtype, build.device, part="head")


class GPT(nn.Module):
    """The blocks `layers` of a GPT, with the embedding where `first` and the head where `last`."""

    def __init__(
        self,
        vocab_size: int,
        build: Build,
        layers: Sequence[int],
        *,
        first: bool = True,
        last: bool = True,
        embedding: Embedding | None = None,
    ) -> None:
        """embedding: that of another chunk on this rank, whose matrix a tied head shares."""
        super().__init__()
        self.build, self.vocab_size = build, vocab_size
        self.embedding = Embedding(vocab_size, build) if first else None
        self.stack = Stack(layers, build)
        source = embedding or self.embedding
        tied = source.tokens.weight if source is not None and build.config.tied_embeddings else None
        self.head = Head(vocab_size, build, tied) if last else None

    def forward(self, x: torch.Tensor | None, batch: MicroBatch, caches: Sequence[KeyValueCache] | None = None) -> torch.Tensor:
        """Hidden states of the chunk before (None for the first) -> this chunk's [s/t or s, b, h]."""
        if self.embedding is not None:
            x = self.embedding(batch)
        return self.stack(x, batch, caches)

    def boundary(self, batch: MicroBatch) -> torch.Tensor:
        """Room for what travels between virtual stages: [s/t or s, b, h], not filled."""
        rows, sequences = batch.tokens.shape
        build = self.build
        rows //= build.tp.size if build.sequence_parallel else 1
        return torch.empty(rows, sequences, build.config.hidden_size, dtype=build.residual_dtype, device=build.device)

    def units(self) -> list[nn.Module]:
        """What is used at one time, in the order of the forward pass: embedding, blocks, head."""
        parts = [self.embedding, *self.stack.blocks, self.head]
        return [part for part in parts if part is not None]

    def logical_parameters(self) -> list[Parameter]:
        """Every parameter once, in the order of the forward pass."""
        return [p for p in self.parameters() if isinstance(p, Parameter)]


def build_gpt(
    config: ModelConfig,
    vocab_size: int,
    ctx: ParallelContext,
    pieces: Sequence[Sequence[int]],
    homes: Sequence[int],
    *,
    sequence_parallel: bool,
    dtype: torch.dtype,
    seed: int,
    recompute: Literal["none", "selective", "full"] = "none",
    loss_chunk: int = 0,
    kernels: Kernels = "auto",
    compile: bool = False,
    fused: tuple[Fused, ...] = STEADY,
) -> list[GPT]:
    """This rank's chunks of the model, weights drawn from `seed`: the same logical tensors under every layout.

    pieces: the layers of each virtual stage; homes: the stage where each lies.
    """
    apart = config.tied_embeddings and homes[0] != homes[-1]
    build = Build(
        config,
        ctx.tp,
        sequence_parallel,
        dtype,
        ctx.device,
        seed,
        recompute,
        "ends" if apart else None,
        loss_chunk,
        kernels,
        compile,
        fused,
    )
    chunks: list[GPT] = []
    for virtual, layers in enumerate(pieces):
        if homes[virtual] == ctx.pp.rank:
            embedding = chunks[0].embedding if chunks else None
            first, last = virtual == 0, virtual == len(pieces) - 1
            chunks.append(GPT(vocab_size, build, layers, first=first, last=last, embedding=embedding))
    for parameter in logical_parameters(chunks):
        initialise(parameter, ctx.tp, seed)
    return chunks


def logical_parameters(chunks: Sequence[GPT]) -> list[Parameter]:
    """Every parameter of a rank's chunks once, in the order of the forward pass."""
    return list(dict.fromkeys(p for chunk in chunks for p in chunk.logical_parameters()))
