"""RUN/samples.md: what the model wrote, step by step, to be read by people; and the same for a console and for TensorBoard.

The model may write anything. On the page its text stands in blocks of code, each of its lines behind four blanks, so that nothing in it is
Markdown, and no line of it can be a heading of the page; control characters are written out. The page is replaced as a whole, so that it is
never seen half-written; what stood there from a step on is left out when that step comes again, after a resume.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatrain.files import require_own, shown, whole

_TITLE = "# Samples\n"
_HEADING = re.compile(r"^## step (\d+)$", re.MULTILINE)
_CONSOLE_PROMPTS, _CONSOLE_LETTERS = 3, 100
"""Prompts on the console at a time, and letters of each text there."""


@dataclass(frozen=True)
class SampleText:
    """A prompt and what the model made of it."""

    prompt: str
    texts: tuple[str, ...]
    """Texts that follow the prompt, or fill its blanks in order."""
    tokens: tuple[int, ...]
    """Number of tokens of each."""
    ended: tuple[bool, ...]
    """Whether the model ended each, not its limit."""
    blanks: bool = False
    """Whether the texts fill blanks."""


@dataclass(frozen=True)
class SamplesRow:
    """The samples of one step."""

    step: int
    """Updates done before."""
    tokens: int
    """Training tokens consumed before."""
    manner: str
    """How tokens were chosen, in words."""
    samples: tuple[SampleText, ...]


def add_samples(path: Path, row: SamplesRow) -> None:
    """Add a step's samples to the page at `path`, in the place of what stood there from this step on. Raises OSError."""
    require_own(path)
    page = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else _TITLE
    later = (heading.start() for heading in _HEADING.finditer(page) if int(heading[1]) >= row.step)
    kept = page[: next(later, len(page))].rstrip("\n")
    about = f"{row.tokens:,} training tokens; {row.manner}"
    parts = [
        kept,
        f"## step {row.step}",
        about,
        *(part for n, of in enumerate(row.samples, 1) for part in _parts(f"Prompt {n}", of)),
    ]
    with whole(path, text=True) as file:
        file.write("\n\n".join(parts) + "\n")


def as_markdown(sample: SampleText) -> str:
    """One sample as Markdown."""
    return "\n\n".join(_parts("Prompt", sample)) + "\n"


def console_lines(row: SamplesRow) -> str:
    """A line for each of the first samples: the end of the prompt, and the beginning of what the model made of it."""
    lines = [f"samples at step {row.step} | {row.manner} |"]
    for sample in row.samples[:_CONSOLE_PROMPTS]:
        made = " ".join(_quoted(text[:_CONSOLE_LETTERS], text[_CONSOLE_LETTERS:] != "") for text in sample.texts)
        lines.append(f"  {_quoted(sample.prompt[-_CONSOLE_LETTERS:], False)} -> {made}")
    if len(row.samples) > _CONSOLE_PROMPTS:
        lines.append(f"  ... and {len(row.samples) - _CONSOLE_PROMPTS} more in samples.md")
    return "\n".join(lines)


def _quoted(text: str, cut: bool) -> str:
    """A text in quotes on one line."""
    return json.dumps(text, ensure_ascii=False) + ("..." if cut else "")


def _parts(title: str, sample: SampleText) -> list[str]:
    """The paragraphs of a sample."""
    parts = [f"**{title}**", _block(sample.prompt)]
    for number, (text, tokens, ended) in enumerate(zip(sample.texts, sample.tokens, sample.ended, strict=True), 1):
        what = f"Blank {number}" if sample.blanks else "Continuation"
        parts += [f"{what}: {tokens} tokens, {'ended by the model' if ended else 'cut at the limit'}", _block(text)]
    return parts


def _block(text: str) -> str:
    """A text as a block of code; an empty one as a word."""
    lines: Sequence[str] = shown(text).split("\n")
    return "\n".join(f"    {line}" for line in lines) if text.strip() else "(nothing but blanks)" if text else "(nothing)"
