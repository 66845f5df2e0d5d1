"""A model as lm-evaluation-harness sees one (extra [harness]): its tasks under every layout.

    with opened("runs/demo/checkpoints", ["parallel.pipeline_parallel_size=2"]) as model:    # under torchrun, or alone
        results = lm_eval.simple_evaluate(model=MegatrainLM(model), tasks=["my_task"], task_manager=...)

Every rank gives the same requests, the replicas share the work, and every rank gets all results: to the harness each is rank 0 of 1, so
it deals out nothing, and a task may have fewer items than there are replicas.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatrain.chat.conversation import USER, ChatMessage, conversation_of
from megatrain.chat.templates import Chat
from megatrain.evaluation.generation_arguments import GenerationArguments
from megatrain.evaluation.joins import Join, joined, start_of_text
from megatrain.evaluation.scoring import Likelihood, loglikelihoods, on_replicas, rolling
from megatrain.extras import need
from megatrain.inference.opening import Opened
from megatrain.inference.requests import Request
from megatrain.transport.consensus import gather_texts

LM: Any = need("lm_eval.api.model", "an evaluation by lm-evaluation-harness", "harness").LM
_LOG = logging.getLogger(__name__)
MAX_GEN_TOKS = 256
"""New tokens at most where a task does not say, as in the harness."""


class MegatrainLM(LM):
    """A model of megatrain for `lm_eval.simple_evaluate`, to be called alike on every rank."""

    def __init__(self, model: Opened, chat: Chat | None = None, seed: int = 0) -> None:
        """chat: for `apply_chat_template`; seed: of what is sampled. Raises ValueError for a model without a tokenizer."""
        super().__init__()
        self.model, self.codec, self.chat, self.seed = model, model.codec, chat, seed
        self.counts: Counter[str] = Counter()
        """Counts of what was asked so far: requests, joins that a token spans, texts longer than the model's positions."""
        self._rendered: set[str] = set()

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.model.engine.max_length

    @property
    def max_gen_toks(self) -> int:
        """New tokens at most where a task does not say."""
        return min(MAX_GEN_TOKS, max(1, self.max_length // 2))

    @property
    def tokenizer_name(self) -> str:
        """A name that only tokenizers have which encode every text alike; the harness keeps rendered requests under it."""
        probe = "" if self.chat is None else self.chat.written([ChatMessage(USER, "a question")])
        return hashlib.sha256(json.dumps([self.codec.identity, probe]).encode()).hexdigest()[:24]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(sum of log-probabilities in nats, whether each token is the most probable) of continuations after contexts."""
        joins = self._joined(self._arguments("loglikelihood", requests))
        found = loglikelihoods(self.model.engine, joins, self.model.ctx)
        self._count_truncated(found)
        return [(of.total, of.greedy) for of in found]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Sums of log-probabilities of whole documents, in nats; the first token is conditioned on what opens a text, which is put once."""
        texts = self._arguments("loglikelihood_rolling", requests)
        start = tuple(start_of_text(self.codec)) if texts else ()
        documents = [Join(start, tuple(self.codec.encode(text))) for (text,) in texts]
        found = rolling(self.model.engine, documents, self.model.ctx)
        self._count_truncated(found)
        return [of.total for of in found]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Texts that follow contexts, up to the first stop string. Raises ValueError for arguments that are not known."""
        pairs = self._arguments("generate_until", requests)
        asked: Counter[str] = Counter()
        made = []
        for context, arguments in pairs:
            key = json.dumps([context, arguments], sort_keys=True, default=str)
            made.append(self._request(context, arguments, asked[key]))
            asked[key] += 1
        return on_replicas(made, lambda request: len(request.tokens) + request.max_tokens, self._texts, self.model.ctx)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, with marks that `Chat.encode` knows. Raises ValueError where the model has no chat template."""
        text = self._chat().written(conversation_of(chat_history), continue_final_message=not add_generation_prompt)
        self._rendered.add(text)
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's name; None where none is asked for. Raises ValueError where the model has none."""
        return self._chat().name if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """Facts that the harness writes beside its results."""
        model, parallel = self.model, self.model.config.parallel
        sizes = {axis: getattr(model.ctx, axis).size for axis in ("tp", "pp", "dp")}
        return {
            "model": f"megatrain {model.source}",
            "model_dtype": str(model.weights.chunks[0].build.dtype).removeprefix("torch."),
            "layout": {**sizes, "world": model.ctx.world.size, "expert_parallel_size": parallel.expert_parallel_size},
            "tokenizer": self.codec.label,
            "max_length": self.max_length,
            "counts": dict(self.counts),
        }

    def _chat(self) -> Chat:
        if self.chat is None:
            raise ValueError(f"{self.model.source} was given no chat template: MegatrainLM(model, open_chat(codec, folders)).")
        return self.chat

    def _arguments(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        """The arguments of requests. Raises ValueError, on every rank, where they are not the same on all."""
        found = [request.args for request in requests]
        digest = hashlib.sha256(json.dumps([kind, found], default=str).encode()).hexdigest()
        if len(set(gather_texts(digest, self.model.ctx.world.group, self.model.ctx.device))) > 1:
            raise ValueError(
                f"the ranks were given different {kind} requests ({len(found)} on this one). A task that draws at random needs a fixed "
                "seed, and the files of use_cache must hold the same on every rank: delete them, or leave use_cache out."
            )
        self.counts["requests"] += len(found)
        return found

    def _joined(self, pairs: Sequence[tuple[str, str]]) -> list[Join]:
        """Contexts and continuations as ids; a context that the chat template has written is read as such."""
        chat = [pair for pair in pairs if pair[0] in self._rendered]
        plain = iter(joined(self.codec, [pair for pair in pairs if pair[0] not in self._rendered]))
        templated = iter(joined(self.codec, chat, self._chat().encode) if chat else ())
        joins = [next(templated if context in self._rendered else plain) for context, _ in pairs]
        self._count(
            "spanned", sum(join.spanned for join in joins), "continuations begin inside a token, and were encoded alone"
        )
        return joins

    def _request(self, context: str, given: Mapping[str, Any], repeat: int) -> Request:
        """The request for a text. repeat: how often the same one came before: each is drawn anew."""
        arguments = GenerationArguments.of(given)
        if any("\\n" in text for text in arguments.until):
            _LOG.warning('`until` has a backslash and an n: in YAML, a line end is written "\\n", in double quotes')
        most = self.max_gen_toks if arguments.max_tokens is None else arguments.max_tokens
        room = self.max_length - most
        if most < 1 or room < 1:
            raise ValueError(
                f"max_gen_toks={most} leaves no room for a prompt in the model's {self.max_length} positions. Use a number from 1 to "
                f"{self.max_length - 1}."
            )
        encode = self._chat().encode if context in self._rendered else self.codec.encode
        ids = self.codec.beginning.before(encode(context)) or start_of_text(self.codec)
        self.counts["truncated"] += len(ids) > room
        ends, stops = set(self.codec.ending.stops), arguments.until
        if context in self._rendered:
            ends, stops = ends | self._chat().ends, (*stops, *self._chat().stops)
        seed = arguments.seed if arguments.seed is not None else self.seed
        drawn = hashlib.sha256(json.dumps([seed, repeat, context]).encode()).digest()
        return Request(
            tuple(ids[-room:]),
            max_tokens=most,
            sampling=arguments.sampling,
            seed=int.from_bytes(drawn[:7], "little"),
            ends=frozenset(ends),
            stops=stops,
            text=True,
        )

    def _texts(self, requests: Sequence[Request]) -> list[str]:
        return [answer.text for answer in self.model.engine.run(requests)]

    def _count_truncated(self, found: Sequence[Likelihood]) -> None:
        number = sum(of.truncated for of in found)
        self._count(
            "truncated",
            number,
            f"texts are longer than the model's {self.max_length} positions, and were cut or read in windows",
        )

    def _count(self, what: str, number: int, said: str) -> None:
        self.counts[what] += number
        if number and self.model.is_first:
            _LOG.warning("%d %s", number, said)
