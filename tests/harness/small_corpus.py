"""Small corpora for a preparation, as raw files and a config, and what came of them."""

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatrain.corpus.document import Document, Step, Tally

PROSE = "the house and garden of a town that have been with us to be seen by people in every season of its long years"
WORDS = PROSE.split()


def text(seed: int, words: int = 120) -> str:
    """Sentences that the rules of English keep."""
    draw = random.Random(seed)
    return ". ".join(" ".join(draw.choices(WORDS, k=12)).capitalize() for _ in range(words // 12)) + "."


def refused_by(steps: Sequence[Step], document: Document, tally: Tally) -> list[str]:
    """The rules of all steps, taken in order, that refuse a document."""
    return [rule for step in steps for rule in step(document, tally)]


def corpus(folder: Path) -> Path:
    """Three sources: rows with copies, near copies and broken lines; packed rows; code."""
    folder.mkdir()
    rows = [text(seed) for seed in range(150)]
    rows += [rows[3], rows[4], rows[5] + " Again.", "too short", "mail me: someone@example.org. " + text(1000)]
    lines = [json.dumps({"text": row, "url": f"http://x/{number}"}) for number, row in enumerate(rows)]
    lines[20:20] = ["{broken", '{"no": "text"}', '{"text": 5}']
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text(seed)}) + "\n" for seed in range(140, 170))
    for number in range(5):
        (folder / f"c{number}.py").write_text(f"def f{number}(a):\n    return {number} * a\n" * 10)
    return folder


def config(folder: Path, raw: str) -> Path:
    """The config of that corpus."""
    web = {"name": "web", "paths": [f"{raw}/a.jsonl"], "language": "en", "rules": ["gopher"], "keep": ["url"]}
    packed = {"name": "packed", "paths": [f"{raw}/b.jsonl.gz"], "language": "en", "rules": ["gopher"], "weight": 0.5}
    code = {"name": "code", "paths": [f"{raw}/*.py"], "kind": "code", "language": "en", "rules": []}
    return _config(folder, [web, packed, code])


def rows_alone(folder: Path) -> Path:
    """Two sources of rows without rules, and their config: what is done soonest."""
    raw = folder / "raw"
    raw.mkdir()
    for source in ("a", "b"):
        rows = [json.dumps({"text": f"Row {number} of {source} " + "is here to be read. " * 40}) for number in range(60)]
        (raw / f"{source}.jsonl").write_text("\n".join(rows) + "\n")
    sources = [{"name": name, "paths": [f"raw/{name}.jsonl"], "language": "en", "rules": []} for name in ("a", "b")]
    return _config(folder, sources, near=False)


def _config(folder: Path, sources: Sequence[Mapping[str, Any]], near: bool = True) -> Path:
    tree = {
        "read": {"unit_bytes": 20_000, "sources": sources},
        "dedup": {"near": near, "parts": 1},
        "tokenize": {"tokenizer": "bytes", "held_out": 0.1},
        "output": {"dir": "out"},
    }
    path = folder / "prepare.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def made(folder: Path) -> dict[str, bytes]:
    """Every file that users see, by name."""
    out = folder / "out"
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "work" not in path.relative_to(out).parts
    }
