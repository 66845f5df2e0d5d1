"""Speed of reading HTML, beside the library alone, which is called in this process: `python docs/benchmarks/html_pages.py [FILE.html ...]`.

Without files, pages are made as the web has them, where most bytes are scripts, styles and attributes, and a tenth is text. Processor time
of this process and of the extractor's, rounds taking turns.
"""

from __future__ import annotations

import html
import json
import resource
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from megatrain.corpus.document import Tally
from megatrain.corpus.reading.choices import ReadConfig, SourceConfig
from megatrain.corpus.reading.documents import read_unit
from megatrain.corpus.reading.units import cut_units

ROUNDS, PAGES = 5, 400


def made_pages(folder: Path) -> list[Path]:
    """Pages of 90 to 130 kB around the texts of the standard library's modules."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(errors="replace") for path in modules]
    files = []
    for number in range(PAGES):
        text = texts[number % len(texts)][:9000]
        items = "".join(
            f'<li class="menu-item menu-item-type-post_type level-{n % 3}" id="menu-item-{n}"><a class="nav-link" data-track="nav-{n}" '
            f'href="https://www.example.org/section/{n}/?utm_source=menu&amp;utm_medium=web">Section {n}</a></li>'
            for n in range(90)
        )
        style = "".join(f".c{n}{{margin:{n}px;padding:0 {n}px;color:#{n:06x}}}\n" for n in range(700))
        state = json.dumps([{"id": n, "url": f"https://cdn.example.org/a/{n}.js", "flags": [n, n + 1]} for n in range(500)])
        body = "".join(f"<p class=article__text>{html.escape(part)}</p>\n" for part in text.split("\n\n"))
        page = (
            f"<!DOCTYPE html><html lang=en><head><meta charset=utf-8><title>Page {number}</title><style>{style}</style>"
            f"<script>window.__STATE__ = {state}</script></head><body><header><nav><ul>{items}</ul></nav></header><main>"
            f"<article><h1>Page {number}</h1>{body}</article></main><footer><p>Imprint, terms, cookies</p></footer>"
            f"<script>window.dataLayer = {state}</script></body></html>"
        )
        files.append(folder / f"{number:04}.html")
        files[-1].write_text(page)
    return files


def seconds(work: Callable[[], None]) -> float:
    """Processor seconds of a call, those of processes that have ended in it among them."""

    def now() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    begun = now()
    work()
    return now() - begun


def main(names: Sequence[str]) -> None:
    """Print MB/s of both, the median of ROUNDS, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(name) for name in names] or made_pages(Path(folder))
        size = sum(path.stat().st_size for path in files) / 1e6
        settings = ReadConfig((SourceConfig("web", tuple(map(str, files))),))

        def ours() -> None:
            for unit in cut_units(settings):
                for _ in read_unit(unit, settings, Tally()):
                    pass

        def library() -> None:
            for path in files:
                tree = HTMLTree.parse_from_bytes(path.read_bytes(), "utf-8")
                extract_plain_text(tree, main_content=True, alt_texts=False)

        pairs = [(seconds(library), seconds(ours)) for _ in range(ROUNDS)]
    speeds = [size / statistics.median(times) for times in zip(*pairs, strict=True)]
    ratio = statistics.median(alone / read for alone, read in pairs)
    print(f"{len(files)} pages, {size:.1f} MB: library {speeds[0]:.1f} MB/s, read_unit {speeds[1]:.1f} MB/s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
