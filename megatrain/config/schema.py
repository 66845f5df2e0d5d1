"""Every knob of megatrain: typed, defaulted, explained. Nothing else; imports only the standard library.

A config is a tree of frozen dataclasses. Each field is made by `knob(default, doc)`; the docstring travels in the field's
metadata and becomes `docs/config.md`. Values that follow from other values are properties, never fields. How YAML becomes
these objects is in `load.py`; the rules between knobs (and what a later release will allow) are in `validate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatrain.config.glm import GlmConfig
from megatrain.config.knob import knob


@dataclass(frozen=True)
class ModelConfig:
    """The logical model: shapes and switches, independent of any layout."""

    family: Literal["gpt", "glm"] = knob("gpt", "Model family; glm has learned_2d positions where `position` is not given.")
    preset: str | None = knob(
        None, "Name of a published shape (config/presets.py lists them); explicit keys win over its keys."
    )
    init_from: str | None = knob(None, "Hugging Face directory or checkpoint to take initial weights from.")
    num_layers: int = knob(8, "Number of transformer blocks.")
    hidden_size: int = knob(512, "Width h of the residual stream.")
    num_attention_heads: int = knob(8, "Query heads a.")
    head_dim: int | None = knob(None, "Width d of one attention head; null means hidden_size / num_attention_heads.")
    num_query_groups: int | None = knob(
        None, "Key/value heads (grouped-query attention, arXiv:2305.13245); null means num_attention_heads, 1 is multi-query."
    )
    ffn_hidden_size: int | None = knob(
        None, "Inner width of the MLP; null means 4 h, and for gated activations 8/3 h rounded up to a multiple of 64."
    )
    seq_length: int = knob(512, "Tokens per training sample.")
    max_positions: int | None = knob(
        None, "Positions that there are: rows of the learned table, and how far decoding goes; null means seq_length."
    )
    vocab_size: int | None = knob(None, "Vocabulary size v; null means the tokenizer's.")
    norm: Literal["layernorm", "rmsnorm"] = knob("layernorm", "Normalisation (arXiv:1607.06450; RMSNorm arXiv:1910.07467).")
    norm_eps: float = knob(1e-5, "Added to the variance inside every norm.")
    norm_placement: Literal["pre", "post", "deepnorm", "sandwich"] = knob("pre", "Where the norms sit in a block.")
    deepnorm_alpha: float | None = knob(
        None, "deepnorm: factor of the residual (arXiv:2203.00555); null means sqrt(2 num_layers), as in GLM-130B."
    )
    activation: Literal["gelu_tanh", "gelu", "relu", "swiglu", "geglu"] = knob(
        "gelu_tanh", "MLP activation; swiglu and geglu are gated (arXiv:2002.05202)."
    )
    position: Literal["learned", "rope", "alibi", "none", "learned_2d", "rope_2d"] = knob(
        "learned",
        "Position encoding; rope is arXiv:2104.09864, alibi arXiv:2108.12409, learned_2d and rope_2d have a second position within "
        "a blank (GLM, arXiv:2103.10360, section 2.2; ChatGLM-6B).",
    )
    rope_theta: float = knob(10000.0, "Base of the rotary frequencies.")
    rope_fraction: float = knob(1.0, "Share of each head's numbers that is rotated (GPT-NeoX, arXiv:2204.06745: 0.25).")
    rope_interleaved: bool = knob(False, "Pairs are neighbours (GPT-J) rather than the two halves (arXiv:2104.09864).")
    rope_angle_dtype: Literal["fp32", "fp16"] = knob(
        "fp32",
        "fp16: angles are rounded as in the training of ChatGLM-6B, for its released weights alone; else they are exact.",
    )
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = knob(
        "none", "Lower frequencies for longer texts: linear arXiv:2306.15595, llama3 arXiv:2407.21783, yarn arXiv:2309.00071."
    )
    rope_factor: float = knob(1.0, "rope_scaling: how much longer the texts are.")
    rope_original_length: int | None = knob(
        None, "rope_scaling: tokens of the first training's texts; null means max_positions / rope_factor."
    )
    rope_low_freq_factor: float = knob(1.0, "llama3: pairs with fewer waves than this in the original length are scaled whole.")
    rope_high_freq_factor: float = knob(4.0, "llama3: pairs with more waves than this stay.")
    rope_beta_fast: float = knob(32.0, "yarn: pairs with more turns than this in the original length stay.")
    rope_beta_slow: float = knob(1.0, "yarn: pairs with fewer turns than this are scaled whole.")
    window: int | None = knob(
        None,
        "Sliding window: keys that a query sees, its own included (arXiv:2004.05150; Mistral, arXiv:2310.06825); null is all.",
    )
    sparse_block: int | None = knob(
        None, "Block-sparse attention: tokens of a block (arXiv:1904.10509; arXiv:2007.14062, section 2); null is dense."
    )
    sparse_local_blocks: int = knob(4, "Block-sparse attention: blocks up to its own that a query sees (arXiv:2007.14062).")
    sparse_global_blocks: int = knob(1, "Block-sparse attention: first blocks that all queries see (arXiv:2007.14062).")
    bias: bool = knob(True, "Biases in the linear layers and, with layernorm, in the norms.")
    qkv_bias: bool | None = knob(None, "Biases of queries, keys and values; null means as `bias` (Qwen2 has them there alone).")
    qk_norm: bool = knob(False, "Normalise every head's queries and keys, over d (arXiv:2302.05442; Qwen3, arXiv:2505.09388).")
    embedding_norm: bool = knob(False, "Normalise the sum of token and position embeddings (BLOOM, arXiv:2211.05100).")
    tied_embeddings: bool = knob(True, "The output head shares the token embedding (arXiv:1608.05859).")
    logit_softcap: float = knob(
        0.0, "c: logits become c tanh(logits / c) (Gemma 2, arXiv:2408.00118, section 2); 0 leaves them."
    )
    dropout: float = knob(0.0, "Dropout probability on the embedding and on both residual branches (JMLR 15, 2014).")
    attention_dropout: float = knob(
        0.0, "Dropout probability of attention's weights (arXiv:1706.03762); on GPUs it takes the slow blockwise attention."
    )
    softmax_fp32: bool = knob(
        True, "ALiBi is added in float32 in a bf16 run; a softmax is float32 inside anyway (arXiv:1710.03740, 3.3)."
    )
    residual_fp32: bool = knob(False, "Keep the residual stream in float32 where the run is in bf16 (arXiv:1710.03740).")
    init: Literal["normal", "small", "fan_in", "xavier"] = knob(
        "normal",
        "Standard deviation of the initial weights: init_std, sqrt(2 / 5h) (arXiv:1910.05895), or of each matrix 1 / sqrt(inputs), or "
        "sqrt(2 / (inputs + outputs)), with embeddings of init_std (GLM-130B).",
    )
    init_std: float = knob(0.02, "Standard deviation of the normal initialisation of weights (GPT-2).")
    embedding_init_std: float | None = knob(None, "Standard deviation of the embeddings; null means as `init` says.")
    scale_residual_init: bool = knob(
        True,
        "Divide the deviation by sqrt(2 num_layers) for weights that write into the residual stream (GPT-2), and with deepnorm for "
        "those of values and of the MLP's first matrices (GLM-130B).",
    )
    embedding_grad_scale: float = knob(
        1.0, "Factor of the token embedding's gradient, against loss spikes (GLM-130B: 0.1; arXiv:2210.02414, section 3.3)."
    )
    embedding_grad_steps: tuple[int, int] | None = knob(
        None, "[hold, rise]: embedding_grad_scale for so many steps, then linearly to 1 over so many; null keeps it."
    )

    @property
    def head_size(self) -> int:
        """Width d of one attention head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated."""
        return self.position in ("rope", "rope_2d")

    @property
    def two_dimensional(self) -> bool:
        """Whether a token has a second position, within a blank."""
        return self.position in ("learned_2d", "rope_2d")

    @property
    def learned_positions(self) -> bool:
        """Whether positions are rows of a table."""
        return self.position in ("learned", "learned_2d")

    @property
    def positions(self) -> int:
        """Tokens of the longest text."""
        return self.seq_length if self.max_positions is None else self.max_positions

    @property
    def position_rows(self) -> int:
        """Rows of a table of positions: with a second one, 0 stands for no blank."""
        return self.positions + self.two_dimensional

    @property
    def rotated(self) -> int:
        """Numbers r of each head, or with rope_2d of each half of it, that are rotated; an even number."""
        size = self.head_size // 2 if self.position == "rope_2d" else self.head_size
        return int(size * self.rope_fraction) // 2 * 2

    @property
    def residual_scale(self) -> float:
        """What the residual stream is multiplied by where a branch is added to it."""
        if self.norm_placement != "deepnorm":
            return 1.0
        return (2 * self.num_layers) ** 0.5 if self.deepnorm_alpha is None else self.deepnorm_alpha

    def embedding_grad(self, step: int) -> float:
        """Factor of the token embedding's gradient in a step, from 0."""
        if self.embedding_grad_steps is None:
            return self.embedding_grad_scale
        hold, rise = self.embedding_grad_steps
        share = min(max((step - hold) / max(rise, 1), 0.0), 1.0)
        return self.embedding_grad_scale + (1 - self.embedding_grad_scale) * share

    @property
    def sparse(self) -> tuple[int, int, int] | None:
        """(tokens of a block, local blocks, global blocks) of block-sparse attention."""
        return None if self.sparse_block is None else (self.sparse_block, self.sparse_local_blocks, self.sparse_global_blocks)

    @property
    def original_length(self) -> float:
        """Tokens of the texts that the rotary frequencies were first trained on."""
        return self.positions / self.rope_factor if self.rope_original_length is None else self.rope_original_length

    @property
    def qkv_biased(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate matrix beside the up matrix."""
        return self.activation in ("swiglu", "geglu")

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if not self.gated:
            return 4 * self.hidden_size
        return -(-8 * self.hidden_size // 3 // 64) * 64


@dataclass(frozen=True)
class ParallelConfig:
    """How the logical model is laid out over ranks. data_parallel_size is what remains of the world."""

    tensor_parallel_size: int = knob(1, "Ranks that share each layer's matrices (Megatron, arXiv:1909.08053).")
    sequence_parallel: bool = knob(False, "Split activations along the sequence between the matrices (arXiv:2205.05198).")
    pipeline_parallel_size: int = knob(1, "Pipeline stages.")
    virtual_pipeline_size: int = knob(1, "Model chunks per stage.")
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"] = knob("1f1b", "Pipeline schedule.")
    layer_split: tuple[int, ...] | None = knob(
        None, "Layers of each virtual stage, in order, such as [5, 6, 6, 5]; null balances them by their FLOPs."
    )
    context_parallel_size: int = knob(1, "Ranks that share one sequence through all layers.")
    expert_parallel_size: int = knob(1, "Ranks that share the experts.")
    zero_stage: Literal[0, 1, 2, 3] = knob(
        1,
        "What the data-parallel ranks shard (ZeRO, arXiv:1910.02054): 1 optimizer states, 2 and gradients, 3 and parameters; 0 nothing.",
    )
    bucket_size: int = knob(8_000_000, "Parameters that are reduced and gathered over the data-parallel ranks at a time.")
    overlap: bool = knob(True, "Reduce gradients beside the backward and gather parameters beside the forward.")
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "Where tensors live; auto takes CUDA where there is one.")
    backend: Literal["auto", "gloo", "nccl"] = knob("auto", "Collectives library; auto is nccl on CUDA and gloo on CPU.")


@dataclass(frozen=True)
class CorpusConfig:
    """One token store of a blend."""

    path: str = knob("", "Prefix of the .bin/.idx pair.")
    weight: float = knob(1.0, "Share of the samples, relative to the other corpora of the list.")
    answers: str | None = knob(
        None, "data.train with objective=glm: prefix of the answers, where `path` holds prompts: a multi-task share (GLM-130B)."
    )
    set: str = knob("", "data.valid: name of the validation set; a mapping of names to lists is the same.")


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from."""

    train: tuple[CorpusConfig, ...] = knob((), "Training corpora: a list of {path, weight}; a plain string is a list of one.")
    valid: tuple[CorpusConfig, ...] = knob(
        (), "Held-out corpora, as `train`, or a mapping of names to such lists: several validation sets."
    )
    isolate_documents: bool = knob(
        False,
        "Documents packed in one sample do not see each other, and positions count from each one's start (arXiv:2407.21783).",
    )
    objective: Literal["next_token", "glm"] = knob(
        "next_token", "What a sample teaches: each next token, or to fill blanks (GLM, arXiv:2103.10360), as `glm` says."
    )
    glm: GlmConfig = field(default_factory=GlmConfig)
    tokenizer: str | None = knob(None, "tokenizer.json of the `tokenizers` library, or `bytes`.")
    eod: int | str | None = knob(
        None,
        "Token that ends a document, by name or id, or `none`; null: found in the files beside the tokenizer, or by its name.",
    )
    bos: int | str | None = knob(
        None, "Token that is put before a document, by name or id, or `none`; null: what the tokenizer puts there, if anything."
    )
    cache_dir: str | None = knob(None, "Where sample indices are cached; null means `index_cache` beside each store.")

    @property
    def has_answers(self) -> bool:
        """Whether a training corpus is made of prompts and answers."""
        return any(corpus.answers is not None for corpus in self.train)

    @property
    def drawn_per_micro_batch(self) -> bool:
        """Whether a sample also depends on which micro-batch it is in, so that another train.micro_batch_size is other data."""
        return self.objective == "glm"


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "adam", "sgd", "muon"] = knob(
        "adamw", "adamw: decoupled decay (arXiv:1711.05101); adam: L2 in the gradient (arXiv:1412.6980); sgd: with momentum."
    )
    lr: float = knob(3e-4, "Peak learning rate.")
    min_lr: float = knob(3e-5, "Learning rate at the end of the decay.")
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = knob(
        "cosine", "Shape after the warm-up; wsd (arXiv:2404.06395) stays at lr and decays over the last decay_fraction."
    )
    warmup_steps: int = knob(100, "Steps of linear warm-up.")
    decay_fraction: float = knob(0.1, "wsd: share of all steps, at the end, that decays linearly to min_lr.")
    weight_decay: float = knob(0.1, "Decay of matrices; biases and norm weights have none.")
    weight_decay_end: float | None = knob(None, "Decay at the last step, approached linearly; null keeps it constant.")
    master: Literal["fp32", "split"] = knob(
        "fp32",
        "bf16 runs: FP32 master weights beside the parameters, or split: the 16 bits that those lack, 2 bytes less each.",
    )
    betas: tuple[float, float] = knob((0.9, 0.95), "Adam's moment decay rates.")
    eps: float = knob(1e-8, "Adam's epsilon.")
    momentum: float = knob(0.9, "sgd's momentum.")
    clip_grad: float = knob(1.0, "Largest global gradient norm; 0 switches clipping off.")


@dataclass(frozen=True)
class TrainConfig:
    """The run: how long, how much at a time, in what precision."""

    steps: int = knob(1000, "Optimizer updates.")
    tokens: float | None = knob(
        None, "Token budget instead of steps: the last update is the one that reaches it, and schedules are counted in tokens."
    )
    global_batch_size: int = knob(32, "Sequences per optimizer update, over all ranks.")
    batch_ramp: tuple[int, int, int] | None = knob(
        None,
        "[start, increment, samples]: begin with batches of `start` and grow to global_batch_size over so many samples "
        "(arXiv:2005.14165, appendix B).",
    )
    micro_batch_size: int = knob(4, "Sequences per forward pass of one rank.")
    seed: int = knob(1234, "Seed of weights, data order and dropout.")
    precision: Literal["bf16", "fp16", "fp32", "fp64"] = knob(
        "bf16", "bf16: BF16 weights with FP32 masters and FP32 gradient accumulation; fp64 is for checks on CPU."
    )
    kernels: Literal["auto", "triton", "reference"] = knob(
        "auto",
        "Implementation of norms, rotation, gates and losses: auto is Triton on CUDA, else plain PyTorch (kernels/dispatch.py).",
    )
    compile: Literal["none", "block"] = knob(
        "none",
        "block: torch.compile what lies between a block's matrix products (kernels/compiled.py); on CPU it needs a C++ compiler.",
    )
    recompute: Literal["none", "selective", "full"] = knob("none", "Activation recomputation (arXiv:2205.05198).")
    label_smoothing: float = knob(
        0.0, "Share of the target's probability that is spread over the vocabulary, in training (arXiv:1512.00567, section 7)."
    )
    z_loss: float = knob(
        0.0, "Weight of the squared log of the softmax's sum, in training (PaLM, arXiv:2204.02311, section 5)."
    )
    loss_chunk: int = knob(
        0, "Tokens of a micro-batch whose logits exist at a time; made again in the backward (arXiv:2411.09009). 0 means all."
    )
    skip_steps: tuple[int, ...] = knob(
        (),
        "Steps, from 1, whose batch is consumed without an update: where a loss spiked before (PaLM, arXiv:2204.02311, section 5.1).",
    )
    loss_scale: float = knob(
        65536.0, "fp16: first scale of the loss, so that small gradients do not vanish (arXiv:1710.03740)."
    )
    loss_scale_window: int = knob(1000, "fp16: updates without an overflow after which the scale doubles.")
    loss_scale_hysteresis: int = knob(2, "fp16: overflows, without such a window between, after which the scale halves.")
    loss_scale_min: float = knob(1.0, "fp16: the scale never falls below.")
    exit_after_minutes: float | None = knob(None, "Stop after this time with a checkpoint and exit code 75, as on a signal.")
    exit_before_end_minutes: float = knob(
        2.0, "Under SLURM, stop as on a signal so long before the job's time limit. More than a step and a checkpoint take."
    )
    exit_file: str | None = knob(None, "Stop with a checkpoint and exit code 75 as soon as this file exists.")
    eval_every: int = knob(100, "Steps between evaluations; 0 means only at the end.")
    eval_batches: int = knob(8, "Global batches per evaluation; 0 means the whole held-out set, once.")
    audit_every: int = knob(
        500,
        "Steps between comparisons of what several ranks hold copies of, bit by bit; a difference ends the run. 0 means never.",
    )
    hang_timeout_seconds: float = knob(600.0, "Limit of every collective; then the run ends, naming axis, call and culprit.")
    deterministic: bool = knob(False, "The same bits on every run of the same layout (torch.use_deterministic_algorithms).")


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where the state is saved."""

    dir: str | None = knob(None, "Directory of the checkpoints; null means log.dir/checkpoints.")
    save_every: int = knob(200, "Steps between checkpoints; 0 means only at the end.")
    keep: int = knob(3, "How many of the newest checkpoints to keep; 0 keeps all.")
    keep_every: int = knob(0, "Checkpoints of steps that are multiples of this stay as well; 0: none.")
    asynchronous: bool = knob(
        True, "Train on while a checkpoint is written; a step waits only for a copy of what its rank saves."
    )
    staging_gib: float = knob(
        16.0, "GiB of host memory a rank may take for that copy; where it saves more, the step waits for the disk."
    )
    resume: str = knob(
        "auto",
        "Where a run begins: auto (the newest whole checkpoint, if any), never (anew), or the path of a checkpoint; the same command goes "
        "on from what the run has saved itself.",
    )
    weights_only: bool = knob(
        False,
        "Begin from the weights at resume=PATH alone, of any layout: steps, data and optimizer state begin anew.",
    )
    accept_changes: tuple[Literal["model", "tokenizer", "data"], ...] = knob(
        (), "What may be another than when the checkpoint was saved; else such a change is refused."
    )


@dataclass(frozen=True)
class LogConfig:
    """What is written where people look."""

    dir: str = knob("runs/demo", "Run directory.")
    every: int = knob(1, "Steps between console lines; metrics.jsonl has every step.")
    norms_every: int = knob(
        0, "Steps between rows with the norms of gradients and weights of each part of the model; 0 means never."
    )
    to: tuple[str, ...] = knob(("tensorboard",), "Extra writers: tensorboard.")
    peak_tflops: float | None = knob(
        None, "Peak TFLOP/s of one device, for MFU; null means the published peak of a known GPU, and a measured matmul on CPU."
    )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def checkpoint_dir(self) -> str:
        """Directory of the checkpoints."""
        return self.checkpoint.dir or f"{self.log.dir}/checkpoints"

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model in a world of `world_size` ranks (checked by validate)."""
        p = self.parallel
        return world_size // (p.tensor_parallel_size * p.pipeline_parallel_size * p.context_parallel_size)


Document = dict[str, Any]
"""A plain tree of mappings, lists and scalars, as YAML gives it."""
