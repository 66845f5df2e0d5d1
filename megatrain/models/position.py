"""Numbers that positions become: rotary embeddings, and the slopes of ALiBi at the end.

Rotary position embedding (Su et al., arXiv:2104.09864): pairs of numbers of each query and key turn with the token's position.

    pair i of position m turns by the angle m f_i, f_i = theta^(-2i/r) for the first r = rope_fraction d numbers of a head

so the product of a query and a key depends on how far apart they are. Which numbers make a pair is a matter of convention: the two
halves of the r numbers (GPT-NeoX, LLaMA on Hugging Face), or neighbours (rope_interleaved: GPT-J, GLM, LLaMA's own weights).

In two dimensions (`rope_2d`: ChatGLM-6B) the first half of a head turns with the token's position, the second half with its place in
the blank; each half is rotated as a head of its own.

Longer texts than those of the first training need lower frequencies (`rope_scaling`), by the factor F = rope_factor:

    linear   f / F: positions are interpolated (arXiv:2306.15595)
    llama3   f where the wave is short against the original length, f / F where it is long, and a blend between (arXiv:2407.21783,
             as published with Llama 3.1)
    yarn     the same idea, blended by how often a pair turns within the original length, and cosines and sines are multiplied by
             0.1 log F + 1 (arXiv:2309.00071)
"""

from __future__ import annotations

import math

import torch

from megatrain.config.schema import ModelConfig


def frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians by which each pair turns from one position to the next: float64 [r/2]."""
    rotated = config.rotated
    plain = config.rope_theta ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    slow = plain / config.rope_factor
    if config.rope_scaling == "none":
        return plain
    if config.rope_scaling == "linear":
        return slow
    kept = _kept_by_wavelength(config, plain) if config.rope_scaling == "llama3" else _kept_by_turns(config)
    return slow * (1 - kept) + plain * kept


def magnitude(config: ModelConfig) -> float:
    """The factor of cosines and sines: YaRN's correction of the softmax's temperature (section 3.3)."""
    return 0.1 * math.log(config.rope_factor) + 1 if config.rope_scaling == "yarn" and config.rope_factor > 1 else 1.0


def _kept_by_wavelength(config: ModelConfig, plain: torch.Tensor) -> torch.Tensor:
    """Share of each frequency that stays, 0 to 1, by the number of waves in the original length (Llama 3.1)."""
    waves = config.original_length * plain / (2 * math.pi)
    few, many = config.rope_low_freq_factor, config.rope_high_freq_factor
    return ((waves - few) / (many - few)).clamp(0, 1)


def _kept_by_turns(config: ModelConfig) -> torch.Tensor:
    """Share of each frequency that stays, 0 to 1: a ramp over the pairs between those that turn often and seldom (YaRN, section 3.2)."""
    rotated = config.rotated

    def pair_that_turns(times: float) -> float:
        return rotated * math.log(config.original_length / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = max(math.floor(pair_that_turns(config.rope_beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(config.rope_beta_slow)), rotated - 1)
    pairs = torch.arange(rotated // 2, dtype=torch.float64)
    # Where the ramp would end before it begins, since no pair turns `beta_slow` times in the original length, all frequencies stay: so it
    # falls out in transformers, with whose numbers such models were trained.
    return 1 - ((pairs - first) / ((last - first) or 0.001)).clamp(0, 1)


def tables(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [positions, r/2] of every angle.

    In the activations' type: one rounding of an exact cosine costs less than BF16 arithmetic around it.
    """
    angles, factor = _angles(config), magnitude(config)
    cos, sin = ((exact * factor).to(device=device, dtype=dtype) for exact in (angles.cos(), angles.sin()))
    return cos, sin


def _angles(config: ModelConfig) -> torch.Tensor:
    """[positions, r/2] float64: exact, or rounded as ChatGLM-6B's own code did while it was trained."""
    positions, turns = torch.arange(config.position_rows, dtype=torch.float64)[:, None], frequencies(config)
    if config.rope_angle_dtype == "fp16":
        return (positions.half() * turns.half()).double()
    return positions * turns


def alibi_slopes(heads: int) -> list[float]:
    """The slope of each head (Press et al., arXiv:2108.12409, section 3): a geometric sequence from 2^(-8/n), n a power of 2.

    Any other number of heads takes those of the power of 2 below it, then every second one of the power above it, as the paper's own
    code and BLOOM do.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    return slopes + between
