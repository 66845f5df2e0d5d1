"""What a layer is, by its index: which keys its attention sees, and which mixer its block has."""

from dataclasses import replace

import pytest
import torch

from megatrain.config.load import from_dict
from megatrain.config.schema import ModelConfig
from megatrain.config.source import ConfigError
from megatrain.config.validate import validate_model
from megatrain.inference.engine import Engine, EngineSettings
from megatrain.inference.paged_model import ForwardModel
from megatrain.inference.requests import Request
from megatrain.kernels.attention_mask import CAUSAL, AttentionMask, keys_seen
from megatrain.models import layers
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import Block, build_gpt, gpt_block
from megatrain.models.layers import MLP, Build
from megatrain.parallel.mesh import MeshShape, ParallelContext, Rows
from megatrain.parallel.pipeline_parallel import Unsharded
from megatrain.parallel.schedules import Schedule
from megatrain.parallel.tensor_parallel import Backward, ColumnParallelLinear, Matrix, RowParallelLinear
from megatrain.runtime.flops import model_flops_per_token
from megatrain.testing import simulate

S, V, H = 12, 29, 16
CONFIG = ModelConfig(
    num_layers=5, hidden_size=H, num_attention_heads=4, seq_length=S, vocab_size=V, init_std=0.4, position="rope",
    window=3, window_pattern=("local", "local", "global"),
)  # fmt: skip


def gpt(ctx, config=CONFIG, sequence_parallel=False, **choice):
    rows = Rows(ctx.tp, sequence_parallel)
    return build_gpt(Build(rows, torch.float64, ctx.device, config, V, seed=2), **choice)[0].eval()


def batch(mask=CAUSAL, length=S):
    tokens = torch.randint(V, (length, 2), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(length)[:, None].expand(length, 2)
    return MicroBatch(tokens, tokens, torch.ones(length, 2), positions, torch.arange(2), mask=mask)


def test_each_layer_sees_what_the_pattern_says(monkeypatch):
    assert CONFIG.windows == (3, 3, None, 3, 3)
    seen, inner = [], layers.attention
    monkeypatch.setattr(layers, "attention", lambda q, k, v, of: seen.append(of.mask) or inner(q, k, v, of))
    documents = torch.zeros(S, 2, dtype=torch.int64)
    given = AttentionMask(documents=documents)
    gpt(ParallelContext.single())(None, batch(given))
    assert [mask.window for mask in seen] == [3, 3, None, 3, 3]
    assert all(mask.documents is documents for mask in seen)
    assert seen[2] is given and len({id(mask) for mask in seen}) == 2, "kernels know a mask by which object it is"


def test_a_token_reaches_as_far_as_the_layers_let_it():
    """Two windows of 3 reach 4 tokens back; a global layer between reaches all."""

    def reach(pattern, count):
        model = gpt(ParallelContext.single(), replace(CONFIG, num_layers=count, window_pattern=pattern))
        of = batch()
        first, changed = model(None, of), replace(of, tokens=torch.cat([(of.tokens[:1] + 1) % V, of.tokens[1:]]))
        return int((first - model(None, changed)).abs().sum((1, 2)).nonzero().max())

    assert reach(("local",), 2) == 4
    assert reach(("local", "global"), 2) == S - 1


def test_a_cache_gives_the_numbers_of_the_whole():
    model = gpt(ParallelContext.single())
    tokens = batch().tokens[:, :1]
    weights = ForwardModel(ParallelContext.single(), [model], Schedule("1f1b", 1, 1, 1, backward=False), Unsharded())
    whole = (
        model.head.logits(model(None, replace(batch(), tokens=tokens, positions=batch().positions[:, :1])))[:, 0]
        .detach()
        .float()
    )
    ids = tokens[:, 0].tolist()
    for chunk in (1, 5, S):
        engine = Engine(weights, settings=EngineSettings(step_tokens=chunk, most_running=1, cache_tokens=64))
        (answer,) = engine.run([Request(tuple(ids), 1, score_from=1)])
        wanted = [float(torch.log_softmax(whole[n], -1)[token]) for n, token in enumerate([*ids[1:], answer.tokens[0].token])]
        assert [scored.logprob for scored in (*answer.prompt, *answer.tokens)] == pytest.approx(wanted, abs=1e-5)


def test_flops_are_the_mean_of_the_layers():
    model = replace(CONFIG, num_layers=6)
    alone = [model_flops_per_token(replace(model, window_pattern=(kind,)), V, True) for kind in ("local", "global")]
    assert model_flops_per_token(model, V, True) == pytest.approx((2 * alone[0] + alone[1]) / 3)
    assert keys_seen(CAUSAL.within(3), S) < keys_seen(CAUSAL, S)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"window": 8, "window_pattern": []}, r"window_pattern=\[\] gives no layer the window \(model.window=8, model"),
        (
            {"num_layers": 2, "window": 8, "window_pattern": ["global", "global", "local"]},
            r"global, local\] gives no layer the window \(model.window=8, model.num_layers=2\)",
        ),
        (
            {"window_pattern": ["global"]},
            r"Use for example model.window_pattern=\[local, global\] with model.window=4096, or leave",
        ),
        ({"window": 8, "window_pattern": ["near"]}, r"window_pattern\[0\] is the text 'near'; expected one of local, global"),
        ({"window": 8, "window_pattern": "local"}, r"expected list of any of local, global. Write \[local\]"),
    ],
    ids=str,
)
def test_a_pattern_without_a_window_says_what_to_write(model, said):
    with pytest.raises(ConfigError, match=said):
        validate_model(from_dict({"model": model}))


class Shift(torch.nn.Module):
    """A mixer that is no attention: each token gets what a matrix makes of the token before."""

    def __init__(self, name, build):
        super().__init__()
        self.inner = ColumnParallelLinear([Matrix(f"{name}.in", H, 2 * H, 2 * H)], build, bias=False)
        self.output = RowParallelLinear(Matrix(f"{name}.out", 2 * H, H, 2 * H), build, bias=False)

    def bias_proxy(self):
        return self.output.bias_proxy()

    def forward(self, x, batch, cache=None, remake=None, sums_bias=True):
        (inner,) = self.inner(x, Backward(batch.postponed, remake))
        return self.output(torch.cat([torch.zeros_like(inner[:1]), inner[:-1]]), Backward(batch.postponed))


def every_second(index, build):
    if index % 2 == 0:
        return gpt_block(index, build)
    name = f"layers.{index}"
    return Block(index, build, Shift(f"{name}.shift", build), MLP(f"{name}.mlp", build))


def test_a_block_has_the_mixer_of_its_layer_under_every_layout():
    def hidden(ctx, sequence_parallel):
        y = gpt(ctx, sequence_parallel=sequence_parallel, block=every_second)(None, batch())
        return ctx.tp.gathered(y.detach()) if sequence_parallel else y.detach()

    (alone,) = simulate(MeshShape(), hidden, False)
    assert not torch.allclose(alone, gpt(ParallelContext.single())(None, batch()))
    for sequence_parallel in (False, True):
        for y in simulate(MeshShape(tp=2), hidden, sequence_parallel):
            torch.testing.assert_close(y, alone, rtol=1e-11, atol=1e-12)
