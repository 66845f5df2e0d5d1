"""The process that reads parquet files: `python -m megatrain.corpus.reading.parquet_process SECONDS MIB`, run by parquet_rows.py.

Arrow ends its process at some files that are damaged. A request is one of the dictionaries below as JSON, an answer a number of parts: a
dictionary, and bytes that go with it, each after its size.

    {"do": "groups", "file": F}                       -> {"groups": [bytes of each row group]}
    {"do": "rows", "file": F, "start": 0, "stop": 3, "key": "text", "keep": [...], "ratio": 250, "made": N, "longest": N}
                                                      -> {"rows": [bytes of each text, or its type], "kept": {name: values}}, texts
                                                         ... {"end": true}
    where it cannot be read                           -> {"problem": name, "said": text}
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatrain.corpus.reading.parquet_values import texts_of, values_of
from megatrain.data.prepare.unpack import FREE_BYTES
from megatrain.extras import need
from megatrain.isolation import SIZE, Requests, packages

BATCH_BYTES, BATCH_ROWS = 4 << 20, 1024
"""Bytes of rows of usual size that are read at once, and rows at most."""
BUFFER_BYTES = 1 << 20
Part = tuple[dict[str, Any], bytes]


class Arrow(NamedTuple):
    """The modules pyarrow and pyarrow.parquet."""

    arrow: Any
    parquet: Any


def arrow_packages() -> Arrow:
    """Import pyarrow, which is to take its memory from the system. Raises ImportError."""
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # its own allocator reserves a GiB of the bounded address space
    return Arrow(*(need(name, "reading .parquet", "parquet") for name in ("pyarrow", "pyarrow.parquet")))


def serve(found: Arrow, seconds: float, memory_mib: int) -> None:
    """Answer requests until standard input or the parent ends."""
    requests = Requests(seconds, memory_mib)
    while requests.more() and (head := requests.read(SIZE.size)):
        wanted = json.loads(requests.read(SIZE.unpack(head)[0]))
        parts = _answer(found, wanted)
        while (part := requests.timed(functools.partial(next, parts, None))) is not None:
            words = json.dumps(part[0]).encode()
            requests.answer(SIZE.pack(len(words)) + words + SIZE.pack(len(part[1])) + part[1])


def _answer(found: Arrow, wanted: dict[str, Any]) -> Iterator[Part]:
    try:
        with Path(wanted["file"]).open("rb") as file:
            table = found.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)
            if wanted["do"] == "groups":
                groups = map(table.metadata.row_group, range(table.metadata.num_row_groups))
                yield {"groups": [group.total_byte_size for group in groups]}, b""
            else:
                yield from _rows(found, table, wanted)
                yield {"end": True}, b""
    except MemoryError:
        yield {"problem": "damaged", "said": "it needs too much memory"}, b""
    except Exception as error:  # whatever a library raises costs the rest of the file
        yield {"problem": "damaged", "said": f"{type(error).__name__}: {error}"[:400]}, b""


def _rows(found: Arrow, table: Any, wanted: dict[str, Any]) -> Iterator[Part]:
    """The rows of some row groups, or what is wrong with the file."""
    names, key = table.schema_arrow.names, wanted["key"]
    if twice := next((name for name in (key, *wanted["keep"]) if names.count(name) > 1), None):
        yield {"problem": "duplicate_key", "said": f"the column {twice!r} is there twice. Which of them counts?"}, b""
    elif key not in names:
        listed = ", ".join(map(repr, names[:8])) or "none"
        yield {"problem": "no_key", "said": f"there is no column {key!r}; the file has {listed}"}, b""
    else:
        columns = [name for name in (key, *wanted["keep"]) if name in names]
        yield {"before": sum(table.metadata.row_group(i).num_rows for i in range(wanted["start"]))}, b""
        for number in range(wanted["start"], wanted["stop"] or table.metadata.num_row_groups):  # 0: they could not be counted
            group = table.metadata.row_group(number)
            packed, made = _sizes(group, columns)
            if made > min(wanted["made"], FREE_BYTES + wanted["ratio"] * packed):
                yield {"problem": "bomb", "said": f"has {made:,} bytes in a row group that takes {packed:,} in the file"}, b""
                return
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // max(made, 1)))
            for batch in table.iter_batches(rows, [number], columns, use_threads=False):
                yield _batch(found.arrow, batch, wanted)


def _sizes(group: Any, columns: list[str]) -> tuple[int, int]:
    """Bytes that some columns of a row group take in the file, and those that they become."""
    parts = [part for part in map(group.column, range(group.num_columns)) if part.path_in_schema.partition(".")[0] in columns]
    return sum(part.total_compressed_size for part in parts), sum(part.total_uncompressed_size for part in parts)


def _batch(arrow: Any, batch: Any, wanted: dict[str, Any]) -> Part:
    """Rows as a part of an answer. Of a text that is too long its bytes are told and not sent."""
    texts = texts_of(batch.column(wanted["key"]), arrow)
    sizes = [len(text) if isinstance(text, bytes) else text for text in texts]
    kept = {name: values_of(batch.column(name), arrow) for name in wanted["keep"] if name in batch.schema.names}
    body = b"".join(text for text in texts if isinstance(text, bytes) and len(text) <= wanted["longest"])
    return {"rows": sizes, "kept": kept}, body


if __name__ == "__main__":
    most_seconds, mib = sys.argv[1:]
    serve(packages(arrow_packages), float(most_seconds), int(mib))
