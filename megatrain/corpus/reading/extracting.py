"""The process that takes text out of HTML: `python -m megatrain.corpus.reading.extracting EXTRACTOR SECONDS MIB`, run by pages.py.

Requests are batches of pages: their number, the bytes of each, their bytes. The answer for each page comes as soon as it is done: a status,
the bytes of title and text, title and text in UTF-8.
"""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Callable

from megatrain.extras import need
from megatrain.isolation import SIZE, Requests, packages

REPLY = struct.Struct("<BII")
DONE, FAILED, NO_MEMORY = range(3)
"""Statuses of a page; where it failed, its text says why."""

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
    """Answer batches until standard input or the parent ends."""
    requests = Requests(seconds, memory_mib)
    while requests.more() and (head := requests.read(SIZE.size)):
        sizes = [SIZE.unpack(requests.read(SIZE.size))[0] for _ in range(SIZE.unpack(head)[0])]
        for page in [requests.read(size) for size in sizes]:
            status, title, text = requests.timed(functools.partial(_answer, extract, page))
            requests.answer(REPLY.pack(status, len(title), len(text)) + title + text)


def _answer(extract: Extract, page: bytes) -> tuple[int, bytes, bytes]:
    try:
        title, text = extract(page)
        return DONE, title.strip().encode(errors="replace"), text.encode(errors="replace")
    except MemoryError:
        return NO_MEMORY, b"", b""
    except Exception as error:  # whatever a library raises costs the page alone
        return FAILED, b"", f"{type(error).__name__}: {error}"[:400].encode(errors="replace")


if __name__ == "__main__":
    name, most_seconds, mib = sys.argv[1:]
    serve(packages(EXTRACTORS[name]), float(most_seconds), int(mib))
