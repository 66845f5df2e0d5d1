"""From the body of a request to requests of the engine: prompts as tokens, and how the answers are to be decoded."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatrain.inference.requests import Request, Sampling
from megatrain.serving.bodies import ChatBody, CompletionBody, Decoding
from megatrain.serving.refusal import Refusal
from megatrain.serving.served import Served

COMPLETION_TOKENS = 16
"""max_tokens of a completion that says nothing, as OpenAI's."""
_SEEDS = 1 << 63
_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of two choices of one request; odd, so that no two are equal."""


@dataclass(frozen=True)
class PromptOrder:
    """One HTTP request, as the engine is asked."""

    requests: tuple[Request, ...]
    """The choices of the first prompt, then those of the second ..."""
    prompts: tuple[str, ...]
    """The text of each prompt, as it is echoed."""
    n: int
    """Choices of each prompt."""
    effective: dict[str, Any]
    """How the answers are decoded."""
    logprobs: int | None
    """Number of most probable tokens to be shown beside the chosen ones; None: no log-probabilities are."""

    @property
    def header(self) -> str:
        """The effective parameters, in ASCII."""
        return json.dumps(self.effective)

    @property
    def scores_prompts(self) -> bool:
        """Whether prompts are echoed with their log-probabilities."""
        return self.logprobs is not None and bool(self.prompts)

    def scoring(self) -> tuple[Request, ...]:
        """Requests that score the prompts alone."""
        return tuple(replace(each, max_tokens=0, stops=(), text=False) for each in self.requests[:: self.n])


def completion_order(body: CompletionBody, served: Served) -> PromptOrder:
    """A completion. Raises Refusal."""
    if body.max_tokens == 0 and not body.echo:
        raise Refusal(
            "max_tokens is 0, so nothing is asked for. Use 1 or more, or echo to have the prompt scored.", "max_tokens"
        )
    if served.infill is not None and not body.echo and all(isinstance(prompt, str) for prompt in body.prompt):
        return _infilling_order(body, served, served.infill)
    if body.suffix is not None:
        why = "echo shows a text from left to right" if body.echo else "a blank is filled in a text, not in token ids"
        why = f"{served.name} continues texts, and only a GLM fills blanks in them" if served.infill is None else why
        raise Refusal(f"suffix cannot be used: {why}. Leave it out.", "suffix", code="unsupported_parameter")
    wanted = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    requests = []
    for prompt in body.prompt:
        tokens = served.encode(prompt, body.add_special_tokens)
        most = served.require_fits(tokens, wanted, "prompt")
        requests.append(_request(body, served, tokens, most, body.logprobs, body.echo and body.logprobs is not None))
    texts = (
        tuple(prompt if isinstance(prompt, str) else served.codec.decode(prompt) for prompt in body.prompt) if body.echo else ()
    )
    return _order(body, requests, texts, body.logprobs, wanted)


def chat_order(body: ChatBody, served: Served) -> PromptOrder:
    """A chat. Raises Refusal."""
    if body.top_logprobs and not body.logprobs:
        raise Refusal("top_logprobs needs logprobs. Add logprobs: true.", "top_logprobs")
    if body.max_tokens == 0:
        raise Refusal("max_tokens: 0 is not a whole number from 1 on. Try 100.", "max_tokens", code="invalid_value")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        both = f"max_tokens={body.max_tokens} and max_completion_tokens={body.max_completion_tokens}"
        raise Refusal(f"{both} say the same thing differently. Give one of them.", "max_completion_tokens")
    tokens = served.converse(body.messages, body.continue_final_message, body.chat_template_kwargs)
    wanted = body.max_completion_tokens or body.max_tokens
    most = served.require_fits(tokens, wanted, "messages")
    top = body.top_logprobs if body.logprobs else None
    return _order(body, [_request(body, served, tokens, most, top, False)], (), top, most)


def _infilling_order(body: CompletionBody, served: Served, infill: Any) -> PromptOrder:
    """A completion of a model that fills blanks: one between prompt and suffix, where the prompt says, or at its end."""
    wanted = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    requests = []
    for prompt in body.prompt:
        plain = _request(body, served, (), wanted, body.logprobs, False)
        try:
            request = infill(prompt, body.suffix, plain)
        except ValueError as error:
            raise Refusal(str(error), "prompt" if body.suffix is None else "suffix") from None
        served.require_fits(request.tokens, wanted, "prompt")
        requests.append(request)
    return _order(body, requests, (), body.logprobs, wanted)


def _request(
    body: Decoding, served: Served, tokens: tuple[int, ...], max_tokens: int, top: int | None, score_prompt: bool
) -> Request:
    """One choice of a prompt; its seed is set later."""
    for name, named in (("logit_bias", [token for token, _ in body.logit_bias]), ("stop_token_ids", body.stop_token_ids)):
        wrong = [token for token in named if token >= served.vocab_size]
        if wrong:
            raise Refusal(
                f"{name} names the token {wrong[0]}, and the model's vocabulary has {served.vocab_size} tokens.", name
            )
    chat = isinstance(body, ChatBody)
    usual = served.ends(chat)
    return Request(
        tokens,
        max_tokens,
        _sampling(body),
        ends=frozenset(body.stop_token_ids) | (frozenset() if body.ignore_eos else usual),
        stops=body.stop + (served.chat.stops if chat else ()),
        text=max_tokens > 0,
        top=top,
        score_from=1 if score_prompt and len(tokens) > 1 else None,
        places=served.places(tokens),
    )


def _sampling(body: Decoding) -> Sampling:
    greedy = body.temperature == 0
    return Sampling(
        greedy=greedy,
        temperature=1.0 if greedy else body.temperature,
        top_k=body.top_k if body.top_k > 0 else None,
        top_p=body.top_p if body.top_p < 1 else None,
        min_p=body.min_p or None,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
    )


def _order(
    body: Decoding, requests: Sequence[Request], prompts: tuple[str, ...], logprobs: int | None, max_tokens: int
) -> PromptOrder:
    """All choices of all prompts, with a seed each: the first has the seed asked for."""
    seed = secrets.randbelow(_SEEDS) if body.seed is None else body.seed % _SEEDS
    choices = [replace(each, seed=(seed + choice * _STRIDE) % _SEEDS) for each in requests for choice in range(body.n)]
    effective = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": max(0, body.top_k),
        "min_p": body.min_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "max_tokens": max_tokens,
        "seed": seed,
        "n": body.n,
        "stop": len(body.stop),
        "logit_bias": len(body.logit_bias),
        "ignore_eos": body.ignore_eos,
    }
    return PromptOrder(tuple(choices), prompts, body.n, effective, logprobs)
