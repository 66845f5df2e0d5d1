"""The schema: every key (knob) with its type, default and documentation. Imports only the standard library.

A config is a tree of frozen dataclasses. Each field is made by `knob(default, doc, effect, above=0, ...)`: its documentation, when it has
an effect, its range, and the values that this release refuses are kept in the field's metadata and become docs/config.md. Values that
follow from other values are properties, never fields. `load.py` turns YAML into these objects; the rules between keys are in `validate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatrain.config import effects
from megatrain.config.asked import EvalConfig, SamplesConfig
from megatrain.config.glm_data import GlmConfig
from megatrain.config.knob import Deferred, knob
from megatrain.config.model import ModelConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "Document",
    "GlmConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "TrainConfig",
    "WeightsConfig",
]


@dataclass(frozen=True)
class ParallelConfig:
    """How the logical model is laid out over ranks. The data-parallel size is the number of ranks over the product of the other sizes."""

    tensor_parallel_size: int = knob(
        1, "Ranks that share each layer's matrices (Megatron, arXiv:1909.08053).", above=0, at_most=1 << 24
    )
    sequence_parallel: bool = knob(False, "Split activations along the sequence between the matrices (arXiv:2205.05198).")
    pipeline_parallel_size: int = knob(1, "Pipeline stages.", above=0, at_most=1 << 24)
    virtual_pipeline_size: int = knob(1, "Model chunks of each pipeline stage.", above=0, at_most=1 << 16)
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"] = knob("1f1b", "Pipeline schedule.")
    layer_split: tuple[int, ...] | None = knob(
        None,
        "Layers of each virtual stage, in order, such as [5, 6, 6, 5]; null balances them by their FLOPs.",
        effects.SEVERAL_STAGES,
        above=0,
        at_most=1 << 16,
    )
    context_parallel_size: int = knob(
        1,
        "Ranks that share one sequence through all layers.",
        above=0,
        at_most=1 << 24,
        deferred=Deferred((1,), "context parallelism comes in a later release"),
    )
    expert_parallel_size: int = knob(
        1,
        "Ranks that share the experts.",
        above=0,
        at_most=1 << 24,
        deferred=Deferred((1,), "mixtures of experts come in a later release"),
    )
    zero_stage: Literal[0, 1, 2, 3] = knob(
        1,
        "State that the data-parallel ranks shard (ZeRO, arXiv:1910.02054): 0 nothing; 1 optimizer states; 2 gradients too; 3 "
        "parameters too.",
    )
    zero_ranks: int | None = knob(
        None,
        "Number of neighbouring data-parallel ranks, such as those of a node, that share one set of shards; the other ranks "
        "hold replicas of it (MiCS, arXiv:2205.00119). It divides the number of data-parallel ranks; null means all of them.",
        effects.SHARDED,
        above=0,
    )
    bucket_size: int | None = knob(
        None,
        "Parameters that are reduced and gathered over the data-parallel ranks at a time; null means 8 million, or 1 million "
        "for each of these ranks up to an eighth of the rank's own (zero_stage 2 and 3: a thirty-second).",
        above=0,
    )
    reduce_dtype: Literal["fp32", "bf16"] = knob(
        "fp32",
        "Type in which gradients travel between data-parallel ranks: bf16 halves the bytes. Over micro-batches they are "
        "accumulated in float32 either way.",
        effects.NOT_DOUBLE,
    )
    overlap: bool = knob(True, "Reduce gradients during the backward pass, and gather parameters during the forward pass.")
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "Where tensors live; auto takes CUDA where there is one.")
    backend: Literal["auto", "gloo", "nccl"] = knob("auto", "Collectives library; auto is nccl on CUDA and gloo on CPU.")


# --- data.glm: how spans of a text become blanks, and how a sample is laid out (docs/glm.md) ----------------------------------


@dataclass(frozen=True)
class CorpusConfig:
    """One token store of a blend."""

    path: str = knob("", "Prefix of the .bin/.idx pair.", path=True, use="data/train")
    weight: float = knob(1.0, "Share of the samples, relative to the other corpora of the list.", above=0)
    answers: str | None = knob(
        None,
        "data.train with objective=glm: prefix of the answers, where `path` holds prompts: a multi-task share (GLM-130B).",
        path=True,
    )
    set: str = knob("", "data.valid: name of the validation set; a mapping of names to lists is the same.")
    name: str = knob("", "data.train: name in data.schedule and in reports; empty: its path.")
    epochs: float | None = knob(
        None,
        "data.train: how often it is seen over the run, evenly; its share follows, and `weight` is left out.",
        above=0,
        use=2.0,
    )
    max_epochs: float | None = knob(
        None,
        "data.train: how often it is seen at most, beside `weight`; then the others share what it would have had.",
        above=0,
        use=4.0,
    )
    old: bool = knob(False, "data.train: text of an earlier training, of which data.replay is the share.")

    @property
    def label(self) -> str:
        """The name in data.schedule and in reports."""
        return self.name or self.path


@dataclass(frozen=True)
class WeightsConfig:
    """The weights of the corpora from some place of the run on."""

    from_share: float | None = knob(
        None, "Share of the run that is done where they begin, in the unit of its length.", at_least=0, below=1, use=0.9
    )
    from_step: int | None = knob(None, "Or the number of steps that are done.", at_least=0, use=900)
    from_tokens: float | None = knob(None, "Or the number of tokens that are consumed.", at_least=0, at_most=1e18, use=9e8)
    weights: tuple[tuple[str, float], ...] = knob(
        (),
        "{corpus: weight}: every corpus of data.train that has no `epochs`, by name or path; 0 leaves it out.",
        at_least=0,
        use=1.0,
    )

    @property
    def place(self) -> str:
        """The place where they begin, as in the config."""
        named = {"from_share": self.from_share, "from_step": self.from_step, "from_tokens": self.from_tokens}
        return ", ".join(f"{name}: {value:g}" for name, value in named.items() if value is not None)


@dataclass(frozen=True)
class DataConfig:
    """The corpora, their tokenizer, and how samples are made of them."""

    train: tuple[CorpusConfig, ...] = knob((), "Training corpora: a list of {path, weight}; a plain string is a list of one.")
    valid: tuple[CorpusConfig, ...] = knob(
        (), "Held-out corpora, as `train`, or a mapping of names to such lists: several validation sets."
    )
    schedule: tuple[WeightsConfig, ...] = knob(
        (), "Other weights later in the run, as [{from_share: 0.9, weights: {web: 0.3, wiki: 0.7}}], in order (docs/blends.md)."
    )
    replay: float | None = knob(
        None,
        "Share of the samples that come from the corpora with `old: true`, whatever the weights of the others.",
        above=0,
        below=1,
    )
    isolate_documents: bool = knob(
        False,
        "Documents packed in one sample do not see each other, and positions count from each one's start (arXiv:2407.21783).",
    )
    objective: Literal["next_token", "glm"] = knob(
        "next_token",
        "Task that a sample teaches: to predict each next token, or to fill blanks (GLM, arXiv:2103.10360), as the keys of "
        "`glm` say.",
    )
    glm: GlmConfig = field(default_factory=GlmConfig)
    tokenizer: str | None = knob(
        None,
        "A tokenizer.json of the `tokenizers` library, a rank file of tiktoken, a model of SentencePiece, or `bytes`.",
        path=True,
        use="bytes",
    )
    eod: int | str | None = knob(
        None,
        "Token that ends a document, by name or id, or `none`; null: found in the files beside the tokenizer, or by its name.",
        at_least=0,
        not_empty=True,
    )
    bos: int | str | None = knob(
        None,
        "Token that is put before a document, by name or id, or `none`; null: what the tokenizer puts there, if anything.",
        at_least=0,
        not_empty=True,
    )
    cache_dir: str | None = knob(
        None, "Directory of cached sample indices; null means `index_cache` beside each store.", path=True
    )

    @property
    def has_answers(self) -> bool:
        """Whether a training corpus is made of prompts and answers."""
        return any(corpus.answers is not None for corpus in self.train)

    @property
    def drawn_per_micro_batch(self) -> bool:
        """Whether a sample also depends on the micro-batch it is in, so that another train.micro_batch_size gives other data."""
        return self.objective == "glm"


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "adam", "sgd", "muon"] = knob(
        "adamw",
        "adamw: decoupled decay (arXiv:1711.05101); adam: L2 in the gradient (arXiv:1412.6980); sgd: with momentum.",
        deferred=Deferred(("adamw", "adam", "sgd"), "Muon comes in a later release"),
    )
    lr: float = knob(3e-4, "Peak learning rate.", above=0)
    min_lr: float = knob(3e-5, "Learning rate at the end of the decay.", effects.DECAYS, at_least=0)
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = knob(
        "cosine", "Shape after the warm-up; wsd (arXiv:2404.06395) stays at lr and decays over the last decay_fraction."
    )
    warmup_steps: int | None = knob(
        None, "Steps of linear warm-up; null means 100, or a tenth of a run of fewer than 1000 steps.", at_least=0
    )
    decay_fraction: float = knob(
        0.1, "wsd: share of the run, at its end, in which the rate falls linearly to min_lr.", effects.WSD, above=0, at_most=1
    )
    weight_decay: float = knob(0.1, "Weight decay of matrices; biases and norm weights have none.", at_least=0)
    weight_decay_end: float | None = knob(
        None, "Weight decay of the last step, approached linearly; null keeps it constant.", at_least=0
    )
    master: Literal["fp32", "split"] = knob(
        "fp32",
        "Master weights of a bf16 run: fp32 keeps them beside the parameters; split keeps the 16 bits that a BF16 parameter "
        "lacks, 2 bytes less for each.",
        effects.BF16,
    )
    betas: tuple[float, float] = knob((0.9, 0.95), "Adam's moment decay rates.", effects.ADAM, at_least=0, below=1)
    eps: float = knob(1e-8, "Adam's epsilon.", effects.ADAM, above=0)
    momentum: float = knob(0.9, "sgd's momentum.", effects.SGD, at_least=0, below=1)
    clip_grad: float = knob(1.0, "Largest global gradient norm; 0 switches clipping off.", at_least=0)


@dataclass(frozen=True)
class TrainConfig:
    """The run: how long, how much at a time, in what precision."""

    steps: int = knob(1000, "Number of optimizer updates.", effects.IN_STEPS, above=0)
    tokens: float | None = knob(
        None,
        "Token budget instead of steps: the last update is the one that reaches it, and schedules are counted in tokens.",
        above=0,
        at_most=1e18,
    )
    global_batch_size: int = knob(32, "Sequences per optimizer update, over all ranks.", above=0, at_most=1 << 24)
    batch_ramp: tuple[int, int, int] | None = knob(
        None,
        "[start, increment, samples]: begin with global batches of `start` sequences, and grow by `increment` at a time to "
        "global_batch_size over the first `samples` (arXiv:2005.14165, appendix B).",
        above=0,
    )
    micro_batch_size: int = knob(4, "Sequences of one forward pass of a rank.", above=0, at_most=1 << 24)
    seed: int = knob(1234, "Seed of weights, data order and dropout.", at_least=0, at_most=(1 << 63) - 1)
    precision: Literal["bf16", "fp16", "fp32", "fp64"] = knob(
        "bf16", "bf16: BF16 weights with FP32 masters and FP32 gradient accumulation; fp64 is for checks on CPU."
    )
    kernels: Literal["auto", "triton", "numba", "reference"] = knob(
        "auto",
        "Implementation of norms, rotation, gates, losses and the AdamW update: auto is Triton on CUDA, numba on a CPU "
        "in bf16, where installed, else plain PyTorch (kernels/dispatch.py).",
    )
    compile: Literal["none", "block"] = knob(
        "none",
        "block: torch.compile what lies between a block's matrix products (kernels/compiled.py); on CPU it needs a C++ compiler.",
    )
    recompute: Literal["none", "selective", "full"] = knob(
        "none",
        "Activation recomputation (arXiv:2205.05198): selective makes norm and activation outputs again in the backward; full "
        "a whole block.",
    )
    label_smoothing: float = knob(
        0.0,
        "Share of the target's probability that is spread over the vocabulary, in training (arXiv:1512.00567, section 7).",
        at_least=0,
        below=1,
    )
    z_loss: float = knob(
        0.0, "Weight of the squared log of the softmax's sum, in training (PaLM, arXiv:2204.02311, section 5).", at_least=0
    )
    loss_chunk: int = knob(
        0,
        "Tokens of a micro-batch whose logits exist at a time; the backward makes them again (arXiv:2411.09009). 0 means all.",
        at_least=0,
    )
    skip_steps: tuple[int, ...] = knob(
        (),
        "Steps, counted from 1, whose batch is consumed without an update, such as those where a loss spiked (PaLM, "
        "arXiv:2204.02311, section 5.1).",
        above=0,
    )
    on_spike: Literal["warn", "skip", "rollback"] = knob(
        "warn",
        "What follows a spike of loss or gradient norm: warn tells of it; skip also leaves out the update; rollback goes back to the "
        "checkpoint before and leaves out the samples from there to behind the spike (docs/spikes.md).",
    )
    spike_threshold: float = knob(
        10.0,
        "Distance from the median of the steps before, in robust standard deviations, beyond which a loss or the logarithm of a "
        "gradient norm is a spike.",
        above=0,
    )
    spike_history: int = knob(128, "Number of steps that say which losses and gradient norms are usual.", at_least=16)
    spike_window: int | None = knob(
        None,
        "Steps up to the spike, itself included, whose samples a rollback leaves out; null: all since the checkpoint.",
        effects.ROLLS_BACK,
        above=0,
    )
    spike_warmup_steps: int = knob(
        20, "Steps after a rollback over which the learning rate rises again, linearly.", effects.ROLLS_BACK, at_least=0
    )
    spike_remedy: Literal["none", "shrink_embedding_gradient"] = knob(
        "none",
        "shrink_embedding_gradient: the token embedding's gradient is multiplied by 0.1 for the spike_warmup_steps after a "
        "rollback (GLM-130B, arXiv:2210.02414, section 3.3).",
        effects.ROLLS_BACK & effects.above("train.spike_warmup_steps", 0),
    )
    spike_retries: int = knob(
        3,
        "Rollbacks without a checkpoint behind the spike in between, after which the run ends with exit code 76.",
        effects.ROLLS_BACK,
        at_least=0,
    )
    max_skipped_in_row: int = knob(
        10,
        "Updates skipped in a row, since the loss or gradient was not finite or by on_spike, after which the run ends with exit code 76, "
        "or goes back with on_spike=rollback; also after more than half of the last four times as many. 0 means never. Not counted: "
        "skip_steps, and fp16's overflows before the first update.",
        at_least=0,
    )
    loss_scale: float = knob(
        65536.0,
        "fp16: initial loss scale, so that small gradients do not vanish (arXiv:1710.03740).",
        effects.FP16,
        above=0,
    )
    loss_scale_window: int = knob(
        1000, "fp16: number of updates without an overflow after which the loss scale doubles.", effects.FP16, above=0
    )
    loss_scale_hysteresis: int = knob(
        2,
        "fp16: number of overflows, without such a window in between, after which the loss scale halves.",
        effects.FP16,
        above=0,
    )
    loss_scale_min: float = knob(1.0, "fp16: smallest loss scale.", effects.FP16, above=0)
    exit_after_minutes: float | None = knob(
        None, "Minutes after which the run stops with a checkpoint and exit code 75, as on a signal; null means never.", above=0
    )
    exit_before_end_minutes: float = knob(
        2.0,
        "Under SLURM: minutes before the job's time limit at which the run stops, as on a signal. Three steps and a "
        "checkpoint must fit.",
        at_least=0,
    )
    exit_file: str | None = knob(None, "File whose appearance stops the run with a checkpoint and exit code 75.", path=True)
    eval_every: int = knob(100, "Steps between evaluations; 0 means only at the end.", at_least=0)
    eval_batches: int = knob(8, "Global batches per evaluation; 0 means the whole held-out set, once.", at_least=0)
    audit_every: int = knob(
        500, "Steps between bitwise comparisons of replicas, and of state between updates; 0 means never.", at_least=0
    )
    audit_compute_every: int = knob(
        1000, "Steps between those after which all replicas compute a micro-batch twice, to the bit; 0 means never.", at_least=0
    )
    hang_timeout_seconds: float = knob(
        600.0,
        "Seconds that a collective, a step or a batch may take; after that the run ends, naming culprit and place.",
        above=0,
        at_most=1e6,
    )
    start_timeout_seconds: float = knob(
        1200.0, "Seconds that the set-up may take; then the run ends, naming who has not come.", above=0, at_most=1e6
    )
    deterministic: bool = knob(
        False, "Produce the same bits in every run of the same layout (torch.use_deterministic_algorithms)."
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where the state is saved."""

    dir: str | None = knob(None, "Directory of the checkpoints; null means log.dir/checkpoints.", path=True)
    save_every: int = knob(200, "Steps between checkpoints; 0 means only at the end.", at_least=0)
    keep: int = knob(3, "Number of newest checkpoints to keep; 0 keeps all.", at_least=0)
    keep_every: int = knob(
        0, "Keep checkpoints of steps that are multiples of this as well; 0 means none.", effects.KEPT, at_least=0
    )
    asynchronous: bool = knob(
        True, "Train on while a checkpoint is written; a step waits only for a copy of what its rank saves."
    )
    staging_gib: float = knob(
        16.0,
        "GiB of host memory that a rank may take for the copy that `asynchronous` writes from; all ranks of a node take at "
        "most a quarter of its memory. Where a rank saves more, the step waits for the disk.",
        above=0,
    )
    give_up_after: int = knob(
        5,
        "Saves that may fail in a row; the last of them ends the run. One that fails is tried again after 10 s, 20 s and so on.",
        at_least=1,
    )
    timeout_seconds: float = knob(
        1800.0,
        "Seconds that a save may take, the last one with all its attempts; after that the run ends, naming rank and file.",
        above=0,
        at_most=1e6,
    )
    in_memory_every: int = knob(
        0,
        "Steps between copies of the state in shared memory, from which torchrun's --max-restarts goes on; 0 means none. A machine "
        "holds up to two copies of what its ranks save.",
        at_least=0,
    )
    in_memory_peer: bool = knob(
        True,
        "Where a run has several machines, each keeps a copy of another's state as well, for its loss: twice the shared memory, and "
        "a step after a copy may wait for the network.",
        effects.COPIED,
    )
    resume: str = knob(
        "auto",
        "Beginning of the run: auto (the newest whole checkpoint, if any), never (anew), or the path of a checkpoint. A run "
        "that is started again goes on from its own checkpoints.",
        path=True,
    )
    weights_only: bool = knob(
        False,
        "Take only the weights, of any layout, from the path in `resume`: steps, data and optimizer state begin anew.",
        effects.FROM_A_PATH,
    )
    accept_changes: tuple[Literal["model", "tokenizer", "data"], ...] = knob(
        (), "Parts that may differ from the checkpoint's when a run resumes; a difference in any other is refused."
    )


@dataclass(frozen=True)
class LogConfig:
    """The run directory, and how often a run writes its logs."""

    dir: str = knob("runs/demo", "Run directory.", path=True)
    every: int = knob(1, "Steps between console lines; metrics.jsonl has every step.", above=0)
    norms_every: int = knob(
        0, "Steps between rows with the norms of gradients and weights of each part of the model; 0 means never.", at_least=0
    )
    stragglers_every: int = knob(
        5,
        "Steps of an interval, at whose end the ranks' own times in a step, without their waits for each other, are compared; 0 means "
        "never.",
        at_least=0,
    )
    slow_ratio: float = knob(
        1.15,
        "A rank is slow that takes this many times as long as the median of its peers, the other ranks of its pipeline stage, or "
        "whose whole stage takes this many times as long as before while the others do not, and not by chance.",
        effects.COMPARED,
        above=1,
    )
    slow_intervals: int = knob(3, "Intervals in a row in which it must do so.", effects.COMPARED, above=0)
    to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = knob(
        ("tensorboard",),
        "Extra writers of metrics.",
        deferred=Deferred(("tensorboard",), "wandb and mlflow come in a later release"),
    )
    peak_tflops: float | None = knob(
        None,
        "Peak TFLOP/s of one device, for MFU; null means the published peak of a known GPU, and on a CPU a measured matrix "
        "product.",
        above=0,
    )
    samples: SamplesConfig = field(default_factory=SamplesConfig)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def checkpoint_dir(self) -> str:
        """The directory of checkpoints: checkpoint.dir, or log.dir/checkpoints."""
        return self.checkpoint.dir or f"{self.log.dir}/checkpoints"

    def data_parallel_size(self, world_size: int) -> int:
        """Number of replicas of the model in a world of `world_size` ranks (validate checks that it divides)."""
        p = self.parallel
        return world_size // (p.tensor_parallel_size * p.pipeline_parallel_size * p.context_parallel_size)

    def shard_size(self, world_size: int) -> int:
        """Number of ranks that share one set of ZeRO's shards in a world of `world_size`; 1 at stage 0."""
        p = self.parallel
        return (p.zero_ranks or self.data_parallel_size(world_size) * p.context_parallel_size) if p.zero_stage else 1


Document = dict[str, Any]
"""A plain tree of mappings, lists and scalars, as YAML gives it."""
