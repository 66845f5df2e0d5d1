"""From a model that was opened to the facts that a server needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatrain.chat.conversation import ChatError, ChatMessage
from megatrain.chat.templates import Chat, open_chat
from megatrain.data.samples.sentinels import resolve
from megatrain.inference.infill import Filling, parsed
from megatrain.inference.opening import Opened
from megatrain.inference.requests import Request
from megatrain.kernels.paged_attention import served_by
from megatrain.serving.served import Served
from megatrain.serving.token_texts import TokenTexts

Infill = Callable[[str, str | None, Request], Request]


def served_of(model: Opened, name: str | None, template: str | None) -> Served:
    """Facts of an open model. name: by which clients ask for it; template: its chat template, where it is not the model's own.

    Raises ValueError without a tokenizer, ChatError for a template that cannot be used.
    """
    codec, ctx, engine = model.codec, model.ctx, model.engine
    build = model.weights.chunks[0].build
    dtype = str(build.dtype).removeprefix("torch.")
    implementation = served_by(model.config.train.kernels, ctx.device, build.dtype, model.config.model.head_size)
    return Served(
        name=name or name_of(model.source),
        codec=codec,
        max_length=engine.max_length,
        vocab_size=engine.vocab_size,
        places=model.places,
        closed=model.closed,
        conversing=conversing(model, template),
        infill=infilling(model) if model.config.data.objective == "glm" else None,
        attention=f"paged attention by {implementation}, {dtype} on {ctx.device.type}, blocks of {engine.settings.block} tokens",
        source=str(model.source),
        layout=f"tp {ctx.tp.size}, pp {ctx.pp.size}",
        texts=TokenTexts(codec),
    )


def name_of(source: Path) -> str:
    """The name of a run or of a Hugging Face directory: `demo` of runs/demo/checkpoints/step_00000200."""
    parts = source.resolve().parts
    return parts[-3] if len(parts) > 3 and parts[-2] == "checkpoints" else parts[-1]


class OwnChat:
    """The chat of a model."""

    def __init__(self, chat: Chat) -> None:
        self._chat, self._lock = chat, threading.Lock()
        self.ends, self.stops, self.leading = chat.ends, chat.stops, chat.leading

    def tokens(
        self, messages: Sequence[ChatMessage], continue_final_message: bool, variables: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """The prompt of a conversation. Raises ChatError."""
        with self._lock:  # there is one process that renders
            return self._chat.prompt(messages, continue_final_message=continue_final_message, variables=variables).tokens


def conversing(model: Opened, choice: str | None) -> OwnChat | str:
    """How a model wants a conversation, by its own template or one that was chosen; or why it has none.

    Raises ChatError for a choice that cannot be used.
    """
    try:
        return OwnChat(open_chat(model.codec, model.tokenizer_folders, choice, model.named_ids))
    except ChatError as error:
        if choice is not None:
            raise
        return str(error)


def infilling(model: Opened) -> Infill:
    """How a GLM fills the one blank of a prompt: behind it where a suffix follows, at the mask that it has, or at its end."""
    codec, engine = model.codec, model.engine
    ids, text_vocab = resolve(model.config.data.glm, codec, engine.vocab_size)

    def infill(prompt: str, suffix: str | None, asked: Request) -> Request:
        texts, masks = parsed(prompt if suffix is None else f"{prompt}[MASK]{suffix}", ids)
        if len(masks) != 1:
            raise ValueError(
                f"there are {len(masks)} blanks, and one is filled at a time. Use one [MASK], [sMASK] or [gMASK], or a suffix."
            )
        filling = Filling(engine, [list(map(int, codec.encode(text))) for text in texts], masks, ids, text_vocab)
        request = filling.request(asked)
        own = asked.ends - frozenset(codec.ending.stops)
        return Request(**{**vars(request), "ends": request.ends | own, "max_tokens": asked.max_tokens})

    return infill
