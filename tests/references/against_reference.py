"""Training by our single process and by the independent plain-PyTorch GPT, from the same weights and batches."""

from collections.abc import Callable
from typing import Any

import torch
from reference_gpt import Masks, ReferenceBatch, ReferenceGPT, ReferenceRun, Rope, Sight, make_rope, reference_train
from reference_schedules import reference_rates

from megatrain.config.schema import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from megatrain.data.loader import Batch, Loader
from megatrain.parallel import rng
from megatrain.parallel.mesh import ParallelContext
from megatrain.testing.agree import Trace, agree
from megatrain.testing.trace import random_source, trace_run

STEPS = 5
BASE = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=12, vocab_size=101, init_std=0.1)
OPTIMIZERS = [
    OptimConfig(name="adamw", lr=1e-2, min_lr=1e-3, warmup_steps=2),
    OptimConfig(name="adam", lr=1e-2, min_lr=1e-3, warmup_steps=1, lr_schedule="linear"),
    OptimConfig(name="sgd", lr=1e-1, min_lr=1e-2, warmup_steps=2, lr_schedule="wsd", decay_fraction=0.4),
    OptimConfig(name="sgd", lr=1e-1, warmup_steps=0, lr_schedule="constant", clip_grad=0.0, momentum=0.5),
    OptimConfig(name="adamw", lr=1e-2, warmup_steps=0, lr_schedule="constant", clip_grad=0.05),
]


def config_of(model: ModelConfig, optim: OptimConfig, precision: str, micro_batch_size: int = 2, **others: Any) -> Config:
    """others: keys of `train`, and `isolate_documents` of `data`."""
    data = DataConfig(isolate_documents=others.pop("isolate_documents", False))
    train = TrainConfig(steps=STEPS, global_batch_size=4, micro_batch_size=micro_batch_size, precision=precision, **others)
    return Config(model=model, optim=optim, train=train, data=data)


def reference_of(config: Config) -> ReferenceRun:
    """The same training by the independent model, from the same weights, on the same batches with the same masks."""
    m, t, o = config.model, config.train, config.optim
    start = {}

    def keep(run):
        start.update({p.spec.name: p.detach().clone() for p in run.flat.parameters})

    trace_run(ParallelContext.single(), config, 0, prepare=keep)
    model = model_of(config)
    model.load_logical(start)
    samples, compose = random_source(config, m.vocab_size)
    loader = Loader(samples, t.global_batch_size, t.micro_batch_size, 0, 1, compose=compose)
    batches = [loader.build(step * t.global_batch_size) for step in range(t.steps)]
    return reference_train(
        model,
        [micro_batches_of(batch) for batch in batches],
        rates=reference_rates(o.lr_schedule, t.steps, o.lr, o.min_lr, o.warmup_steps, o.decay_fraction),
        optimizer=o.name,
        weight_decay=o.weight_decay,
        betas=o.betas,
        eps=o.eps,
        momentum=o.momentum,
        clip_grad=o.clip_grad,
        masks=masks_of(config, batches),
        label_smoothing=t.label_smoothing,
        z_loss=t.z_loss,
    )


def dtype_of(config: Config) -> torch.dtype:
    return {"fp32": torch.float32, "fp64": torch.float64}[config.train.precision]


def model_of(config: Config) -> ReferenceGPT:
    """The independent model of a config."""
    m = config.model
    model = ReferenceGPT(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        num_attention_heads=m.num_attention_heads,
        seq_length=m.seq_length,
        vocab_size=m.vocab_size,
        ffn_hidden_size=m.ffn_size,
        num_query_groups=m.query_groups,
        norm=m.norm,
        norm_eps=m.norm_eps,
        activation=m.activation,
        position=m.position,
        bias=m.bias,
        tied_embeddings=m.tied_embeddings,
        explicit_softmax=True,
        head_dim=m.head_dim,
        qkv_bias=m.qkv_bias,
        qk_norm=m.qk_norm,
        embedding_norm=m.embedding_norm,
        logit_softcap=m.logit_softcap,
        rope=rope_of(m) if m.position == "rope" else None,
        sights=[Sight(window, m.sparse, m.position == "alibi") for window in m.windows],
        norm_placement=m.norm_placement,
    )
    return model.to(dtype_of(config))


def rope_of(m: ModelConfig) -> Rope:
    return make_rope(
        m.head_size,
        m.rope_theta,
        m.rope_fraction,
        m.rope_interleaved,
        m.rope_scaling,
        m.rope_factor,
        m.rope_original_length or m.seq_length / m.rope_factor,
        (m.rope_low_freq_factor, m.rope_high_freq_factor),
        (m.rope_beta_slow, m.rope_beta_fast),
    )


def micro_batches_of(batch: Batch) -> list[ReferenceBatch]:
    return [
        ReferenceBatch(
            *(torch.from_numpy(a[i]) for a in (batch.tokens, batch.labels, batch.loss_weights, batch.positions)),
            None if batch.documents is None else torch.from_numpy(batch.documents[i]),
        )
        for i in range(batch.tokens.shape[0])
    ]


def masks_of(config: Config, batches: list[Batch]) -> Callable[[int, int], Masks]:
    """(step, micro-batch) -> the dropout masks of its sites."""
    m, t = config.model, config.train

    def weights_mask(step, name, samples):
        key, places = rng.key(t.seed, "attention dropout", step, name), torch.arange(m.seq_length)
        heads = torch.arange(m.num_attention_heads).expand(len(samples), -1)
        return rng.attention_dropout(m.attention_dropout, key, samples, heads, places, places)

    def masks(step, micro_batch):
        samples = torch.from_numpy(batches[step].places[micro_batch])

        def mask(site):
            if site.endswith(".weights"):
                return weights_mask(step, site.removesuffix(".weights"), samples)
            where = ("embedding",) if site == "embedding" else (int(site.split(".")[1]), site.split(".")[2])
            ones = torch.ones(m.seq_length, len(samples), m.hidden_size, dtype=dtype_of(config))
            return rng.dropout(ones, m.dropout, rng.key(t.seed, "dropout", step, *where), samples).transpose(0, 1)

        return mask

    return masks


def trace_of(config: Config, run: ReferenceRun) -> Trace:
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, moments in run.moments.items():
        for kind, tensor in moments.items():
            states.setdefault({"momentum_buffer": "momentum"}.get(kind, kind), {})[name] = tensor
    return Trace(run.losses, run.grad_norms, run.first_gradients, run.weights, states, config.optim.lr, config.train.precision)


def check(config: Config) -> None:
    ours = trace_run(ParallelContext.single(), config, STEPS)
    agree(trace_of(config, reference_of(config)), ours, optimizer=config.optim.name)
    assert ours.losses[-1] != ours.losses[0]
