"""Text out of HTML, by a process of its own (extracting.py), so that a page that is made to break things costs itself and never the run.

Pages go there in batches. Where the process ends within one, or cannot do a page, it is started again and goes on with the rest. That page
is tried a second time by itself, unless it took too long, since what came before it may have been to blame; then it is counted and named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from megatrain.corpus.document import Document
from megatrain.corpus.reading.choices import ReadConfig
from megatrain.corpus.reading.encoded import page_in_utf8
from megatrain.corpus.reading.extracting import DONE, NO_MEMORY, REPLY
from megatrain.corpus.reading.file_reading import FileReading
from megatrain.corpus.reading.texts import whole_file
from megatrain.files import brief
from megatrain.isolation import SIZE, DiedError, Isolated

BATCH_BYTES, BATCH_PAGES = 4 << 20, 256
PATIENCE = 15.0
"""Times page_seconds, by the clock, after which a process is ended that its own limit has not."""


class Page(NamedTuple):
    """A page of HTML that waits for its text."""

    reading: FileReading
    at: int
    where: str
    data: bytes
    """The page, in UTF-8."""
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
            answers = extractor.extract([item.data for item in batch if isinstance(item, Page)])
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


class Extractor(Isolated):
    """The process that takes text out of pages."""

    def __init__(self, settings: ReadConfig) -> None:
        self._seconds, self._mib = settings.page_seconds, settings.page_memory_mib
        words = (settings.extractor, str(self._seconds), str(self._mib))
        super().__init__("megatrain.corpus.reading.extracting", *words)

    def extract(self, pages: Sequence[bytes]) -> Iterator[Extracted]:
        """Text and title of pages in UTF-8, or why there are none, as they come. Raises ImportError without the extractor."""
        done = 0
        while done < len(pages):
            for answer in self._answers(pages[done:]):
                again = answer.problem not in ("", "read.page_time")
                yield next(self._answers([pages[done]])) if again else answer
                done += 1

    def _answers(self, pages: Sequence[bytes]) -> Iterator[Extracted]:
        """The outcome for each page, in order, up to one without a text, after which the process has ended."""
        sizes = b"".join(SIZE.pack(len(page)) for page in pages)
        patience = PATIENCE * self._seconds + 1
        try:
            self.send(b"".join((SIZE.pack(len(pages)), sizes, *pages)), patience)
            for _ in pages:
                status, *lengths = REPLY.unpack(self.receive(REPLY.size, patience))
                title, text = (self.receive(length, patience).decode() for length in lengths)
                if status != DONE:
                    self.end()
                    yield self._failed(status, text)
                    return
                yield Extracted(text, title)
        except DiedError as died:
            yield self._ended(died, patience)

    def _ended(self, died: DiedError, patience: float) -> Extracted:
        """The outcome for a page that the process does not survive."""
        if died.code is None:
            return Extracted(problem="read.page_time", said=f"no answer within {patience:g} s.")
        if died.took_too_long:
            return Extracted(
                problem="read.page_time", said=f"the page takes more than {self._seconds:g} s (read.page_seconds)."
            )
        return Extracted(problem="read.page_crash", said=f"the extractor breaks down on the page ({died.how}).")

    def _failed(self, status: int, said: str) -> Extracted:
        """The outcome for a page whose extractor gives up."""
        if status == NO_MEMORY:
            said = f"the page needs more than {self._mib:,} MiB (read.page_memory_mib)."
            return Extracted(problem="read.page_memory", said=said)
        return Extracted(problem="read.page_error", said=f"the extractor fails on the page ({brief(said)}).")
