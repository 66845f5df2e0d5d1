"""Real text of this machine: the interpreter's library, sources and documentation of installed packages, man pages."""

import gzip
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".py", ".pyi", ".txt", ".md", ".rst", ".h", ".html", ".gz")


def real_texts(most: int) -> Iterator[str]:
    """Texts of at most so many characters together, one a file."""
    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    roots += [Path("/usr/share/man"), Path("/usr/share/doc")]
    for root in dict.fromkeys(roots):
        for path in sorted(root.rglob("*")):
            text = _text_of(path) if path.suffix in SUFFIXES else ""
            if most <= len(text):
                return
            if text:
                most -= len(text)
                yield text


def _text_of(path: Path) -> str:
    """The text of a file; nothing where it is not UTF-8."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return ""
