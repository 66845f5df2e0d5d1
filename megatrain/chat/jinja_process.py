"""The process that renders chat templates: `python -m megatrain.chat.jinja_process SECONDS MIB`, run by jinja_template.py.

A template is a program of somebody else. Jinja's sandbox keeps it from the attributes of objects, and this process, which has a bound of
time and of memory, from everything that a program can do without them: a loop without end, a text that doubles, a macro that calls itself.

    {"template": text, "variables": {...}}   -> {"text": text}, or {"problem": words}; each after its size

The environment is the one of `transformers` (utils/chat_template_utils.py): trim_blocks, lstrip_blocks, `break` and `continue`,
`raise_exception`, `strftime_now`, a `tojson` that keeps letters as they are, and `generation` blocks, which are rendered as they stand.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

from megatrain.extras import need
from megatrain.isolation import SIZE, Requests, packages

LONGEST = 1 << 24
"""Characters of a rendered conversation."""
OLDEST = 3, 1, 6
"""The first version of jinja2 without known ways out of its sandbox."""


def environment() -> Any:
    """Jinja's sandbox for chat templates. Raises ImportError where jinja2 is missing or too old."""
    jinja2 = need("jinja2", "a chat template", "chat")
    found = tuple(int(part) for part in jinja2.__version__.split(".")[:3])
    if found < OLDEST:
        raise ImportError(
            f"a chat template needs jinja2 of at least 3.1.6, and {jinja2.__version__} is installed: pip install -U jinja2"
        )
    sandbox, extensions = need("jinja2.sandbox", "a chat template", "chat"), need("jinja2.ext", "a chat template", "chat")

    class Generation(extensions.Extension):  # type: ignore[name-defined]  # jinja2 is optional
        """{% generation %} ... {% endgeneration %} around what the model has written."""

        tags = {"generation"}  # noqa: RUF012  read by jinja2

        def parse(self, parser: Any) -> Any:
            """The block's contents."""
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    class Names(jinja2.utils.Namespace):  # type: ignore[name-defined]
        """Jinja's namespace, without names that begin with an underscore."""

        def __init__(*args: Any, **given: Any) -> None:
            attributes = dict(*args[1:], **given)
            for name in attributes:
                _public(jinja2, name)
            jinja2.utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _public(jinja2, name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, extensions.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": _now, "namespace": Names}
    return made


def rendered(made: Any, template: str, variables: dict[str, Any]) -> dict[str, Any]:
    """{"text": ...}, or {"problem": what went wrong}."""
    try:
        text = _compiled(made, template).render(**variables)
    except MemoryError:
        return {"problem": "it needs too much memory"}
    except RecursionError:
        return {"problem": "it calls itself without end, or is nested too deep"}
    except Exception as error:  # whatever a template leads to costs this conversation
        return {"problem": f"{type(error).__name__}: {error}"[:400]}
    if len(text) > LONGEST:
        return {"problem": f"its text has {len(text):,} characters, and {LONGEST:,} at the most are read"}
    return {"text": text}


@lru_cache(16)
def _compiled(made: Any, template: str) -> Any:
    return made.from_string(template)


def _public(jinja2: Any, name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def serve(made: Any, seconds: float, memory_mib: int) -> None:
    """Answer requests until standard input or the parent ends."""
    requests = Requests(seconds, memory_mib)
    while requests.more() and (head := requests.read(SIZE.size)):
        wanted = json.loads(requests.read(SIZE.unpack(head)[0]))
        answer = requests.timed(partial(_answer, made, wanted["template"], wanted["variables"]))
        requests.answer(SIZE.pack(len(answer)) + answer)


def _answer(made: Any, template: str, variables: dict[str, Any]) -> bytes:
    try:
        return json.dumps(rendered(made, template, variables)).encode()
    except MemoryError:
        return json.dumps({"problem": "it needs too much memory"}).encode()


if __name__ == "__main__":
    serve(packages(environment), float(sys.argv[1]), int(sys.argv[2]))
