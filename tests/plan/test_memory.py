"""What a layer really keeps between forward and backward is what docs/memory.md counts, and a pipeline keeps it as often as it says."""

import weakref
from dataclasses import replace

import pytest
import torch

from megatrain.config.schema import CheckpointConfig, Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import gpt_block
from megatrain.models.layers import Build
from megatrain.parallel.mesh import MeshShape, Rows
from megatrain.plan.memory import ActivationLayout, copies_note, copy_bytes, layer_activation_bytes
from megatrain.testing import simulate
from megatrain.testing.trace import trace_run

S, B, H = 64, 4, 64
BASE = ModelConfig(num_layers=1, hidden_size=H, num_attention_heads=4, seq_length=S, vocab_size=101)
MODELS = {
    "gpt": BASE,
    "dropout": replace(BASE, dropout=0.1, bias=False),
    "llama": replace(BASE, position="rope", norm="rmsnorm", activation="swiglu", bias=False, num_query_groups=2),
    "relu": replace(BASE, activation="relu", position="rope"),
    "normalised heads": replace(BASE, qk_norm=True, num_query_groups=2, head_dim=24),
    "normalised heads, turned": replace(BASE, qk_norm=True, norm="rmsnorm", position="rope", bias=False),
    "sandwich": replace(BASE, norm_placement="sandwich"),
    "post-norm": replace(BASE, norm_placement="post"),
    "a part of each head": replace(BASE, position="rope", rope_fraction=0.5),
    "geglu": replace(BASE, activation="geglu", ffn_hidden_size=192, num_query_groups=1),
}


class Kept:
    """Bytes of the storages that autograd keeps, each once, as long as they are alive."""

    def __init__(self, leave_out=()):
        self.left_out = {x.untyped_storage().data_ptr() for x in leave_out}
        self.alive, self.most = {}, 0

    def pack(self, x):
        storage = x.untyped_storage()
        where = storage.data_ptr()
        if where not in self.left_out and where not in self.alive:
            self.alive[where] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, where, None)
            self.most = max(self.most, sum(self.alive.values()))
        return x

    def watch(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)


def kept_bytes(ctx, model, recompute, sequence_parallel, dtype):
    build = Build(Rows(ctx.tp, sequence_parallel), dtype, ctx.device, model, 64, 0, recompute, kernels="reference")
    block = gpt_block(0, build)
    rows = S // ctx.tp.size if sequence_parallel else S
    x = torch.randn(rows, B, H).to(dtype).requires_grad_()
    ids = torch.zeros(S, B, dtype=torch.int64)
    positions = torch.arange(S)[:, None].expand(S, B)
    batch = MicroBatch(ids, ids, torch.ones(S, B), positions, torch.arange(B))
    kept = Kept([*block.parameters(), ids, positions, batch.samples])
    with kept.watch():
        y = block(x * 1.0, batch)  # a block's input is the output of another operation
    found = sum(kept.alive.values())
    del y
    return found


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_the_page_counts(recompute, name, tp, sequence_parallel, dtype):
    measured = simulate(MeshShape(tp=tp), kept_bytes, MODELS[name], recompute, sequence_parallel, dtype)
    counted = layer_activation_bytes(MODELS[name], ActivationLayout(B, tp, sequence_parallel), recompute, dtype.itemsize)
    assert measured == pytest.approx([counted] * tp, rel=0.05)


@pytest.mark.parametrize("name", ["gpt", "llama", "geglu"])
def test_selective_keeps_three_quarters_at_most(name):
    none, selective = (layer_activation_bytes(MODELS[name], ActivationLayout(B), mode, 2) for mode in ("none", "selective"))
    assert selective <= 0.75 * none


def most_kept(ctx, config):
    kept = Kept()
    with kept.watch():
        trace_run(ctx, config, 1, prepare=lambda run: kept.left_out.add(run.flat.weights.untyped_storage().data_ptr()))
    return kept.most


def test_memory_of_a_pipeline_follows_the_peak_of_saved_states():
    """1F1B keeps p - stage micro-batches, GPipe all of them, and full recomputation the inputs alone."""
    model = replace(BASE, num_layers=8, hidden_size=32)
    train = TrainConfig(steps=1, global_batch_size=8, micro_batch_size=1, precision="fp32")

    def peaks(schedule, recompute="none"):
        parallel = ParallelConfig(pipeline_parallel_size=4, schedule=schedule)
        config = Config(
            model=model, parallel=parallel, optim=OptimConfig(warmup_steps=0), train=replace(train, recompute=recompute)
        )
        return simulate(MeshShape(pp=4), most_kept, config)

    one = 2 * layer_activation_bytes(model, ActivationLayout(1), "none", 4)
    for stage, most in list(enumerate(peaks("1f1b")))[1:3]:  # the ends have embedding and logits besides
        assert most == pytest.approx((4 - stage) * one, rel=0.15)
    for most in peaks("gpipe")[1:3]:
        assert most == pytest.approx(8 * one, rel=0.15)
    full = 2 * layer_activation_bytes(model, ActivationLayout(1), "full", 4)
    for most in peaks("gpipe", "full")[1:3]:
        assert most == pytest.approx(8 * full + one / 2, rel=0.15), "inputs, and what one layer needs while it runs again"


def test_the_host_memory_of_copies_is_told():
    """A billion parameters on 8 ranks: 12 bytes each, so 1.40 GiB a rank."""
    assert [copy_bytes("bf16"), copy_bytes("fp64"), copy_bytes("fp32", "sgd")] == [12, 24, 8]

    def note(**checkpoint):
        return copies_note(Config(checkpoint=CheckpointConfig(**checkpoint)), 10**9, 8)

    assert note() == ""
    assert note(in_memory_every=5) == (
        "copies in memory every 5 steps: a rank saves 1.4 GiB, up to two copies of it in /dev/shm (2.79 GiB, 5.59 GiB with "
        "those of another machine where there are several), and up to as much again in blocks while one is written"
    )
    assert "in /dev/shm (2.79 GiB), and up to" in note(in_memory_every=5, in_memory_peer=False)
