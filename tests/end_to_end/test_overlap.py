"""Reductions begin before the backward is half over, and hide: on gloo processes, with a network that is slow on purpose."""

from dataclasses import replace

import pytest

from megatrain.config.schema import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megatrain.testing import spawn
from megatrain.testing.overlap import measured_overlap

CONFIG = Config(
    model=ModelConfig(num_layers=6, hidden_size=128, num_attention_heads=4, seq_length=128, vocab_size=512),
    parallel=ParallelConfig(bucket_size=150_000),
    optim=OptimConfig(lr=1e-3),
    train=TrainConfig(steps=100, global_batch_size=16, micro_batch_size=4, precision="fp32"),
)


def measure(stage, overlap, delay, steps=2):
    config = replace(CONFIG, parallel=replace(CONFIG.parallel, zero_stage=stage, overlap=overlap))
    return spawn(2, measured_overlap, config, steps, delay)


@pytest.mark.parametrize(("stage", "delay"), [(0, 0.04), (1, 0.04), (2, 0.02), (3, 0.02)])
def test_on_a_slow_network_a_step_with_overlap_is_faster(stage, delay):
    """Every call takes so many seconds longer, more where calls are few, so that a busy machine shows it too: 1.2 at least."""
    beside, after = measure(stage, True, delay), measure(stage, False, delay)
    for with_overlap, without in zip(beside, after, strict=True):
        assert with_overlap.first_reduction < 0.5 and (stage > 1 or without.first_reduction > 1)
        assert with_overlap.exposed_seconds < without.exposed_seconds
        assert without.step_seconds > 1.2 * with_overlap.step_seconds
