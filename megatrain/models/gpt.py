"""GPT: token embedding, a stack of blocks, a final norm and an output head; as a whole or as one pipeline chunk of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from megatrain.config.schema import ModelConfig
from megatrain.kernels.dispatch import Kernels
from megatrain.kernels.sdpa import STEADY, Fused
from megatrain.models.batch import Loss, MicroBatch, Objective
from megatrain.models.layers import MLP, Attention, Build, Dropout, KeyValueCache, LearnedPositions, Norm, scaled_gradient
from megatrain.models.recompute import Remake, recomputed
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

# The block, and a stack of blocks: what every model family is made of.


class Block(nn.Module):
    """Transformer block: attention, then MLP, each a branch beside the residual stream x. model.norm_placement says where norms are:

    pre        x + dropout(branch(norm(x)))              GPT-2 (arXiv:2002.04745)
    post       norm(x + dropout(branch(x)))              the first Transformer (arXiv:1706.03762)
    sandwich   x + dropout(norm(branch(norm(x))))        CogView (arXiv:2105.13290, section 2.4), Gemma 2
    deepnorm   alpha y + dropout(branch(y)), y = norm(x)   DeepNet (arXiv:2203.00555), as GLM-130B writes it: x itself passes no norm by
    """

    def __init__(self, index: int, build: Build) -> None:
        super().__init__()
        name, self.placement = f"layers.{index}", build.config.norm_placement
        sandwich = self.placement == "sandwich"
        self.attention_norm = Norm(f"{name}.attention_norm", build)
        self.attention = Attention(f"{name}.attention", build)
        self.attention_output_norm = Norm(f"{name}.attention_output_norm", build) if sandwich else None
        self.attention_dropout = Dropout(build, index, "attention")
        self.mlp_norm = Norm(f"{name}.mlp_norm", build)
        self.mlp = MLP(f"{name}.mlp", build)
        self.mlp_output_norm = Norm(f"{name}.mlp_output_norm", build) if sandwich else None
        self.mlp_dropout = Dropout(build, index, "mlp")
        self.recompute, self.dtype = build.recompute, build.dtype
        self.alpha = build.config.residual_scale

    def forward(self, x: torch.Tensor, batch: MicroBatch, cache: KeyValueCache | None = None) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape."""
        if self.recompute == "full":
            return recomputed(lambda x: self._forward(x, batch, cache), x)
        return self._forward(x, batch, cache)

    def _forward(self, x: torch.Tensor, batch: MicroBatch, cache: KeyValueCache | None) -> torch.Tensor:
        post = self.placement == "post"
        h, x = (x, x) if post else self.attention_norm.beside(x)
        bias = self._bias_before_sum(x)
        again = None if post else self._again(self.attention_norm, x)
        y = self.attention(h.to(self.dtype), batch, cache, again, sums_bias=bias is None)
        y = y if self.attention_output_norm is None else self.attention_output_norm(y)
        stream = h if self.placement == "deepnorm" else x
        h, stream, again = self._between(stream, self.attention_dropout(y, batch), bias)
        y = self.mlp(h.to(self.dtype), batch, again)
        y = y if self.mlp_output_norm is None else self.mlp_output_norm(y)
        x = self._sum(stream, self.mlp_dropout(y, batch))
        return self.mlp_norm(x) if post else x

    def _sum(self, stream: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The residual stream with a branch's output."""
        return stream + y if self.alpha == 1 else torch.add(y, stream, alpha=self.alpha)

    def _bias_before_sum(self, x: torch.Tensor) -> torch.Tensor | None:
        """The place of the attention output's bias, where its gradient is summed by the norm between: nothing changes it on the way."""
        unchanged = self.placement == "pre" and not self.attention_dropout.active and x.dtype == self.dtype
        return self.attention.output.bias_place() if unchanged and self.mlp_norm.sums_after(x) else None

    def _between(
        self, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Remake | None]:
        """Of the stream and the first branch's output: what the second reads, the stream there, how to make the first of these again.

        bias: the place of what was added to y last, where its gradient is to be made here.
        """
        if self.placement == "post":
            total = x + y
            x = self.attention_norm(total)
            return x, x, self._again(self.attention_norm, total)
        if self.placement == "deepnorm":
            total = self._sum(x, y)
            x = self.mlp_norm(total)
            return x, x, self._again(self.mlp_norm, total)
        h, x = self.mlp_norm.after_adding(x, y, bias)
        return h, x, self._again(self.mlp_norm, x)

    def _again(self, norm: Norm, x: torch.Tensor) -> Remake | None:
        """How to make a norm's output again, where it is not to be kept."""
        return (lambda: norm(x).to(self.dtype)) if self.recompute == "selective" else None


class Stack(nn.Module):
    """Blocks `layers` (global indices) of a model, in order."""

    def __init__(self, layers: Sequence[int], build: Build) -> None:
        super().__init__()
        self.blocks: Sequence[Block] = nn.ModuleList(Block(index, build) for index in layers)  # type: ignore[assignment]

    def forward(self, x: torch.Tensor, batch: MicroBatch, caches: Sequence[KeyValueCache] | None = None) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape."""
        for index, block in enumerate(self.blocks):
            x = block(x, batch, None if caches is None else caches[index])
        return x


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

    def forward(self, x: torch.Tensor, objective: Objective, batch: MicroBatch) -> Loss:
        """[s/t or s, b, h] -> the objective's loss of them."""
        return objective(self, x, batch)

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
        return self.build.tp.gathered(even)[: self.vocab_size].permute(1, 2, 0)


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
