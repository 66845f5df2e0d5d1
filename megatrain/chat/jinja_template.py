"""Chat templates in Jinja, as Hugging Face directories have them: found beside a tokenizer, and rendered in a process of their own."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain.chat.conversation import ChatError, RefusedByTemplateError
from megatrain.data.boundaries import LARGEST_COMPANION, SPECIAL_TOKENS, TOKENIZER_CONFIG
from megatrain.extras import MissingPackageError
from megatrain.files import HEAD_BYTES, brief, not_text
from megatrain.isolation import SIZE, DiedError, Isolated
from megatrain.untrusted import leads_out, parse_json, read_beside, read_plain

TEMPLATE_FILE, TEMPLATE_FOLDER, SUFFIX = "chat_template.jinja", "additional_chat_templates", ".jinja"
DEFAULT = "default"
"""The name of a model's template for conversations, where it has several."""
LARGEST_TEMPLATE = 1 << 20
SECONDS, MEMORY_MIB, PATIENCE = 2.0, 256, 30.0
"""Processor time of a conversation and memory of the process; seconds by the clock after which it is given up."""
RAISED = "TemplateError:"
"""How a problem begins that a template has raised itself."""
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class JinjaProcess:
    """Renders templates, one at a time; threads wait for each other."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """seconds: processor time of a conversation."""
        self._seconds = seconds
        self._process = Isolated("megatrain.chat.jinja_process", str(seconds), str(MEMORY_MIB))
        self._lock = threading.Lock()
        weakref.finalize(self, self._process.end)

    def render(self, template: str, variables: Mapping[str, Any], name: str) -> str:
        """The text of a template. name: of the template, in messages. Raises ChatError."""
        request = json.dumps({"template": template, "variables": variables}).encode()
        try:
            with self._lock:
                self._process.send(SIZE.pack(len(request)) + request, PATIENCE)
                size = SIZE.unpack(self._process.receive(SIZE.size, PATIENCE))[0]
                answer = json.loads(self._process.receive(size, PATIENCE))
        except DiedError as died:
            said = f"it takes more than {self._seconds:g} s" if died.took_too_long else f"it has ended its process ({died.how})"
            raise ChatError(f"the chat template {name} cannot be used: {said}. Choose another one: --chat-template.") from None
        except MissingPackageError as missing:
            raise ChatError(str(missing)) from None
        if "problem" in answer:
            kind = RefusedByTemplateError if answer["problem"].startswith(RAISED) else ChatError
            raise kind(f"the chat template {name} refuses this conversation: {answer['problem']}")
        return str(answer["text"])


def templates_beside(folder: Path) -> dict[str, str]:
    """The chat templates of a tokenizer's folder by name, of which the one for conversations is `default`; {} if it has none.

    Raises ChatError for files that cannot be read.
    """
    found: dict[str, str] = {}
    said = _json_object(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(said, str):
        found[DEFAULT] = said
    elif isinstance(said, list):
        named = [item for item in said if isinstance(item, dict)]
        found |= {str(item.get("name")): str(item.get("template")) for item in named}
    elif said is not None:
        raise ChatError(f"chat_template of {folder / TOKENIZER_CONFIG} is no text and no list of templates. Mend it.")
    files = {DEFAULT: folder / TEMPLATE_FILE}
    if leads_out(more := folder / TEMPLATE_FOLDER):
        raise ChatError(f"{more} is a link that leads out of its folder, to {more.resolve()}: put the folder itself there.")
    files |= {path.stem: path for path in sorted(more.glob(f"*{SUFFIX}"))}
    return found | {name: _text_beside(path) for name, path in files.items() if path.is_file()}


def template_of(path: Path) -> str:
    """The template in a file that the user names. Raises ChatError."""
    try:
        return _decoded(read_plain(path, LARGEST_TEMPLATE))
    except (OSError, ValueError) as error:
        raise ChatError(f"the chat template {path} cannot be read: {brief(error)}.") from None


def token_variables(folder: Path | None) -> dict[str, Any]:
    """bos_token, eos_token and the like, as the files of a tokenizer's folder name them. Raises ChatError."""
    found: dict[str, Any] = {}
    for file in (SPECIAL_TOKENS, TOKENIZER_CONFIG):
        given = {} if folder is None else _json_object(folder / file)
        for key in _TOKENS:
            name = given.get(key)
            name = name.get("content") if isinstance(name, dict) else name
            if isinstance(name, str):
                found[key] = name
    return found


def _text_beside(path: Path) -> str:
    try:
        return _decoded(read_beside(path, LARGEST_TEMPLATE))
    except (OSError, ValueError) as error:
        raise ChatError(f"the chat template {path} cannot be read: {brief(error)}. Mend it or take it away.") from None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(_decoded(read_beside(path, LARGEST_COMPANION)), unique=False)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ChatError(f"{path} cannot be read: {brief(error)}. Mend it or take it away.") from None
    return found if isinstance(found, dict) else {}


def _decoded(data: bytes) -> str:
    if problem := not_text(data[:HEAD_BYTES]):
        raise ValueError(problem)
    return data.decode("utf-8-sig")
