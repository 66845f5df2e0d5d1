"""Documents between phases: a line of JSON each, in one .jsonl.zst, which any other tool reads as well.

{"text": ..., "source": "web", "file": "raw/a.jsonl", "at": 4096, "kind": "text", "language": "en", "scores": {...}, "marks": {...}}
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megatrain.corpus.document import Document
from megatrain.extras import need
from megatrain.files import doing, opened_plain, whole

LEVEL = 3
"""Level of Zstandard: 150 MB/s, a third of the text's size."""
FIELDS = ("text", "source", "file", "at", "kind", "language", "scores", "marks")


class ShardWriter(Protocol):
    """Takes documents."""

    def __call__(self, document: Document) -> None:
        """Write one."""


@contextmanager
def writing(path: Path) -> Iterator[ShardWriter]:
    """Write documents into a file that appears when it is whole. Raises OSError with its name."""
    orjson, zstandard = need("orjson", "the corpus pipeline", "data"), need("zstandard", "a .zst file", "data")

    with whole(path) as file, zstandard.ZstdCompressor(LEVEL).stream_writer(file, closefd=False) as packed:

        def write(document: Document) -> None:
            packed.write(orjson.dumps({name: getattr(document, name) for name in FIELDS}) + b"\n")

        yield write


def documents_of(path: Path) -> Iterator[Document]:
    """The documents of a file that `writing` has made, one at a time in memory. Raises OSError with its name."""
    orjson, zstandard = need("orjson", "the corpus pipeline", "data"), need("zstandard", "a .zst file", "data")
    with opened_plain(path) as file, doing("reading", path):
        unpacked: Any = zstandard.ZstdDecompressor().stream_reader(file)
        for line in io.BufferedReader(unpacked, 1 << 20):
            yield Document(**orjson.loads(line))
