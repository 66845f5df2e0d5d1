"""`megatrain data audit`: looks at files or token stores without a config, and writes a report on them; nothing of them is changed.

Each document goes into and out of one stage, `audit`, and what is noted of it is counted as rules are: share, bytes, examples.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatrain.corpus.document import Document, Step
from megatrain.corpus.reading.choices import ReadConfig, SourceConfig
from megatrain.corpus.reading.documents import read_unit
from megatrain.corpus.reading.units import FORMS, compression_of, cut_units
from megatrain.corpus.report.compose import write_report
from megatrain.corpus.report.unit_audit import Audit
from megatrain.corpus.rules.language import language_step
from megatrain.corpus.rules.rule_choices import LanguageConfig
from megatrain.data.bar import bar
from megatrain.data.describing import tokenizer_of
from megatrain.data.indexed import TokenStore
from megatrain.data.prepare.read import ReadError
from megatrain.data.tokenizer import Tokenizer, load_tokenizer

STAGE = "audit"
LONG_LINE = 20_000
"""Characters of a line that is noted: data or minified code more often than text."""
INDEX = ".idx"
_UNKNOWN = "the tokenizer that made it is not known, or not where it was. Name it: --tokenizer tokenizer.json"

_BROKEN = re.compile("\ufffd")
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
_PRIVATE = re.compile("[\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000f0000-\U0010ffff]")
_FROM_1252 = str.maketrans({bytes([byte]).decode("cp1252", "ignore") or chr(byte): chr(byte) for byte in range(0x80, 0xA0)})
"""Characters of the bytes 0x80 to 0x9f in windows-1252 -> in Latin-1."""
_MISREAD = re.compile("[\xc2-\xf4][\x80-\xbf" + "".join(map(chr, _FROM_1252)) + "]+")
_USUAL = re.compile("[\u00a0-\u017f\u0391-\u03c9\u0400-\u045f\u0620-\u064a\u0800-\U0010ffff]")
"""Characters that text has: of those of two bytes only the most usual, since two characters in a row are often meant."""
MOJIBAKE = 2
"""Places of mojibake from which it is noted: a single one may be meant."""


@dataclass(frozen=True)
class SurveyOptions:
    """How files are looked at."""

    key: str = "text"
    tokenizer: str | None = None
    """The tokenizer of token stores whose own is not where their record says."""
    seed: int = 0
    sheet: int = 100


def notes_on(text: str) -> Iterator[str]:
    """The oddities of a text, by name."""
    if not text.strip():
        yield "empty"
    if _BROKEN.search(text):
        yield "replacement_character"
    if _CONTROL.search(text):
        yield "control_character"
    if _PRIVATE.search(text):
        yield "private_character"
    if any(number == MOJIBAKE for number, _ in enumerate(_misread(text), 1)):
        yield "mojibake"
    if len(text) > LONG_LINE and max(map(len, text.split("\n"))) > LONG_LINE:
        yield "long_line"


def _misread(text: str) -> Iterator[str]:
    """Usual characters whose UTF-8 was read as Latin-1 or windows-1252; unusual ones may be two characters that are meant (ß“)."""
    for run in _MISREAD.finditer(text):
        yield from _USUAL.findall(run[0].translate(_FROM_1252).encode("latin-1").decode("utf-8", "ignore"))


def survey(inputs: Sequence[str], output: Path, options: SurveyOptions) -> list[str]:
    """Write the report on files, folders of files, and token stores (their prefix); its alarms.

    A folder's sources are its own files together, and each folder in it. About 150 bytes of memory a document, for copies. Raises
    ReadError, TokenStoreError or OSError.
    """
    audit = Audit(options.seed, sheet=options.sheet)
    files, prefixes = _found(inputs)
    copies = Counter[bytes]()
    language, note = _language()
    for document in _documents(files, prefixes, options, audit):
        audit.enter(STAGE, document)
        if language is not None:
            language(document, audit.tally)
        digest = xxhash.xxh3_128_digest(document.text.encode())
        copies[digest] += 1
        noted = [*notes_on(document.text), *(["copy"] if copies[digest] > 1 else [])]
        audit.leave(STAGE, document, noted, keep=True)
        audit.show(document)
    for size, number in Counter(copies.values()).items():
        if size > 1:
            audit.tally.count(f"cluster/exact/{size}", number)
    title = f"Audit of {inputs[0]}" + (f" and {len(inputs) - 1:,} more" if len(inputs) > 1 else "")
    return write_report(
        output, audit, [STAGE], title=title, note=f"Nothing was removed: rules say what is odd about documents.{note}"
    )


def _language() -> tuple[Step | None, str]:
    """The step that tells languages, if its package is there, and what to say if it is not."""
    step = language_step(LanguageConfig())
    try:
        step(Document("Which language is this?", "", "", 0), Audit().tally)
    except ImportError as error:
        return None, f" Languages are not told: {error}."
    return step, ""


def _found(inputs: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, bool]]:
    """Files by source, and prefixes of token stores with whether they are named themselves. Raises ReadError."""
    files: dict[str, list[str]] = {}
    prefixes: dict[str, bool] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(_below(path), key=os.fsencode)
            if not found:
                raise ReadError(
                    f"{name}: there is no file of text or token store below it. Names end in {', '.join(FORMS)}, .idx."
                )
            for file in found:
                if file.endswith(INDEX):
                    prefixes.setdefault(file.removesuffix(INDEX), False)
                else:
                    parts = Path(file).relative_to(path).parts
                    files.setdefault("/".join((path.name, *parts[:-1][:1])), []).append(file)
        elif Path(name + INDEX).is_file():
            prefixes[name] = True
        elif name.endswith(INDEX) and path.is_file():
            prefixes[name.removesuffix(INDEX)] = True
        else:
            files.setdefault(name, []).append(name)
    return files, prefixes


def _below(folder: Path) -> Iterator[str]:
    """Files of a folder whose names say that they hold text, and the indices of token stores."""
    for path in folder.rglob("*"):
        name = str(path)
        suffix = Path(name.removesuffix(compression_of(name))).suffix.lower()
        if path.is_file() and (suffix in FORMS or path.suffix == INDEX):
            yield name


def _documents(
    files: dict[str, list[str]], prefixes: dict[str, bool], options: SurveyOptions, audit: Audit
) -> Iterator[Document]:
    sources = tuple(
        SourceConfig(name=source, paths=tuple(map(glob.escape, names)), key=options.key) for source, names in files.items()
    )
    if sources:
        settings = ReadConfig(sources=sources)
        units = cut_units(settings)
        with bar("audit", sum(unit.size for unit in units), in_bytes=True) as advance:
            for unit in units:
                yield from read_unit(unit, settings, audit.tally)
                advance(unit.size)
    for prefix, named in prefixes.items():
        store = TokenStore(prefix)
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer is not None else tokenizer_of(store)
        if tokenizer is not None:
            yield from _stored(store, tokenizer, audit)
        elif named:
            raise ReadError(f"{prefix}: {_UNKNOWN}")
        else:
            audit.tally.problem("audit.no_tokenizer", prefix, "", _UNKNOWN)


def _stored(store: TokenStore, tokenizer: Tokenizer, audit: Audit) -> Iterator[Document]:
    """The documents of a token store as text."""
    decode = _decoder(tokenizer)
    with bar("audit", store.documents) as advance:
        for number in range(store.documents):
            tokens = store.document(number)
            document = Document(decode(tokens.tolist()), Path(store.prefix).name, store.prefix, number)
            audit.tokenized(document.source, len(document.text.encode()), len(tokens))
            yield document
            advance(1)


def _decoder(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    """Ids to text, without the token that ends documents."""
    end = tokenizer.eod
    return lambda ids: tokenizer.decode(number for number in ids if number != end and 0 <= number < tokenizer.vocab_size)
