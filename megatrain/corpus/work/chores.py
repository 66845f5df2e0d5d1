"""Chores, phases, and what is published of them.

A chore writes files into a folder of its own, which gets its name when all of them are on the disk, with `done.json`:

    <phase>/<chore>/done.json       {"files": {name: [bytes, xxh3-128]}, "facts": ...}
    <phase>/<chore>/...             the files

A phase's name ends in its key, a hash of all that its files depend on: so another config never meets what an older one has left.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatrain.files import OneLine, doing, make_folder, opened_plain, whole

DONE, LEASES = "done.json", "leases"
BLOCK = 1 << 20


class WorkError(OneLine, ValueError):
    """A published file that is not what its chore has written."""


Work = Callable[[Path, Callable[[int], None]], Mapping[str, Any]]
"""Writes files into a folder, says how many bytes are done since it last said so, and returns facts: values for JSON."""


@dataclass(frozen=True)
class Chore:
    """One part of a phase."""

    name: str
    size: int
    """Bytes by which the progress bar counts it."""
    run: Work
    steady: bool = False
    """It says how far it is again and again, so that one that is silent for long is stuck."""
    about: str = ""
    """Its input, as errors name it."""


@dataclass(frozen=True)
class Phase:
    """Chores that need nothing of each other, only of earlier phases."""

    title: str
    key: str
    chores: Sequence[Chore]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.title}-{self.key[:12]}"


def key_of(*parts: Any) -> str:
    """A hash of values for JSON."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode())


class Published:
    """The folders of chores under a root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._checked: set[Path] = set()

    def folder(self, phase: Phase, chore: str) -> Path:
        """Where the files of a chore are, or will be."""
        return self.root / phase.name / chore

    def is_done(self, phase: Phase, chore: str) -> bool:
        """Whether a chore is published."""
        return (self.folder(phase, chore) / DONE).is_file()

    def done(self, phase: Phase) -> set[str]:
        """The chores of a phase that are published, by one look at its folder: a name in it appears with all that belongs to it."""
        try:
            with os.scandir(self.root / phase.name) as entries:
                return {entry.name for entry in entries if not entry.name.startswith(".")}
        except FileNotFoundError:
            return set()

    def facts(self, phase: Phase, chore: str) -> dict[str, Any]:
        """The facts that a chore returned."""
        return self._done(self.folder(phase, chore))[1]

    def names(self, phase: Phase, chore: str) -> list[str]:
        """The names of the files of a chore."""
        return sorted(self._done(self.folder(phase, chore))[0])

    def file(self, phase: Phase, chore: str, name: str, *, whole: bool = True) -> Path:
        """A file of a chore. Raises WorkError if it is not the one that was written; whole: every byte is compared, else the size."""
        folder = self.folder(phase, chore)
        path = folder / name
        if path not in self._checked:
            written = self._done(folder)[0].get(name)
            if (
                written is None
                or not path.is_file()
                or written != (_identity(path) if whole else [path.stat().st_size, written[1]])
            ):
                raise WorkError(f"{path} was changed after it was written. Remove {folder}, and it is made again.")
            if whole:
                self._checked.add(path)
        return path

    def _done(self, folder: Path) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """(files, facts) of a chore."""
        path = folder / DONE
        try:
            found = json.loads(path.read_bytes())
            files, facts = found["files"], found["facts"]
            if not isinstance(files, dict) or not isinstance(facts, dict):
                raise TypeError
        except (ValueError, KeyError, TypeError, FileNotFoundError, RecursionError):
            raise WorkError(f"{path} is damaged or gone. Remove {folder}, and it is made again.") from None
        return files, facts

    def publish(self, phase: Phase, chore: Chore, progress: Callable[[int], None]) -> None:
        """Run a chore and publish it, unless another worker was first. Raises what the chore does, and then leaves nothing behind."""
        target = self.folder(phase, chore.name)
        part = target.with_name(f".{chore.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
        make_folder(part)
        try:
            facts = chore.run(part, progress)
            files = {path.name: _identity(path, flush=True) for path in sorted(part.iterdir())}
            with whole(part / DONE, text=True) as file:
                json.dump({"files": files, "facts": facts}, file, sort_keys=True)
            with doing("writing", target):
                part.rename(target)
        except OSError:
            if not self.is_done(phase, chore.name):
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def sweep(self, phase: Phase) -> None:
        """Remove what lost workers have left of a phase that is done."""
        for path in (self.root / phase.name).glob(".*.part"):
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Remove the folders of all phases, of other configs too; their files stay where they have another name."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def _identity(path: Path, flush: bool = False) -> list[Any]:
    """[bytes, hash] of a file; flush: bring it to the disk too."""
    hashed = xxhash.xxh3_128()
    with opened_plain(path) as file, doing("reading", path):
        while block := file.read(BLOCK):
            hashed.update(block)
        if flush:
            os.fsync(file.fileno())
        return [file.tell(), hashed.hexdigest()]
