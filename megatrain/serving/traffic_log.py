"""Writes what was asked and answered, a line of JSON a request, with personal data masked; and thumbs, for training on them.

A text in which something was masked is logged without its token ids, which would say what it was.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatrain.corpus.cleaning.personal import mask
from megatrain.data.tokenizer import Tokenizer
from megatrain.files import open_own
from megatrain.serving.bodies import FeedbackBody
from megatrain.serving.desk import Inbox
from megatrain.serving.meters import Timed
from megatrain.serving.orders import PromptOrder
from megatrain.serving.replies import ReplyHead
from megatrain.serving.styles import AnswerChoice
from megatrain.stderr import note

MOST_WAITING = 10_000
"""Records that wait to be written; beyond, they are dropped and counted, as the server must go on."""


class TrafficLog:
    """A log of requests, written by a thread; at a size it becomes FILE.1, what was that FILE.2, and so on."""

    def __init__(self, path: Path, most_bytes: int, kept: int) -> None:
        """kept: files beside the one that is written. Raises OSError if that cannot be."""
        self.path, self.most_bytes, self.kept = path, most_bytes, kept
        self.dropped = 0
        self._failed = ""
        """Why the last record could not be written."""
        self._file: int | None = open_own(path)
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        self._codec: Tokenizer | None = None
        self._thread = threading.Thread(target=self._write_all, name="megatrain-log", daemon=True)
        self._thread.start()

    def know(self, codec: Tokenizer) -> None:
        """Give the tokenizer, for prompts that come as ids."""
        self._codec = codec

    def put(
        self,
        head: ReplyHead,
        asked: Mapping[str, Any],
        order: PromptOrder,
        choices: Sequence[AnswerChoice],
        inbox: Inbox,
        how: str,
    ) -> None:
        """Have a request written."""
        record = {
            "time": time.time(),
            "id": head.id,
            "kind": head.kind,
            "model": head.model,
            "ended": how,
            "sampling": order.effective,
            "asked": asked,
            "prompts": [request.tokens for request in order.requests[:: order.n]],
            "choices": [_choice(choice, timed) for choice, timed in zip(choices, inbox.timed, strict=True)],
        }
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is left, and end."""
        self._queue.put(None)
        self._thread.join()
        if self._file is not None:
            os.close(self._file)
        if self.dropped:
            why = self._failed or "they came faster than they could be written"
            note(f"megatrain: {self.dropped} requests are not in {self.path}: {why}")

    def _write_all(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                self._write(json.dumps(masked_record(record, self._codec), ensure_ascii=False).encode(errors="replace") + b"\n")
            except OSError as error:
                self.dropped += 1
                said = error.strerror or str(error)
                if said != self._failed:  # a full disk is told once, not with each request
                    note(f"megatrain: {self.path} could not be written: {said}")
                self._failed = said

    def _write(self, line: bytes) -> None:
        if self._file is None:  # it could not be opened anew
            self._file = open_own(self.path)
        size = os.fstat(self._file).st_size
        if size and size + len(line) > self.most_bytes:
            self._file = self._rotated(self._file)
        append_whole(self._file, line)

    def _rotated(self, full: int) -> int:
        """A new file, what was there being put aside."""
        self._file = None
        os.close(full)
        names = [self.path, *(self.path.with_name(f"{self.path.name}.{number}") for number in range(1, self.kept + 1))]
        for newer, older in reversed(list(pairwise(names))):
            if newer.exists():
                newer.replace(older)
        if not self.kept:
            self.path.unlink(missing_ok=True)
        return open_own(self.path)


def append_whole(descriptor: int, line: bytes) -> None:
    """Append a line to a file, whole or, where a disk is full, not at all. Raises OSError."""
    before, left = os.fstat(descriptor).st_size, memoryview(line)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError:
        os.ftruncate(descriptor, before)
        raise


def _choice(choice: AnswerChoice, timed: Timed) -> dict[str, Any]:
    """A choice as it is logged."""
    return {
        "text": choice.text,
        "tokens": [each.token for each in choice.tokens],
        "logprobs": [round(each.logprob, 5) for each in choice.tokens],
        "finish_reason": None if choice.answer is None else choice.answer.finish,
        "cached_tokens": None if choice.answer is None else choice.answer.cached_tokens,
        "seconds": timed.seconds(),
    }


def masked_record(record: Mapping[str, Any], codec: Tokenizer | None) -> dict[str, Any]:
    """A record without personal data: in its texts there are placeholders, and then its ids are left out."""
    asked, found = _masked(record["asked"], codec)
    prompts = [None if found else list(tokens) for tokens in record["prompts"]]
    lengths = [len(tokens) for tokens in record["prompts"]]
    choices = []
    for choice in record["choices"]:
        text, said = mask(choice["text"])
        kept = {} if said else {"tokens": choice["tokens"]}
        rest = {key: value for key, value in choice.items() if key not in ("text", "tokens")}
        choices.append({"text": text, **kept, "count": len(choice["tokens"]), **rest})
        found += sum(said.values())
    return {**record, "asked": asked, "prompts": prompts, "prompt_lengths": lengths, "choices": choices, "masked": found}


def _masked(value: Any, codec: Tokenizer | None) -> tuple[Any, int]:
    """(JSON with its texts masked, how much was). A list of ids is masked as the text that it spells."""
    if isinstance(value, str):
        text, found = mask(value)
        return text, sum(found.values())
    if isinstance(value, Mapping):
        pairs = {key: _masked(each, codec) for key, each in value.items()}
        return {key: each for key, (each, _) in pairs.items()}, sum(count for _, count in pairs.values())
    if isinstance(value, list) and value and isinstance(value[0], int):
        return _masked("" if codec is None else codec.decode(value), codec)
    if isinstance(value, list):
        parts = [_masked(each, codec) for each in value]
        return [each for each, _ in parts], sum(count for _, count in parts)
    return value, 0


def write_thumb(path: Path, body: FeedbackBody) -> None:
    """Append what somebody thinks of an answer, as supervised and preference training read it. Raises OSError."""
    messages = [{"role": message.role, "content": message.content} for message in body.messages]
    row = {"messages": messages, "answer": body.answer, "rating": body.rating}
    beside = {"request": body.request, "model": body.model, "time": time.time()}
    line = json.dumps({**row, **beside}, ensure_ascii=False).encode(errors="replace") + b"\n"
    descriptor = open_own(path)
    try:
        append_whole(descriptor, line)
    finally:
        os.close(descriptor)
