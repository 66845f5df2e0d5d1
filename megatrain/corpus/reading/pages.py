"""Text out of HTML, by a process of its own (extracting.py), so that a page that is made to break things costs itself and never the run.

Pages go there in batches. Where the process ends within one, or cannot do a page, it is started again and goes on with the rest. That page
is tried a second time by itself, unless it took too long, since what came before it may have been to blame; then it is counted and named.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from megatrain.corpus.document import Document
from megatrain.corpus.reading.choices import ReadConfig
from megatrain.corpus.reading.encoded import page_in_utf8
from megatrain.corpus.reading.extracting import COUNT, FAILED, NO_MEMORY, READY, REPLY, SIZE
from megatrain.corpus.reading.file_reading import FileReading
from megatrain.corpus.reading.texts import whole_file
from megatrain.files import brief

BATCH_BYTES, BATCH_PAGES = 4 << 20, 256
PATIENCE = 6.0
"""Times page_seconds, by the clock, after which a process is ended that its own limit has not."""
START_SECONDS = 60.0


class Page(NamedTuple):
    """A page of HTML that waits for its text."""

    reading: FileReading
    at: int
    where: str
    data: bytes
    """In UTF-8."""
    marks: dict[str, Any]


class Extracted(NamedTuple):
    """The outcome for a page."""

    text: str = ""
    title: str = ""
    problem: str = ""
    """`read.page_time` and the like, where there is no text."""
    said: str = ""


def page_documents(readings: Iterable[FileReading], settings: ReadConfig) -> Iterator[Document]:
    """The documents of files of HTML, each of which is a page. Raises ReadError with on_error=stop, and ChangedError."""
    return extracted_documents(_pages(readings), settings)


def extracted_documents(pages: Iterable[Page | Document], settings: ReadConfig) -> Iterator[Document]:
    """The documents of pages; what is a document already passes through. Raises ReadError with on_error=stop."""
    with Extractor(settings) as extractor:
        for batch in _batches(pages):
            answers = iter(extractor.extract([item.data for item in batch if isinstance(item, Page)]))
            for item in batch:
                if isinstance(item, Document):
                    yield item
                elif (document := _document(item, next(answers))) is not None:
                    yield document


def _pages(readings: Iterable[FileReading]) -> Iterator[Page]:
    for reading in readings:
        data = whole_file(reading, reading.settings.page_bytes, "page_bytes")
        if data is not None and (page := page_in_utf8(reading, data, "")) is not None:
            yield Page(reading, 0, "", page, {})


def _document(page: Page, answer: Extracted) -> Document | None:
    if answer.problem:
        page.reading.refuse(answer.problem, page.where, answer.said)
        return None
    if not answer.text:
        page.reading.count("read.empty")
        return None
    marks = page.marks | ({"title": answer.title} if answer.title else {})
    return page.reading.document(answer.text, page.at, marks)


def _batches(pages: Iterable[Page | Document]) -> Iterator[list[Page | Document]]:
    batch: list[Page | Document] = []
    held = 0
    for page in pages:
        batch.append(page)
        held += len(page.data if isinstance(page, Page) else page.text)
        if held >= BATCH_BYTES or len(batch) == BATCH_PAGES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class _DiedError(Exception):
    """The process has ended, or had to be."""

    def __init__(self, problem: str, said: str) -> None:
        super().__init__(said)
        self.outcome = Extracted(problem=problem, said=said)


class Extractor:
    """The process, started for the first page; `with` ends it."""

    def __init__(self, settings: ReadConfig, module: str = "megatrain.corpus.reading.extracting") -> None:
        """module: what is run, with extractor, seconds and MiB."""
        self._seconds, self._mib = settings.page_seconds, settings.page_memory_mib
        self._command = [sys.executable, "-m", module, settings.extractor, str(self._seconds), str(self._mib)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Extractor:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def extract(self, pages: Sequence[bytes]) -> list[Extracted]:
        """Text and title of pages in UTF-8, or why there are none. Raises ImportError where the extractor is not installed."""
        done: list[Extracted] = []
        while len(done) < len(pages):
            try:
                self._answers(pages[len(done) :], done.append)
            except _DiedError as died:
                again = died.outcome.problem != "read.page_time"
                done.append(self._alone(pages[len(done)]) if again else died.outcome)
        return done

    def _alone(self, page: bytes) -> Extracted:
        found: list[Extracted] = []
        try:
            self._answers([page], found.append)
        except _DiedError as died:
            return died.outcome
        return found[0]

    def _answers(self, pages: Sequence[bytes], give: Callable[[Extracted], None]) -> None:
        """Give the answer for each page, in order. Raises _DiedError at the one that the process does not survive, which is ended then."""
        process = self._process or self._start()
        sizes = b"".join(SIZE.pack(len(page)) for page in pages)
        patience = PATIENCE * self._seconds + 1
        self._send(process, b"".join((COUNT.pack(len(pages)), sizes, *pages)), patience)
        for _ in pages:
            status, *lengths = REPLY.unpack(self._receive(process, REPLY.size, patience))
            title, text = (self._receive(process, length, patience).decode() for length in lengths)
            if status == NO_MEMORY:
                raise self._died("read.page_memory", f"the page needs more than {self._mib:,} MiB (read.page_memory_mib).")
            if status == FAILED:
                raise self._died("read.page_error", f"the extractor fails on the page ({brief(text)}).")
            give(Extracted(text, title))

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the process, with pipes that never block. Raises ImportError."""
        pipe = subprocess.PIPE
        self._process = process = subprocess.Popen(
            self._command, bufsize=0, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for file in (process.stdin, process.stdout):
            assert file is not None  # noqa: S101  both are pipes
            os.set_blocking(file.fileno(), False)
        try:
            ready = self._receive(process, len(READY), START_SECONDS)
            if ready != READY:  # it says what is not installed
                size = SIZE.unpack(self._receive(process, SIZE.size, START_SECONDS))[0]
                raise ImportError(self._receive(process, size, START_SECONDS).decode())
        except _DiedError as died:
            raise ImportError(f"the process that reads HTML does not start: {' '.join(self._command)}") from died
        return process

    def _end(self) -> int:
        """End the process; its exit code, or minus the number of the signal that has ended it."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        with process:
            return process.wait()

    def _send(self, process: subprocess.Popen[bytes], data: bytes, patience: float) -> None:
        """Write all of `data`. Raises _DiedError."""
        assert process.stdin is not None  # noqa: S101
        view, deadline = memoryview(data), time.monotonic() + patience
        while view:
            if not select.select([], [process.stdin], [], max(0.0, deadline - time.monotonic()))[1]:
                raise self._given_up()
            try:
                view = view[os.write(process.stdin.fileno(), view) :]
            except BrokenPipeError:
                raise self._ended(process) from None

    def _receive(self, process: subprocess.Popen[bytes], size: int, patience: float) -> bytes:
        """Read `size` bytes. Raises _DiedError."""
        assert process.stdout is not None  # noqa: S101
        parts, deadline = [], time.monotonic() + patience
        while size:
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self._given_up()
            part = os.read(process.stdout.fileno(), size)
            if not part:
                raise self._ended(process)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _given_up(self) -> _DiedError:
        return self._died("read.page_time", f"no answer within {PATIENCE * self._seconds + 1:g} s.")

    def _ended(self, process: subprocess.Popen[bytes]) -> _DiedError:
        """The error for a process that has ended by itself."""
        code = process.wait()
        if code == -signal.SIGPROF:
            return self._died("read.page_time", f"the page takes more than {self._seconds:g} s (read.page_seconds).")
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return self._died("read.page_crash", f"the extractor breaks down on the page ({how}).")

    def _died(self, problem: str, said: str) -> _DiedError:
        self._end()
        return _DiedError(problem, said)
