"""Does another server say the same as our own engine on the same weights? 20 prompts, greedy, token by token, with log-probabilities.

Prompts go as token ids, so that tokenizers and templates have no part in it. Log-probabilities are compared up to the first token that
differs: behind it the two servers answer different texts. Where their token is nearly as probable to us as our own, it is a tie, which
rounding decides: another dtype, another kernel, another batch.
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.files import OneLine
from megatrain.inference.requests import Scored
from megatrain.serving.token_texts import TokenTexts
from megatrain.untrusted import parse_json

TEXTS = (
    *("The capital of France is", "Once upon a time, there was", "Water boils at a temperature of", "The quick brown fox"),
    *(
        "In 1969, the first",
        "To be or not to be,",
        "def fibonacci(n):\n    ",
        "import numpy as np\n\n",
        "SELECT name, age FROM",
    ),
    *(
        "1, 2, 3, 4, 5,",
        '{"name": "Ada", "age":',
        "中国的首都是",
        "从前有一座山，",
        "人工智能是",
        "春眠不觉晓，",
        "今天天气很好，我们",
    ),
    *("La capitale de la France est", "Die Hauptstadt von Deutschland ist", "日本の首都は", "Столица России —"),
)
NEW_TOKENS = 16
MOST_PROBABLE = 10
"""Tokens among which that of the other server is looked for."""
SECONDS = 120.0
LARGEST_REPLY = 1 << 24
"""Bytes."""
_ID = "token_id:"


class HandOverError(OneLine, RuntimeError):
    """The other server cannot be asked, or answers something else than a completion."""

    def __init__(self, message: str, fields: bool = False) -> None:
        """fields: whether a field of the request may be at fault."""
        super().__init__(message)
        self.fields = fields


@dataclass(frozen=True)
class Said:
    """A greedy continuation of the other server."""

    tokens: tuple[int | str, ...]
    """Ids, or the texts of tokens where it tells no ids."""
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Agreement:
    """How two continuations of a prompt agree."""

    compared: int
    """Tokens before the first that differs."""
    differs: bool
    margin: float | None
    """Where one differs: by how much our own token is more probable than theirs, in nats; None where theirs is not among the first ten."""
    ours: str = ""
    theirs: str = ""
    """The tokens that differ."""
    largest: float = 0.0
    """Largest difference of log-probabilities before it, in nats."""
    total: float = 0.0
    """Their sum."""

    def wrong(self, tolerance: float) -> bool:
        """Whether the two say different things by more than rounding."""
        return self.largest > tolerance or (self.differs and (self.margin is None or self.margin > tolerance))


@dataclass(frozen=True)
class OtherServer:
    """A server with OpenAI's API."""

    url: str
    """With or without /v1 at its end."""
    key: str | None
    model: str | None
    """None: the first that it has."""

    def named(self) -> OtherServer:
        """The same server, with the name of its model. Raises HandOverError."""
        if self.model is not None:
            return self
        try:
            name = self._ask("/models", None)["data"][0]["id"]
        except (LookupError, TypeError):
            name = None
        if not isinstance(name, str):
            raise HandOverError(f"{self.url} lists no models at /v1/models. Give its name: --serve-model NAME.")
        return OtherServer(self.url, self.key, name)

    def complete(self, tokens: Sequence[int], count: int) -> Said:
        """Its greedy continuation of a prompt by so many tokens. Raises HandOverError."""
        plain = {"model": self.model, "prompt": list(tokens), "max_tokens": count, "temperature": 0, "logprobs": 1}
        try:
            reply = self._ask("/completions", {**plain, "ignore_eos": True, "return_token_ids": True})
        except HandOverError as error:
            if not error.fields:
                raise
            reply = self._ask("/completions", plain)  # one that knows OpenAI's fields alone
        return said(reply)

    def _ask(self, path: str, body: Any) -> Any:
        base = self.url.rstrip("/").removesuffix("/v1")
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {self.key}"} if self.key else {})}
        data = None if body is None else json.dumps(body).encode()
        where = f"{base}/v1{path}"
        if not base.startswith(("http://", "https://")):
            raise HandOverError(f"--serve-check {self.url} is no address of a server. Try http://127.0.0.1:8000.")
        try:
            request = urllib.request.Request(where, data, headers)
            with urllib.request.urlopen(request, timeout=SECONDS) as reply:
                return parse_json(_read(reply), unique=False)
        except urllib.error.HTTPError as error:
            with error:
                answer = error.read(2000).decode(errors="replace")
            fields = error.code in (400, 422)
            raise HandOverError(f"{where} answers with status {error.code}: {answer}", fields) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise HandOverError(
                f"{where} cannot be asked ({why}). Start the server, and give its address: --serve-check URL."
            ) from None


def _read(reply: Any) -> bytes:
    """The body of a reply. Raises ValueError where it has no end, TimeoutError where that is far."""
    parts, size, end = [], 0, time.monotonic() + SECONDS
    while part := reply.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > LARGEST_REPLY:
            raise ValueError(f"the answer has more than {LARGEST_REPLY:,} bytes")
        if time.monotonic() > end:
            raise TimeoutError(f"the answer took longer than {SECONDS:g} s")
    return b"".join(parts)


def said(reply: Any) -> Said:
    """The tokens of a completion. Raises HandOverError."""
    try:
        choice = reply["choices"][0]
        texts, logprobs = choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
        ids = choice.get("token_ids")
        if ids is None and all(text.startswith(_ID) for text in texts):
            ids = [int(text.removeprefix(_ID)) for text in texts]
        tokens, values = tuple(texts if ids is None else ids)[: len(logprobs)], tuple(map(float, logprobs))
        if not all(type(token) in (int, str) for token in tokens) or not all(map(math.isfinite, values)):
            raise ValueError("tokens are ids or texts, with a number each")
        return Said(tokens, values)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise HandOverError(f"no completion with log-probabilities is in the answer {json.dumps(reply)[:300]}") from None


def agreement(ours: Sequence[Scored], theirs: Said, texts: TokenTexts, ends: Collection[int] = ()) -> Agreement:
    """How our tokens, with the most probable ones at each place, agree with those of the other server.

    ends: tokens that end a text; a server may stop where one of them is ours, and nowhere else.
    """
    largest = total = 0.0
    for place, (own, token, logprob) in enumerate(zip(ours, theirs.tokens, theirs.logprobs, strict=False)):
        name = texts.name(own.token)
        if (own.token if isinstance(token, int) else name) != token:
            known = [value for each, value in own.top if (each if isinstance(token, int) else texts.name(each)) == token]
            return Agreement(place, True, own.logprob - known[0] if known else None, name, _named(token, texts), largest, total)
        largest, total = max(largest, abs(own.logprob - logprob)), total + abs(own.logprob - logprob)
    shorter = min(len(ours), len(theirs.tokens))
    if shorter == len(ours) or ours[shorter].token in ends:
        return Agreement(shorter, False, None, largest=largest, total=total)
    own = ours[shorter]
    known = [value for each, value in own.top if each in ends]
    margin = own.logprob - max(known) if known else None
    return Agreement(shorter, True, margin, texts.name(own.token), "(the end)", largest, total)


def _named(token: int | str, texts: TokenTexts) -> str:
    """A token of the other server in words; it may be none of our vocabulary."""
    if isinstance(token, str):
        return token
    try:
        return texts.name(token) or f"id {token}"
    except (OverflowError, LookupError, ValueError):
        return f"id {token}"
