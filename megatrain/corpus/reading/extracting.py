"""The process that takes text out of HTML: `python -m megatrain.corpus.reading.extracting EXTRACTOR SECONDS MIB`, run by pages.py.

It parses what anybody may have written with libraries in C, so it is its own process, and limits itself: the kernel ends it where a page
takes more than SECONDS of processor time, and refuses it memory beyond MIB; it ends within a second when its parent does. Processor time,
since the clock would leave out other pages on a busy machine.

Standard input has batches of pages: their number, the bytes of each, their bytes. Standard output has for each page, as soon as it is done:
a status, the bytes of title and text, title and text in UTF-8.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable
from typing import BinaryIO

from megatrain.corpus.extras import need

COUNT, SIZE, REPLY = struct.Struct("<I"), struct.Struct("<I"), struct.Struct("<BII")
DONE, FAILED, NO_MEMORY = range(3)
"""Statuses of a page; where it failed, its text says why."""
READY, MISSING = b"ready", b"missg"
"""The first words on standard output: pages may come; or the extractor is not installed, of which the bytes of a message and it follow."""

Extract = Callable[[bytes], tuple[str, str]]
"""From a page in UTF-8 to title and text."""


def resiliparse_extract() -> Extract:
    """The extractor of resiliparse. Raises ImportError."""
    parse = need("resiliparse.parse.html", "reading HTML", "data").HTMLTree.parse_from_bytes
    plain = need("resiliparse.extract.html2text", "reading HTML", "data").extract_plain_text

    def extract(page: bytes) -> tuple[str, str]:
        tree = parse(page, "utf-8", "replace")
        return tree.title or "", plain(tree, main_content=True, alt_texts=False)

    return extract


def trafilatura_extract() -> Extract:
    """The extractor of trafilatura, without its cache of what it has seen, which would make a page's text hang on those before. Raises
    ImportError.
    """
    use = "read.extractor=trafilatura"
    find = need("trafilatura", use, "html").extract
    html = need("lxml.html", use, "html")

    def extract(page: bytes) -> tuple[str, str]:
        tree = html.document_fromstring(page.decode(errors="replace"), parser=html.HTMLParser(huge_tree=False))
        title = tree.findtext(".//title") or ""
        return title, find(tree, include_comments=False, deduplicate=False) or ""

    return extract


EXTRACTORS: dict[str, Callable[[], Extract]] = {"resiliparse": resiliparse_extract, "trafilatura": trafilatura_extract}


def serve(extract: Extract, seconds: float, memory_mib: int) -> None:
    """Answer batches until standard input ends or the parent does."""
    _limit_memory(memory_mib << 20)
    parent = os.getppid()
    pages, replies = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # for libraries that print
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    replies.write(READY)
    while _wait(pages, parent) and (head := _read(pages, COUNT.size)):
        sizes = [SIZE.unpack(_read(pages, SIZE.size))[0] for _ in range(COUNT.unpack(head)[0])]
        batch = [_read(pages, size) for size in sizes]
        for page in batch:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            status, title, text = _answer(extract, page)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _write(replies, REPLY.pack(status, len(title), len(text)) + title + text)


def _answer(extract: Extract, page: bytes) -> tuple[int, bytes, bytes]:
    try:
        title, text = extract(page)
        return DONE, title.strip().encode(errors="replace"), text.encode(errors="replace")
    except MemoryError:
        return NO_MEMORY, b"", b""
    except Exception as error:
        return FAILED, b"", f"{type(error).__name__}: {error}"[:400].encode(errors="replace")


def _limit_memory(added: int) -> None:
    """Bound the address space to what it is now and `added` bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + added, now + added))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _wait(pages: BinaryIO, parent: int) -> bool:
    """Wait for a batch; whether the parent still lives. Another process may hold its end of the pipe open."""
    while not select.select([pages], [], [], 1.0)[0]:
        if os.getppid() != parent:
            return False
    return True


def _read(file: BinaryIO, size: int) -> bytes:
    """`size` bytes, fewer at the end of the file."""
    parts = []
    while size and (part := file.read(min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def main(words: list[str]) -> None:
    """Serve with the extractor of a name, which may not be installed."""
    name, seconds, memory = words
    try:
        extract = EXTRACTORS[name]()
    except ImportError as error:
        said = str(error).encode()
        os.write(1, MISSING + SIZE.pack(len(said)) + said)
    else:
        serve(extract, float(seconds), int(memory))


if __name__ == "__main__":
    main(sys.argv[1:])
