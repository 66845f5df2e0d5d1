"""The `model` section: the logical model's shapes and switches, and properties derived from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatrain.config import effects
from megatrain.config.knob import knob


@dataclass(frozen=True)
class ModelConfig:
    """The logical model: shapes and switches, independent of any layout."""

    family: Literal["gpt", "glm"] = knob("gpt", "Model family; glm has learned_2d positions where `position` is not given.")
    preset: str | None = knob(
        None, "Name of a published shape (config/presets.py lists them); explicit keys win over its keys."
    )
    init_from: str | None = knob(None, "Hugging Face directory or checkpoint to take initial weights from.", path=True)
    num_layers: int = knob(8, "Number of transformer blocks.", above=0, at_most=1 << 16)
    hidden_size: int = knob(512, "Width h of the residual stream.", above=0, at_most=1 << 24)
    num_attention_heads: int = knob(8, "Query heads a of each layer.", above=0, at_most=1 << 16)
    head_dim: int | None = knob(
        None, "Width d of one attention head; null means hidden_size / num_attention_heads.", above=0, at_most=1 << 16
    )
    num_query_groups: int | None = knob(
        None,
        "Key/value heads of each layer (grouped-query attention, arXiv:2305.13245); null means num_attention_heads, 1 is "
        "multi-query.",
        above=0,
        at_most=1 << 16,
    )
    ffn_hidden_size: int | None = knob(
        None,
        "Inner width of the MLP; null means 4 h, and for gated activations 8/3 h rounded up to a multiple of 64.",
        above=0,
        at_most=1 << 24,
    )
    seq_length: int = knob(512, "Tokens per training sample.", above=0, at_most=1 << 24)
    max_positions: int | None = knob(
        None,
        "Number of positions: rows of the learned table, and the longest text when decoding; null means seq_length.",
        effects.POSITIONS,
        above=0,
        at_most=1 << 24,
    )
    vocab_size: int | None = knob(None, "Vocabulary size v; null means the tokenizer's.", above=0, at_most=1 << 24)
    norm: Literal["layernorm", "rmsnorm"] = knob("layernorm", "Normalisation (arXiv:1607.06450; RMSNorm arXiv:1910.07467).")
    norm_eps: float = knob(1e-5, "Added to the variance inside every norm.", above=0)
    norm_placement: Literal["pre", "post", "deepnorm", "sandwich"] = knob("pre", "Where the norms sit in a block.")
    deepnorm_alpha: float | None = knob(
        None,
        "deepnorm: factor of the residual (arXiv:2203.00555); null means sqrt(2 num_layers), as in GLM-130B.",
        effects.DEEPNORM,
        above=0,
    )
    activation: Literal["gelu_tanh", "gelu", "relu", "swiglu", "geglu"] = knob(
        "gelu_tanh", "MLP activation; swiglu and geglu are gated (arXiv:2002.05202)."
    )
    position: Literal["learned", "rope", "alibi", "none", "learned_2d", "rope_2d"] = knob(
        "learned",
        "Position encoding; rope is arXiv:2104.09864, alibi arXiv:2108.12409, learned_2d and rope_2d have a second position within "
        "a blank (GLM, arXiv:2103.10360, section 2.2; ChatGLM-6B).",
    )
    rope_theta: float = knob(10000.0, "Base of the rotary frequencies.", effects.ROTARY, above=1)
    rope_fraction: float = knob(
        1.0,
        "Share of each head's numbers that is rotated (GPT-NeoX, arXiv:2204.06745: 0.25).",
        effects.ROTARY,
        above=0,
        at_most=1,
    )
    rope_interleaved: bool = knob(
        False,
        "Rotate pairs of neighbours (GPT-J) rather than pairs of the two halves of a head (arXiv:2104.09864).",
        effects.ROTARY,
    )
    rope_angle_dtype: Literal["fp32", "fp16"] = knob(
        "fp32",
        "fp16 rounds the angles as the training of ChatGLM-6B did, for its released weights alone; fp32 computes them exactly.",
        effects.ROTARY,
    )
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = knob(
        "none",
        "Lower frequencies for longer texts: linear arXiv:2306.15595, llama3 arXiv:2407.21783, yarn arXiv:2309.00071.",
        effects.STRETCHED,
    )
    rope_factor: float = knob(
        1.0, "rope_scaling: length of the new texts over that of the first training's.", effects.SCALED, at_least=1
    )
    rope_original_length: int | None = knob(
        None,
        "rope_scaling: tokens of the first training's texts; null means max_positions / rope_factor.",
        effects.FROM_ORIGINAL,
        above=0,
    )
    rope_low_freq_factor: float = knob(
        1.0,
        "llama3: pairs with fewer periods than this in the original length are scaled by the whole factor.",
        effects.LLAMA3,
        above=0,
    )
    rope_high_freq_factor: float = knob(
        4.0, "llama3: pairs with more periods than this are not scaled.", effects.LLAMA3, above=0
    )
    rope_beta_fast: float = knob(
        32.0, "yarn: pairs with more turns than this in the original length are not scaled.", effects.YARN, above=0
    )
    rope_beta_slow: float = knob(
        1.0, "yarn: pairs with fewer turns than this are scaled by the whole factor.", effects.YARN, above=0
    )
    window: int | None = knob(
        None,
        "Sliding window: number of keys that a query sees, its own included (arXiv:2004.05150; Mistral, arXiv:2310.06825); "
        "null means all.",
        above=0,
    )
    window_pattern: tuple[Literal["local", "global"], ...] = knob(
        ("local",),
        "Which layers have the window (local) and which see all (global), repeated over the layers: [local, global] (Gemma 2, "
        "arXiv:2408.00118, section 2; GPT-OSS), or five local and one global (Gemma 3, arXiv:2503.19786, section 2).",
        effects.WINDOW,
    )
    sparse_block: int | None = knob(
        None,
        "Block-sparse attention: tokens of a block (arXiv:1904.10509; arXiv:2007.14062, section 2); null means dense "
        "attention.",
        above=0,
    )
    sparse_local_blocks: int = knob(
        4,
        "Block-sparse attention: number of blocks, up to its own, that a query sees (arXiv:2007.14062).",
        effects.SPARSE,
        above=0,
    )
    sparse_global_blocks: int = knob(
        1, "Block-sparse attention: number of first blocks that all queries see (arXiv:2007.14062).", effects.SPARSE, at_least=0
    )
    bias: bool = knob(True, "Biases in the linear layers and, with layernorm, in the norms.")
    qkv_bias: bool | None = knob(None, "Biases of queries, keys and values; null means as `bias` (Qwen2 has them there alone).")
    qk_norm: bool = knob(False, "Normalise every head's queries and keys, over d (arXiv:2302.05442; Qwen3, arXiv:2505.09388).")
    embedding_norm: bool = knob(False, "Normalise the sum of token and position embeddings (BLOOM, arXiv:2211.05100).")
    tied_embeddings: bool = knob(True, "The output head shares the token embedding (arXiv:1608.05859).")
    logit_softcap: float = knob(
        0.0, "c: logits become c tanh(logits / c) (Gemma 2, arXiv:2408.00118, section 2); 0 leaves them.", at_least=0
    )
    dropout: float = knob(
        0.0, "Dropout probability on the embedding and on both residual branches (JMLR 15, 2014).", at_least=0, below=1
    )
    attention_dropout: float = knob(
        0.0,
        "Dropout probability of attention's weights (arXiv:1706.03762); on GPUs fast in 16 bits with heads up to 128, without ALiBi and "
        "block-sparse masks.",
        at_least=0,
        below=1,
    )
    softmax_fp32: bool = knob(
        True,
        "Add ALiBi's biases to the scores in float32 in a 16-bit run; the softmax is computed in float32 either way "
        "(arXiv:1710.03740, 3.3).",
        effects.ALIBI,
    )
    residual_fp32: bool = knob(False, "Keep the residual stream in float32 in a 16-bit run (arXiv:1710.03740).", effects.HALF)
    init: Literal["normal", "small", "fan_in", "xavier"] = knob(
        "normal",
        "Standard deviation of the initial weights. normal: init_std; small: sqrt(2 / 5h) (arXiv:1910.05895); fan_in: 1 / "
        "sqrt(inputs) of each matrix; xavier: sqrt(2 / (inputs + outputs)), with embeddings of init_std (GLM-130B).",
    )
    init_std: float = knob(
        0.02, "Standard deviation of the normal initialisation of weights (GPT-2).", effects.INIT_STD, above=0
    )
    embedding_init_std: float | None = knob(None, "Standard deviation of the embeddings; null means as `init` says.", above=0)
    scale_residual_init: bool = knob(
        True,
        "Divide the standard deviation by sqrt(2 num_layers) for weights that write into the residual stream (GPT-2), and "
        "with deepnorm for those of values and of the MLP's first matrices (GLM-130B).",
    )
    embedding_grad_scale: float = knob(
        1.0,
        "Factor of the token embedding's gradient, against loss spikes (GLM-130B: 0.1; arXiv:2210.02414, section 3.3).",
        above=0,
        at_most=1,
    )
    embedding_grad_steps: tuple[int, int] | None = knob(
        None,
        "[hold, rise]: use embedding_grad_scale for `hold` steps, then raise it linearly to 1 over `rise` steps; null keeps "
        "it for the whole run.",
        effects.DAMPED,
        at_least=0,
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
        """Number of positions: tokens of the longest text."""
        return self.seq_length if self.max_positions is None else self.max_positions

    @property
    def position_rows(self) -> int:
        """Rows of a table of positions; with two-dimensional positions one more, row 0 for tokens that are in no blank."""
        return self.positions + self.two_dimensional

    @property
    def rotated(self) -> int:
        """Numbers r of each head (with rope_2d: of each half of a head) that are rotated; even."""
        size = self.head_size // 2 if self.position == "rope_2d" else self.head_size
        return int(size * self.rope_fraction) // 2 * 2

    @property
    def residual_scale(self) -> float:
        """Factor of the residual stream where a branch is added to it; 1 but for deepnorm."""
        if self.norm_placement != "deepnorm":
            return 1.0
        return (2 * self.num_layers) ** 0.5 if self.deepnorm_alpha is None else self.deepnorm_alpha

    def embedding_grad(self, step: int) -> float:
        """Factor of the token embedding's gradient in step `step`, counted from 0."""
        if self.embedding_grad_steps is None:
            return self.embedding_grad_scale
        hold, rise = self.embedding_grad_steps
        share = min(max((step - hold) / max(rise, 1), 0.0), 1.0)
        return self.embedding_grad_scale + (1 - self.embedding_grad_scale) * share

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer; None where it sees all."""
        pattern = self.window_pattern
        return tuple(self.window if pattern[n % len(pattern)] == "local" else None for n in range(self.num_layers))

    @property
    def sparse(self) -> tuple[int, int, int] | None:
        """(tokens of a block, local blocks, global blocks) of block-sparse attention."""
        return None if self.sparse_block is None else (self.sparse_block, self.sparse_local_blocks, self.sparse_global_blocks)

    @property
    def original_length(self) -> float:
        """Length, in tokens, of the texts of the first training, before the rotary frequencies were scaled."""
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
