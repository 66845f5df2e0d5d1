"""Every room says how many lines it may have, so that its growth is a line of a commit, seen by who reads it."""

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LINES = {
    "megatrain/serving": 3350,
    "megatrain/chat": 850,
    "megatrain/evaluation": 4350,
    "docs/benchmarks": 5350,
    "kernels": 4800,
    "launch": 650,
    "megatrain": 2950,  # its own files, without the rooms below
    "megatrain/checkpoint": 3250,
    "megatrain/cli": 1800,
    "megatrain/config": 3400,
    "megatrain/corpus": 12800,
    "megatrain/data": 6550,
    "megatrain/doctor": 800,
    "megatrain/huggingface": 1550,
    "megatrain/inference": 2700,
    "megatrain/lifecycle": 2700,
    "megatrain/models": 1050,
    "megatrain/ngram": 2550,
    "megatrain/optim": 750,
    "megatrain/parallel": 3400,
    "megatrain/plan": 300,
    "megatrain/records": 1350,
    "megatrain/resuming": 1000,
    "megatrain/runtime": 1800,
    "megatrain/testing": 1550,
    "megatrain/transport": 3150,
    "megatrain/verbs": 2900,
    "tests": 64100,
}
"""Python lines of each room, at most; rounded up to 50."""


def room_of(path: Path) -> str:
    """The room of a file, by its path under the checkout."""
    first, second = path.parts[:2]
    nested = first == "docs" or (first == "megatrain" and len(path.parts) > 2)
    return f"{first}/{second}" if nested else first


def test_no_room_grows_unseen() -> None:
    lines = Counter[str]()
    for folder in ("docs", "kernels", "launch", "megatrain", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            lines[room_of(path.relative_to(ROOT))] += len(path.read_text().splitlines())
    grown = {room: -(-found // 50) * 50 for room, found in sorted(lines.items()) if found > LINES.get(room, 0)}
    assert grown == {}, f"rooms with more lines than tests/test_room_lines.py allows; write there, if it is worth it: {grown}"
    assert sorted(LINES.keys() - lines.keys()) == [], "rooms that are no more"
