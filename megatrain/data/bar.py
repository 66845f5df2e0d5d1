"""A progress bar with the time left for work on files, on a terminal with `rich` installed; nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(name: str, total: int, *, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """A function to call with the amount done since its last call, out of `total`.

    in_bytes: the amounts are bytes and shown as such; this bar is removed when it is done.
    """
    if not sys.stderr.isatty():
        yield lambda _count: None
        return
    try:
        from rich.console import Console  # noqa: PLC0415  imported only on a terminal
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            DownloadColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
    except ImportError:
        sys.stderr.write(f"{name}: no progress bar, since rich is not installed (pip install rich)\n")
        yield lambda _count: None
        return
    shown: tuple[ProgressColumn, ...] = (TextColumn("{task.percentage:3.0f}%"),)
    if in_bytes:
        shown = (DownloadColumn(), TransferSpeedColumn())
    with Progress(
        TextColumn(f"{name:14}"), BarColumn(), *shown, TimeRemainingColumn(), console=Console(stderr=True), transient=in_bytes
    ) as progress:
        task = progress.add_task(name, total=total)

        def advance(count: int) -> None:
            progress.update(task, advance=count)

        yield advance
