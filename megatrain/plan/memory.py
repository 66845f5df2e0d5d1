"""Memory: bytes of activations that a layer keeps of a micro-batch, and bytes of state for each parameter (docs/memory.md).

After Korthikanti et al. (arXiv:2205.05198, section 4), with three corrections: attention is fused, so no s x s scores are kept; dropout
masks are recomputed from their counter; and a tensor that two operations read is counted once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatrain.config.schema import Config, ModelConfig
from megatrain.parallel.zero import IN_FLIGHT

STATISTICS_BYTES = 4
"""Bytes of a norm's mean or inverse deviation for one token: float32, whatever dtype the activations have."""


@dataclass(frozen=True)
class ActivationLayout:
    """The part of the layout that the activations of one rank depend on."""

    micro_batch_size: int
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False


def layer_activation_bytes(
    model: ModelConfig, layout: ActivationLayout, recompute: Literal["none", "selective", "full"], element_bytes: int
) -> float:
    """Bytes that one layer keeps of one micro-batch on one rank. element_bytes: 2 for bf16, 4 for fp32.

    In units of s b h elements, with t ranks, an MLP of width f, g key heads of a, n = 1 or 2 matrices before the activation:

        input of both norms                    2 / (t)     [the sequence is whole, without 1/t, without sequence parallelism]
        outputs of both norms                  2 / (t)     not under selective
        q, k, v and the attention's output     (2 + 2 g/a) / t
        q and k before their norms, if any         (1 + 2 g/a) / t      v lies beside them
        angles of rope, with those norms       r / h       r of d numbers are rotated; else they are looked up again
        inputs of sandwich's output norms      2 / (t)
        before the activation                  n (f/h) / t
        after it (gated: and the act of gate)  n (f/h) / t  not under selective; relu keeps its output alone
    """
    tokens = model.seq_length * layout.micro_batch_size
    ranks = layout.tensor_parallel_size
    rows = tokens / ranks if layout.sequence_parallel else tokens
    stream = rows * model.hidden_size
    if recompute == "full":
        return stream * element_bytes
    keeps = recompute == "none"
    key_heads = max(model.query_groups / ranks, 1.0)
    again = 1 if model.qk_norm else 0
    heads = ((2 + again) * model.num_attention_heads / ranks + (2 + 2 * again) * key_heads) * model.head_size * tokens
    angles = again * tokens * model.rotated * (1 + model.two_dimensional) if model.rotary else 0
    outer = 2 if model.norm_placement == "sandwich" else 0
    inner = tokens * model.ffn_size / ranks * (2 if model.gated else 1)
    both = keeps and model.activation != "relu"
    # With post-norm the input of attention is the output of the block before, whose norm's input is not here.
    beside = 2 if keeps else int(model.norm_placement == "post")
    elements = stream * (2 + beside + outer) + heads + angles + inner * (2 if both else 1)
    normalised = (2 + outer) * rows + again * tokens * (model.num_attention_heads / ranks + key_heads)
    statistics = normalised * (2 if model.norm == "layernorm" else 1)
    return elements * element_bytes + statistics * STATISTICS_BYTES


def sending_bytes(largest: int, shards: int, replicas: int, overlap: bool = True) -> int:
    """Bytes of the rounded copies of gradients that are under way, with parallel.reduce_dtype=bf16; they are kept and used again.

    largest: elements of the largest bucket. shards x replicas: data ranks; at stage 0 one shard. Beside the computation two are under
    way over the shards, and two over the replicas; else one at a time.
    """
    over = (shards > 1) + (replicas > 1)
    return 2 * largest * (IN_FLIGHT * over if overlap else min(over, 1))


@dataclass(frozen=True)
class StateBytes:
    """Bytes for each parameter that one rank keeps from step to step."""

    parameters: float
    gradients: float
    optimizer: float
    """Bytes of master weights and optimizer states."""

    @property
    def total(self) -> float:
        """Bytes of parameters, gradients and optimizer together."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(
    stage: int,
    shards: int,
    precision: Literal["bf16", "fp16", "fp32", "fp64"] = "bf16",
    optimizer: str = "adamw",
    master: Literal["fp32", "split"] = "fp32",
) -> StateBytes:
    """Bytes a trainable parameter on one rank, at a ZeRO stage with `shards` shards (arXiv:1910.02054, figure 1, but FP32 gradients).

    Parameters 2, 4 or 8 bytes; gradients 4 (8 in fp64); masters 4 in bf16 and fp16, or 2 if split; two states of 4 (8), one for sgd.
    """
    weight = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}[precision]
    wide = max(weight, 4)
    masters = (4 if master == "fp32" else 2) if weight == 2 else 0
    states = wide * (1 if optimizer == "sgd" else 2)
    return StateBytes(
        weight / (shards if stage >= 3 else 1),
        wide / (shards if stage >= 2 else 1),
        (masters + states) / (shards if stage >= 1 else 1),
    )


def copy_bytes(precision: Literal["bf16", "fp16", "fp32", "fp64"] = "bf16", optimizer: str = "adamw") -> int:
    """Bytes a trainable parameter in a checkpoint, or a copy in memory: masters, or weights without them, and the optimizer's states.

    Split masters are saved whole. All ranks together save each parameter once.
    """
    return (8 if precision == "fp64" else 4) * (2 if optimizer == "sgd" else 3)


def copies_note(config: Config, parameters: int, devices: int) -> str:
    """The host memory that checkpoint.in_memory_every takes, as text; "" where there are no copies. parameters: of the whole model."""
    every = config.checkpoint.in_memory_every
    if not every:
        return ""
    one = parameters * copy_bytes(config.train.precision, config.optim.name) / devices / 2**30
    peer = (
        f", {4 * one:.3g} GiB with those of another machine where there are several" if config.checkpoint.in_memory_peer else ""
    )
    return (
        f"copies in memory every {every} steps: a rank saves {one:.3g} GiB, up to two copies of it in /dev/shm "
        f"({2 * one:.3g} GiB{peer}), and up to as much again in blocks while one is written"
    )
