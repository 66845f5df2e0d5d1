"""Changes of files that a disk, a network or a stranger makes: of bytes, of JSON and YAML trees, of lines."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

INTEGERS = (
    0,
    1,
    2,
    7,
    255,
    1 << 15,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
LARGEST_COPY = 20_000
DIGITS, DEEP, WIDE, TWICE = "@digits@", "@deep@", "@wide@", "@twice@"
BOMBS = {
    DIGITS: b"9" * 10_000,
    DEEP: b"[" * 100_000 + b"]" * 100_000,
    WIDE: b"[" + b"[]," * 100_000 + b"0]",
    TWICE: b'{"a": 1, "a": 2}',
}
"""Strings of a tree that become what a JSON library would not write."""
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0.5,
        1e308,
        float("nan"),
        float("-inf"),
        "",
        "x",
        "\0",
        "\ud800",
        "é" * 300,
        "../../etc/passwd",
        "a\nb",
    ),
    *([], {}, [[[]]], {"a": {"b": []}}, [0] * 1000, *INTEGERS, -(1 << 63), 10**9, 10**400, *BOMBS),
)

Change = Callable[[bytes, random.Random], bytes]


def of_bytes(data: bytes, draw: random.Random) -> bytes:
    """One change or a few of any bytes; now and then of a number of 4 or 8 bytes."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        size = len(changed)
        at = draw.choice((draw.randrange(size), draw.randrange(min(size, 64)))) if size else 0
        end = min(size, at + draw.choice((1, 4, 16, 100, 5000)))
        operation = draw.randrange(9)
        if operation == 0 and size:
            changed[at] ^= 1 << draw.randrange(8)
        elif operation == 1 and size:
            changed[at] = draw.randrange(256)
        elif operation == 2:
            del changed[at:]
        elif operation == 3:
            changed += draw.choice((b"\0", b"\n", draw.randbytes(9), bytes(4096)))
        elif operation == 4:
            del changed[at:end]
        elif operation == 5:
            changed[at:at] = changed[at:end]
        elif operation == 6:
            changed[at:end] = draw.choice((b"\0", b"\xff", b" ")) * (end - at)
        elif operation == 7:
            width = draw.choice((4, 8))
            changed[at : at + width] = (draw.choice(INTEGERS) % (1 << 8 * width)).to_bytes(width, "little")
        else:
            other = draw.randrange(size + 1)
            changed[at:end], changed[other:other] = b"", changed[at:end]
    return bytes(changed)


def of_tree(tree: Any, draw: random.Random) -> Any:
    """A copy of a JSON tree with one node or a few changed, lost, doubled or with another name."""
    made = json.loads(json.dumps(tree))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        parents = list(_parents(made))
        parent = draw.choice(parents) if parents else None
        if parent is None:
            return copy.deepcopy(draw.choice(VALUES))
        key = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        operation = draw.randrange(7)
        if operation == 0:
            del parent[key]
        elif operation == 1 and isinstance(parent, dict):
            parent[draw.choice(("x", "", key + "x", "__metadata__", "\ud800"))] = parent.pop(key)
        elif operation == 2 and isinstance(parent, list):
            parent += [json.loads(json.dumps(parent[key]))] * draw.choice((1, 1000))
        elif operation == 3 and type(parent[key]) is int:
            parent[key] += draw.choice((-1, 1, -8, 8, 1 << 20))
        elif operation == 4:
            other = json.dumps(draw.choice(parents))
            parent[key] = json.loads(other) if len(other) < LARGEST_COPY else None
        else:
            parent[key] = copy.deepcopy(draw.choice(VALUES))
    return made


def _parents(node: Any) -> Any:
    """Every list and dict of a tree that is not empty."""
    if isinstance(node, (dict, list)) and node:
        yield node
        for value in node.values() if isinstance(node, dict) else node:
            yield from _parents(value)


def text_of(tree: Any) -> bytes:
    """A tree as JSON, with its bombs."""
    text = json.dumps(tree).encode()
    for name, bomb in BOMBS.items():
        text = text.replace(f'"{name}"'.encode(), bomb)
    return text


def of_json(data: bytes, draw: random.Random) -> bytes:
    """A change of the tree, mostly, or of its bytes."""
    return of_bytes(data, draw) if draw.random() < 0.3 else text_of(of_tree(json.loads(data), draw))


WORDS = (
    b"nan",
    b"inf",
    b"-inf",
    b"1e999",
    b"-1e-999",
    b"0x1p3",
    b"1_0",
    b"-0",
    b"",
    b"\0",
    b"\xff\xfe",
    b"9" * 400,
    b"\\end\\",
    b"\r",
)


def of_lines(data: bytes, draw: random.Random) -> bytes:
    """Lines that are lost, doubled, joined or elsewhere, words that are others; or a change of bytes."""
    if draw.random() < 0.3:
        return of_bytes(data, draw)
    lines = data.split(b"\n")
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(lines))
        operation = draw.randrange(6)
        if operation == 0 and len(lines) > 1:
            del lines[at]
        elif operation == 1:
            lines[at:at] = [lines[at]] * draw.choice((1, 500))
        elif operation == 2:
            lines.insert(draw.randrange(len(lines)), lines.pop(at))
        elif operation == 3:
            lines[at] = draw.choice(WORDS) * draw.choice((1, 1, 3000))
        else:
            words = lines[at].split(b" ")
            words[draw.randrange(len(words))] = draw.choice((*WORDS, str(draw.choice(INTEGERS)).encode()))
            lines[at] = b" ".join(words)
    return b"\n".join(lines)


YAML = (
    b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (n + 1, n + 1, b", ".join([b"*%c" % n] * 9)) for n in range(97, 110)),
    b"train: !!python/object/apply:os.system [true]\n",
    b"train: &x {steps: *x}\n",
    b"? [1, 2]\n: x\n",
    b"<<: {train: {steps: 1}}\n",
    b"--- 1\n--- 2\n",
    b"a: '" + b"x" * 100_000,
    b"[" * 3000,
    b"- " * 3000,
    b"a: 0o7777777777777777777\nb: 1:60:60:60:60:60:60:60:60:60:60:60\n",
    b"%YAML 9.9\n---\n\t- x\n",
)


def of_yaml(data: bytes, draw: random.Random) -> bytes:
    """A change of lines, now and then with something that YAML alone has, before or behind."""
    changed = of_lines(data, draw)
    extra = draw.choice(YAML) if draw.random() < 0.3 else b""
    return extra + changed if draw.random() < 0.5 else changed + b"\n" + extra
