"""GPT: token embedding, a stack of blocks, a final norm and an output head; as a whole or as one pipeline chunk of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from megatrain.models.batch import Loss, MicroBatch, Objective
from megatrain.models.layers import (
    MLP,
    Attention,
    Build,
    Cache,
    Dropout,
    LearnedPositions,
    Mixer,
    Norm,
    scaled_gradient,
)
from megatrain.models.recompute import recomputed
from megatrain.parallel.param import Parameter, ParamSpec, initialise
from megatrain.parallel.tensor_parallel import Remake
from megatrain.parallel.vocabulary import Target, VocabParallelEmbedding, VocabParallelHead, vocab_parameter


class Block(nn.Module):
    """Transformer block: attention, then MLP, each a branch beside the residual stream x. model.norm_placement says where norms are:

    pre        x + dropout(branch(norm(x)))              GPT-2 (arXiv:2002.04745)
    post       norm(x + dropout(branch(x)))              the first Transformer (arXiv:1706.03762)
    sandwich   x + dropout(norm(branch(norm(x))))        CogView (arXiv:2105.13290, section 2.4), Gemma 2
    deepnorm   alpha y + dropout(branch(y)), y = norm(x)   DeepNet (arXiv:2203.00555), as GLM-130B writes it: x itself passes no norm by
    """

    def __init__(self, index: int, build: Build, mixer: Mixer, mlp: nn.Module) -> None:
        """index: of the layer in the whole model, from 0; mixer, mlp: its two branches."""
        super().__init__()
        name, self.placement = f"layers.{index}", build.config.norm_placement
        sandwich = self.placement == "sandwich"
        self.attention_norm = Norm(f"{name}.attention_norm", build)
        self.attention = mixer
        self.attention_output_norm = Norm(f"{name}.attention_output_norm", build) if sandwich else None
        self.attention_dropout = Dropout(build, index, "attention")
        self.mlp_norm = Norm(f"{name}.mlp_norm", build)
        self.mlp = mlp
        self.mlp_output_norm = Norm(f"{name}.mlp_output_norm", build) if sandwich else None
        self.mlp_dropout = Dropout(build, index, "mlp")
        self.recompute, self.dtype = build.recompute, build.dtype
        self.alpha = build.config.residual_scale

    def forward(self, x: torch.Tensor, batch: MicroBatch, cache: Cache | None = None) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape."""
        if self.recompute == "full":
            return recomputed(lambda x: self._forward(x, batch, cache), x)
        return self._forward(x, batch, cache)

    def _forward(self, x: torch.Tensor, batch: MicroBatch, cache: Cache | None) -> torch.Tensor:
        post = self.placement == "post"
        h, x = (x, x) if post else self.attention_norm.beside(x)
        bias = self._bias_before_sum(x)
        remake = None if post else self._remake(self.attention_norm, x)
        y = self.attention(h.to(self.dtype), batch, cache, remake, bias is None)
        y = y if self.attention_output_norm is None else self.attention_output_norm(y)
        residual = h if self.placement == "deepnorm" else x
        h, residual, remake = self._after_attention(residual, self.attention_dropout(y, batch), bias)
        y = self.mlp(h.to(self.dtype), batch, remake)
        y = y if self.mlp_output_norm is None else self.mlp_output_norm(y)
        x = self._sum(residual, self.mlp_dropout(y, batch))
        return self.mlp_norm(x) if post else x

    def _sum(self, residual: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The residual stream with a branch's output added."""
        return residual + y if self.alpha == 1 else torch.add(y, residual, alpha=self.alpha)

    def _bias_before_sum(self, x: torch.Tensor) -> torch.Tensor | None:
        """The proxy of attention's output bias, where the MLP's norm sums its gradient: nothing changes the output on the way."""
        unchanged = self.placement == "pre" and not self.attention_dropout.active and x.dtype == self.dtype
        return self.attention.bias_proxy() if unchanged and self.mlp_norm.sums_after(x) else None

    def _after_attention(
        self, residual: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Remake | None]:
        """Residual stream and attention's output -> (input of the MLP, residual stream beside it, how that input is made again).

        bias: the proxy of the bias in y, where the gradient of that bias is made here.
        """
        if self.placement in ("post", "deepnorm"):
            norm, total = self.attention_norm if self.placement == "post" else self.mlp_norm, self._sum(residual, y)
            h = norm(total)
            return h, h, self._remake(norm, total)
        h, residual = self.mlp_norm.after_adding(residual, y, bias)
        return h, residual, self._remake(self.mlp_norm, residual)

    def _remake(self, norm: Norm, x: torch.Tensor) -> Remake | None:
        """How to make a norm's output again, where it is not to be kept."""
        return (lambda: norm(x).to(self.dtype)) if self.recompute == "selective" else None


MakeBlock = Callable[[int, Build], Block]
"""Makes the block of a layer, by its index in the whole model: which mixer and which MLP it has."""


def gpt_block(index: int, build: Build) -> Block:
    """Attention, with a window where model.window_pattern says so, and an MLP."""
    name, window = f"layers.{index}", build.config.windows[index]
    return Block(index, build, Attention(f"{name}.attention", build, window), MLP(f"{name}.mlp", build))


class Stack(nn.Module):
    """Blocks `layers` (global indices) of a model, in order."""

    def __init__(self, layers: Sequence[int], build: Build, block: MakeBlock = gpt_block) -> None:
        super().__init__()
        self.blocks: Sequence[Block] = nn.ModuleList(block(index, build) for index in layers)  # type: ignore[assignment]

    def forward(self, x: torch.Tensor, batch: MicroBatch, caches: Sequence[Cache] | None = None) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape."""
        for index, block in enumerate(self.blocks):
            x = block(x, batch, None if caches is None else caches[index])
        return x


class Embedding(nn.Module):
    """Token embedding plus learned positions, normalised where asked for, with dropout."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.build = build
        self.tokens = VocabParallelEmbedding(_token_matrix(build), build)
        learned = build.config.learned_positions
        self.positions = LearnedPositions("embedding.positions", build) if learned else None
        two = build.config.position == "learned_2d"
        self.block_positions = LearnedPositions("embedding.block_positions", build) if two else None
        self.norm = Norm("embedding.norm", build) if build.config.embedding_norm else None
        self.dropout = Dropout(build, "embedding")

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Tokens [s, b] -> [s/t or s, b, h], of the residual stream's dtype."""
        x = scaled_gradient(self.tokens(batch.tokens), self.build.config.embedding_grad(batch.step) * batch.embedding_grad)
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

    def __init__(self, build: Build, tied: Parameter | None) -> None:
        """tied: the embedding's matrix, where this rank has it and the head's is the same."""
        super().__init__()
        self.build = build
        h, v = build.config.hidden_size, build.vocab_size
        # With post-norm blocks the last one's output is normalised already.
        self.norm = Norm("final_norm", build) if build.config.norm_placement != "post" else None
        own = ParamSpec("head.weight", (v, h), init=build.init(h, v), part="head")
        spec = _token_matrix(build) if build.config.tied_embeddings else own
        self.weight = vocab_parameter(spec, build) if tied is None else tied

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """[s/t or s, b, h] -> what the output matrix is multiplied with."""
        return (x if self.norm is None else self.norm(x)).to(self.build.dtype)

    @property
    def output(self) -> VocabParallelHead:
        """The output matrix, with the loss of its logits."""
        build = self.build
        return VocabParallelHead(self.weight, build.rows, build.config.logit_softcap, build.loss_chunk, build.kernels)

    def local_logits(self, x: torch.Tensor) -> torch.Tensor:
        """[s/t or s, b, h] -> logits [s, b, v_local] of this rank's ids."""
        return self.output.logits(self.normed(x))

    def forward(self, x: torch.Tensor, objective: Objective, batch: MicroBatch) -> Loss:
        """[s/t or s, b, h] -> the objective's loss of them."""
        return objective(self, x, batch)

    def cross_entropy(
        self, x: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[s/t or s, b, h], labels [s, b] -> (loss [s, b] in nats, whether the label had the largest logit [s, b])."""
        return self.output.loss(self.normed(x), labels, Target(label_smoothing, z_loss))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[s/t or s, b, h] -> whole logits [s, b, v] without padding, on every rank; no gradient."""
        local = self.local_logits(x)
        most = self.weight.spec.slices(self.build.tp.size, 0)[0].stop  # of the first rank; the last may have fewer
        even = local.new_zeros(most, *local.shape[:2])
        even[: local.shape[-1]] = local.permute(2, 0, 1)
        return self.build.tp.gathered(even)[: self.build.vocab_size].permute(1, 2, 0)


def _token_matrix(build: Build) -> ParamSpec:
    """The embedding's matrix, which may be the head's too."""
    shape = (build.vocab_size, build.config.hidden_size)
    return ParamSpec("embedding.tokens", shape, tied=build.tied_over, init=build.embedding_init, part="embedding")


class GPT(nn.Module):
    """The blocks `layers` of a GPT, with the embedding where `first` and the head where `last`."""

    def __init__(
        self,
        build: Build,
        layers: Sequence[int],
        *,
        first: bool = True,
        last: bool = True,
        embedding: Embedding | None = None,
        block: MakeBlock = gpt_block,
    ) -> None:
        """embedding: that of another chunk on this rank, whose matrix a tied head shares."""
        super().__init__()
        self.build = build
        self.embedding = Embedding(build) if first else None
        self.stack = Stack(layers, build, block)
        source = embedding or self.embedding
        tied = source.tokens.weight if source is not None and build.config.tied_embeddings else None
        self.head = Head(build, tied) if last else None

    def forward(self, x: torch.Tensor | None, batch: MicroBatch, caches: Sequence[Cache] | None = None) -> torch.Tensor:
        """Hidden states of the chunk before (None for the first) -> this chunk's [s/t or s, b, h]."""
        if self.embedding is not None:
            x = self.embedding(batch)
        return self.stack(x, batch, caches)

    def boundary(self, batch: MicroBatch) -> torch.Tensor:
        """Room for what travels between virtual stages: [s/t or s, b, h], not filled."""
        shape = (*self.build.rows.of(batch.tokens).shape, self.build.config.hidden_size)
        return torch.empty(shape, dtype=self.build.residual_dtype, device=self.build.device)

    def units(self) -> list[nn.Module]:
        """The parts that are used one after the other in the forward pass: embedding, blocks, head."""
        parts = [self.embedding, *self.stack.blocks, self.head]
        return [part for part in parts if part is not None]

    def logical_parameters(self) -> list[Parameter]:
        """Every parameter once, in the order of the forward pass."""
        return [p for p in self.parameters() if isinstance(p, Parameter)]


def build_gpt(
    build: Build,
    pieces: Sequence[Sequence[int]] | None = None,
    homes: Sequence[int] = (0,),
    stage: int = 0,
    block: MakeBlock = gpt_block,
) -> list[GPT]:
    """The chunks of a model that lie on pipeline stage `stage`, weights drawn from the seed: the same tensors under every layout.

    pieces: the layers of each virtual stage (None: one has them all); homes: the stage where each lies.
    """
    pieces = pieces or [range(build.config.num_layers)]
    if build.config.tied_embeddings and homes[0] != homes[-1]:
        build = replace(build, tied_over="ends")
    chunks: list[GPT] = []
    for virtual, layers in enumerate(pieces):
        if homes[virtual] == stage:
            embedding = chunks[0].embedding if chunks else None
            first, last = virtual == 0, virtual == len(pieces) - 1
            chunks.append(GPT(build, layers, first=first, last=last, embedding=embedding, block=block))
    for parameter in logical_parameters(chunks):
        initialise(parameter, build.tp, build.seed)
    return chunks


def logical_parameters(chunks: Sequence[GPT]) -> list[Parameter]:
    """Every parameter of a rank's chunks once, in the order of the forward pass."""
    return list(dict.fromkeys(p for chunk in chunks for p in chunk.logical_parameters()))
