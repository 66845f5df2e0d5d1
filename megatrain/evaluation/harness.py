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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from megatrain.chat.conversation import USER, ChatMessage, conversation_of
from megatrain.chat.templates import Chat
from megatrain.data.bar import bar
from megatrain.evaluation.chat_format import TemplateFormat
from megatrain.evaluation.generation_arguments import GenerationArguments
from megatrain.evaluation.prepared import Preparing, ToScore
from megatrain.evaluation.prompts import Manner
from megatrain.evaluation.scoring import Advance, answers_of, on_replicas, sums_of
from megatrain.evaluation.subject import Subject, blank_tokens
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
        blanks = blank_tokens(model.config, self.codec, model.engine.vocab_size, model.marks)
        self._subject = Subject(model.engine, self.codec, model.ctx, blanks)

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
        pairs = self._arguments("loglikelihood", requests)
        chats = [context in self._rendered for context, _ in pairs]
        found = {
            chat: iter(self._texts(chat).pairs([pair for pair, of in zip(pairs, chats, strict=True) if of == chat]))
            for chat in set(chats)
        }
        return self._sums([next(found[chat]) for chat in chats])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Sums of log-probabilities of whole documents, in nats; the first token is conditioned on what opens a text, which is put once."""
        texts = self._arguments("loglikelihood_rolling", requests)
        return [total for total, _ in self._sums([self._texts(False).document(text) for (text,) in texts])]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Texts that follow contexts, up to the first stop string. Raises ValueError for arguments that are not known."""
        asked: Counter[str] = Counter()
        made: list[Request] = []
        for context, arguments in self._arguments("generate_until", requests):
            key = json.dumps([context, arguments], sort_keys=True, default=str)
            made.append(self._request(context, arguments, asked[key]))
            asked[key] += 1
        if self.model.is_first and any("\\n" in text for request in made for text in request.stops):
            _LOG.warning('`until` has a backslash and an n: in YAML, a line end is "\\n", in double quotes')

        def write(part: Sequence[Request]) -> list[str]:
            return [answer.text for answer in answers_of(self.model.engine, part, advance)]

        with self._progress(len(made)) as advance:
            return on_replicas(
                self.model.engine, made, lambda request: len(request.tokens) + request.max_tokens, write, self.model.ctx
            )

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

    def _texts(self, chat: bool) -> Preparing:
        """How texts become tokens: by the chat template that has written them, or as they are."""
        return self._subject.texts(Manner(chat=TemplateFormat(self._chat()) if chat else None))

    def _sums(self, texts: Sequence[ToScore]) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether each token is the most probable) of texts."""
        self._count("spanned", sum(text.spanned for text in texts), "answers begin inside a token, and were encoded alone")
        longer = f"texts are longer than the model's {self.max_length} positions, and were cut or read in windows"
        self._count("truncated", sum(text.cut for text in texts), longer)
        with self._progress(len({window for text in texts for window in text.windows})) as advance:
            return sums_of(self.model.engine, [text.windows for text in texts], self.model.ctx, advance)

    @contextmanager
    def _progress(self, requests: int) -> Iterator[Advance]:
        """A bar on a terminal, of the first rank's share."""
        if not self.model.is_first:
            yield lambda _count: None
            return
        with bar("requests", requests // self.model.ctx.dp.size) as advance:
            yield advance

    def _request(self, context: str, given: Mapping[str, Any], repeat: int) -> Request:
        """The request for a text. repeat: how often the same one came before: each is drawn anew."""
        arguments = GenerationArguments.of(given)
        most = self.max_gen_toks if arguments.max_tokens is None else arguments.max_tokens
        room = self.max_length - most
        if most < 1 or room < 1:
            raise ValueError(
                f"max_gen_toks={most} leaves no room for a prompt in the model's {self.max_length} positions. Use a number from 1 to "
                f"{self.max_length - 1}."
            )
        texts = self._texts(context in self._rendered)
        prompt = texts.prompt(context, most)
        self.counts["truncated"] += prompt.cut
        seed = arguments.seed if arguments.seed is not None else self.seed
        drawn = hashlib.sha256(json.dumps([seed, repeat, context]).encode()).digest()
        return Request(
            prompt.tokens,
            max_tokens=most,
            sampling=replace(arguments.sampling, never=texts.never),
            seed=int.from_bytes(drawn[:7], "little"),
            ends=texts.ends,
            stops=(*arguments.until, *texts.stops),
            text=True,
            places=prompt.places,
        )

    def _count(self, what: str, number: int, said: str) -> None:
        self.counts[what] += number
        if number and self.model.is_first:
            _LOG.warning("%d %s", number, said)
