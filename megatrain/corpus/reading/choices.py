"""The sources of a corpus and how they are read: what a config says under `read:`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatrain.config.knob import knob

Form = Literal["text", "lines", "html", "warc", "parquet"]


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents."""

    name: str = knob("", "Name of the source, in the report and with each document.", not_empty=True, use="web")
    paths: tuple[str, ...] = knob(
        (),
        "Its files: paths, or patterns where `*` stands for any part of a name and `**` for any folders. A file that several match "
        "is read once.",
        path=True,
        use=("raw/web/**/*.jsonl.zst",),
    )
    form: Literal["auto", "text", "lines", "html", "warc", "parquet"] = knob(
        "auto",
        "What its files are: `text` (a file is a document), `lines` (a line of JSON is one), `html` (a page is one), `warc`, `parquet` "
        "(a row is one). `auto`: told by their names: .txt, .md, .rst, .py; .jsonl, .json, .ndjson; .html, .htm; .warc; .parquet; each "
        "also as .gz or .zst but for the last. With kind=code all else is text, .json and .html too.",
    )
    kind: Literal["text", "code"] = knob("text", "What its documents are, which decides the rules that they go through.")
    language: str = knob(
        "auto", "Language of its documents, as ISO 639-1 has it (en, zh); `auto`: found for each.", not_empty=True
    )
    weight: float = knob(1.0, "Share of the source in the blend, relative to the others.", above=0)
    key: str = knob("text", "Field of the text in a line of JSON, or column of a parquet file.", not_empty=True)
    keep: tuple[str, ...] = knob(
        (), "Further fields that go with the document, under their names.", not_empty=True, use=("url",)
    )
    encoding: str = knob(
        "auto",
        "Encoding of its files, as Python names it (gb18030, shift_jis, windows-1252). `auto`: a byte-order mark decides; an HTML page may "
        "declare one; all else is UTF-8.",
        not_empty=True,
    )
    rules: tuple[str, ...] = knob(
        ("auto",), "Rule sets that its documents go through; `auto`: that of their language and kind; []: none.", not_empty=True
    )
    thresholds: tuple[tuple[str, float | bool], ...] = knob(
        (),
        "Thresholds of single rules, as {rule: number}; false switches a rule off.",
        use=(("gopher.mean_length.most", 12.0),),
    )


@dataclass(frozen=True)
class ReadConfig:
    """The files that documents are read from, and what happens to what is broken in them."""

    sources: tuple[SourceConfig, ...] = knob((), "The sources: a list of mappings with the keys below.")
    unit_bytes: int = knob(
        128 << 20,
        "Bytes of a unit of work, which one worker does at a time and a killed one leaves to another. Units are cut from the files alone: "
        "another value gives the same documents. Compressed files are never divided.",
        at_least=1,
    )
    on_error: Literal["skip", "stop"] = knob(
        "skip", "What a document that cannot be read costs: itself, counted and named in the report, or the run."
    )
    broken_text: Literal["replace", "refuse"] = knob(
        "replace",
        "Bytes that are no text in the file's encoding, halves of surrogate pairs and NULs: `replace` puts U+FFFD for the first two and "
        "takes out the third, counted; `refuse` makes the document one that cannot be read.",
    )
    longest: int = knob(
        32 << 20,
        "Bytes of a line, or of a file that is one document. A longer one is passed over without being held in memory; up to ten times as "
        "many bytes of memory are needed for one.",
        at_least=1,
    )
    unpacked_ratio: int = knob(
        250,
        "A compressed file may become that many times as large, once it is beyond 64 MiB: what goes further is a bomb.",
        at_least=1,
    )
    unpacked_mib: int = knob(1 << 20, "MiB that a compressed file may become at most.", at_least=1)
    extractor: Literal["resiliparse", "trafilatura"] = knob(
        "resiliparse",
        "What takes the text out of HTML: `resiliparse` is fast and keeps most, `trafilatura` leaves more of a page's frame out.",
    )
    page_seconds: float = knob(
        4.0, "Seconds of processor time that a page of HTML may take; one that takes longer is passed over.", above=0
    )
    page_bytes: int = knob(16 << 20, "Bytes of a page of HTML; a larger one is passed over.", at_least=1)
    page_memory_mib: int = knob(512, "MiB of memory that the extractor may take.", at_least=64)

    def source(self, name: str) -> SourceConfig:
        """The source of a name. Raises KeyError."""
        return next(source for source in self.sources if source.name == name)
