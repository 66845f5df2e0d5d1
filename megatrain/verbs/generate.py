"""`megatrain generate`: continue texts with a trained model, fill their blanks, or talk to it; in one process or under any layout.

One prompt is shown as it is written. Several, or several texts for one, are written side by side and come out in their order: as text, or
as rows of JSON (prompt_rows.py), which appear whole or not at all where they go to a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import NamedTuple, Protocol

from megatrain.data.bar import bar
from megatrain.files import whole
from megatrain.inference.opening import Opened, TokenizerWish, opened
from megatrain.inference.replicas import gathered, share
from megatrain.inference.text_plans import PlannedText, write
from megatrain.stderr import note
from megatrain.transport.consensus import broadcast_text
from megatrain.verbs.prompt_plans import Planner, Prompted
from megatrain.verbs.prompt_rows import PromptRow, Wishes, output_row, read_input, rows_of_text
from megatrain.verbs.showing import shower, without
from megatrain.verbs.talk import talk

BETWEEN = "---"
"""A line between texts."""
MOST_TEXTS = 1 << 20
"""Texts of one call, which are all planned before the first is written."""


class Arguments(Protocol):
    """The arguments of `megatrain generate`, besides those that are fields of `Wishes`."""

    checkpoint: str
    prompt: Sequence[str] | None
    input: str | None
    chat: bool
    output: str | None
    chat_template: str | None
    system: str | None
    tokenizer: str | None
    eod: str | None
    bos: str | None
    overrides: Sequence[str]


class _WantedText(NamedTuple):
    """A text to be written."""

    number: int
    """The number of its prompt."""
    sample: int
    """Its number among the texts for that prompt."""
    prompted: Prompted


def main(arguments: Arguments) -> int:
    """`megatrain generate`. Returns 0. Raises CheckpointError, ConfigError, ChatError or ValueError, with advice."""
    wish = TokenizerWish(arguments.tokenizer, arguments.eod, arguments.bos)
    with opened(arguments.checkpoint, arguments.overrides, tokenizer=wish) as model:
        return generate(arguments, model)


def generate(arguments: Arguments, model: Opened) -> int:
    """The verb with a model that is there (collective). Returns 0."""
    wishes = Wishes(**{item.name: getattr(arguments, item.name) for item in fields(Wishes)})
    planner = Planner(model, arguments.chat_template)
    if arguments.chat:
        return talk(model, planner, wishes, arguments.system)
    rows, are_rows = _prompts(arguments, model, wishes)
    prompts = [planner.prompted(row) for row in rows]
    if (texts := sum(row.wishes.n for row in rows)) > MOST_TEXTS:
        raise ValueError(
            f"{texts:,} texts are asked for (prompts x n), and one call writes {MOST_TEXTS:,} at most. Use a smaller n."
        )
    _say_cut(model, prompts)
    jobs = [_WantedText(n, k, prompted) for n, prompted in enumerate(prompts) for k in range(prompted.row.wishes.n)]
    output = "-" if arguments.output is None and are_rows else arguments.output
    if output is None and len(jobs) == 1:
        _stream(model, jobs[0].prompted)
    else:
        _write_all(model, jobs, output)
    return 0


def _prompts(arguments: Arguments, model: Opened, wishes: Wishes) -> tuple[list[PromptRow], bool]:
    """(the prompts, whether they are rows of JSON), the same on every rank: the first one reads."""
    if arguments.input is None:
        return [PromptRow("", wishes, prompt) for prompt in arguments.prompt or ()], False
    told = {}
    if model.is_first:
        try:
            told = {"text": read_input(arguments.input)}
        except (OSError, ValueError) as error:
            told = {"problem": str(error)}
    told = json.loads(broadcast_text(json.dumps(told), model.ctx.world.group, model.ctx.device))
    if "problem" in told:
        raise ValueError(told["problem"])
    return rows_of_text(told["text"], arguments.input, wishes)


def _say_cut(model: Opened, prompts: Sequence[Prompted]) -> None:
    """Say that prompts are longer than the model, whose texts go on with their ends."""
    positions = model.config.model.positions
    cut = [prompted.tokens for prompted in prompts if prompted.shown and prompted.tokens > positions]
    if not cut or not model.is_first:
        return
    which = (
        f"the prompt has {cut[0]} tokens"
        if len(prompts) == 1
        else f"{len(cut)} of {len(prompts)} prompts have up to {max(cut)} tokens"
    )
    note(f"megatrain: {which}, and model.max_positions is {positions}: the last {max(1, positions // 2)} are used")


def _stream(model: Opened, prompted: Prompted) -> None:
    """Write one text after its prompt, as it comes."""
    show = shower(model)
    show(prompted.shown)
    write(model.engine, [prompted.plan(0, without(prompted.leading, show))], lambda _number, _writing: None)
    show("\n")


def _write_all(model: Opened, jobs: Sequence[_WantedText], output: str | None) -> None:
    """Write texts side by side; each replica of the model has its share. output: a file, `-` for rows of JSON, None for text.

    Raises ValueError on every rank where any cannot go on.
    """
    ctx = model.ctx
    mine = share(jobs, ctx)
    with _target(model, output) as put, _progress(model, output, len(jobs)) as advance:
        results: list[str | None] = [None] * len(mine)
        shown = 0

        def done(number: int, writing: PlannedText) -> None:
            nonlocal shown
            results[number] = _result(mine[number], writing, output)
            advance(ctx.dp.size)
            while ctx.dp.size == 1 and shown < len(mine) and (ready := results[shown]) is not None:
                put(ready)
                shown += 1

        problem = ""
        try:
            write(model.engine, [job.prompted.plan(job.sample, lambda _piece: None) for job in mine], done)
        except ValueError as error:
            if ctx.dp.size == 1:
                raise
            problem = str(error)
        if ctx.dp.size > 1:
            found = gathered([[problem, result] for result in results], ctx)
            if said := next((said for said, _ in found if said), None):
                raise ValueError(said)
            for _, result in found:
                put(str(result))


def _result(job: _WantedText, writing: PlannedText, output: str | None) -> str:
    """A text, or its row of JSON."""
    prompted, writing = job.prompted, job.prompted.text_of(writing)
    if output is None:
        return prompted.shown + writing.text
    return output_row(job.number, job.sample, prompted.row, prompted.tokens, writing)


@contextmanager
def _target(model: Opened, output: str | None) -> Iterator[Callable[[str], None]]:
    """A function that takes texts or rows in their order; only the first rank writes.

    Raises ValueError on every rank where the file cannot be made.
    """
    with ExitStack() as stack:
        file, problem = None, ""
        if model.is_first and output is not None and output != "-":
            try:
                file = stack.enter_context(whole(output, text=True))
            except OSError as error:
                problem = f"--output {output}: {error.strerror}. Name a file in a folder that is there and may be written to."
        if problem := broadcast_text(problem, model.ctx.world.group, model.ctx.device):
            raise ValueError(problem)
        if file is not None:
            yield lambda row: file.write(f"{row}\n")
        else:
            yield _shown(model, output)


def _shown(model: Opened, output: str | None) -> Callable[[str], None]:
    """A function that writes texts, with a line between them, or rows to standard output."""
    show, first = shower(model), True

    def put(text: str) -> None:
        nonlocal first
        show(f"{text}\n" if first or output is not None else f"{BETWEEN}\n{text}\n")
        first = False

    return put


@contextmanager
def _progress(model: Opened, output: str | None, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, where the texts go to a file."""
    if not model.is_first or output in (None, "-"):
        yield lambda _count: None
        return
    with bar("generate", total) as advance:
        yield advance
