"""Files handed from rank to rank, over sockets of their own beside the groups: a thread sends while training goes on.

    the rank that sends                          the rank that takes them in
    connects                              <-     32 random bytes
    32 others, proof that it is a rank    ->     (whoever has none is sent away)
    (whoever has none gets nothing)       <-     proof that it is a rank
    label, names, sizes, checksums        ->     "", or why it will not
    the files' bytes                      ->     hashes each block as it comes, writes it beside its place, renames the whole file
                                          <-     "", or what went wrong

The key of the proofs is made anew by each `Handover` of what all ranks have drawn and told each other through their groups. Nothing can be
read here, only given. Who sends learns that all was taken in, so nobody waits for what may never come; each wait has a limit.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from megatrain.files import shown
from megatrain.transport.consensus import gather_texts
from megatrain.transport.group import Group, TransportError
from megatrain.transport.seal import SEAL_LETTERS, Seal

IDLE_SECONDS = 20.0
"""How long either side waits for the next bytes of the other."""
_PROOF_SECONDS = 5.0
"""How long a caller may take to prove that it is a rank."""
_MOST_CALLERS = 64
"""Callers at one time that have not proved it yet."""
_NONCE_BYTES = 32
_LONGEST_LIST = 64 * 2**20
"""Bytes of names and checksums that a rank may announce."""
_PART = ".part"
"""End of a file's name while it comes."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")


class Parcel(NamedTuple):
    """A file to hand over."""

    path: Path
    size: int
    """Bytes of the file."""
    blocks: tuple[str, ...]
    """XXH3-128 of each block, as 32 hex digits."""


class Taken(NamedTuple):
    """A file that was taken in, as its giver described it, and as it was found to be."""

    size: int
    blocks: tuple[str, ...]


class Handover:
    """The part of one rank: it takes files in, and hands its own to others."""

    def __init__(self, address: str, block_bytes: int, group: Group, device: torch.device, secret: bytes = b"") -> None:
        """Listen at an address of this machine (collective). block_bytes: the same on all ranks; secret: what strangers do not have.

        Raises TransportError on every rank where one cannot listen.
        """
        self.taken: dict[str, Taken] = {}
        """Name -> what was taken in under the label of `expect`."""
        self._rank, self._block_bytes = group.rank, block_bytes
        self._label, self._folder = "", Path()
        self._lock, self._open, self._closed = threading.Lock(), set[socket.socket](), False
        self._strangers = threading.Semaphore(_MOST_CALLERS)
        listener, problem = None, ""
        try:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = socket.create_server((address, 0), family=family, backlog=_MOST_CALLERS)
        except OSError as error:
            problem = f"rank {group.rank} cannot listen at {address}: {error.strerror or error}"
        port = 0 if listener is None else listener.getsockname()[1]
        texts = gather_texts(json.dumps([address, port, problem, secrets.token_hex(32)]), group, device)
        self._seal = Seal(hashlib.sha256(secret + "\0".join(texts).encode()).hexdigest().encode())
        said = [json.loads(text) for text in texts]
        self._addresses = [(str(at), int(number)) for at, number, _, _ in said]
        first = next((trouble for _, _, trouble, _ in said if trouble), "")
        if listener is None or first:
            if listener is not None:
                listener.close()
            raise TransportError(first)
        self._open.add(listener)
        self._start(partial(self._listen, listener))

    def expect(self, label: str, folder: Path) -> None:
        """From here on take in files that come under this label, into `folder`. Call it on all ranks before any of them sends."""
        with self._lock:
            self._label, self._folder, self.taken = label, folder, {}

    def send(self, to: int, label: str, parcels: Sequence[Parcel], seconds: float) -> None:
        """Hand files to a rank; returns when it has them, whole. seconds: limit of all of it. Raises TransportError."""
        end = time.monotonic() + seconds
        try:
            with closing(socket.create_connection(self._addresses[to], timeout=IDLE_SECONDS)) as line, self._held(line):
                self._send_through(line, label, parcels, end)
        except OSError as error:
            host, port = self._addresses[to]
            why = f"no answer for {IDLE_SECONDS:g} s" if isinstance(error, TimeoutError) else (error.strerror or str(error))
            raise TransportError(f"rank {self._rank} could not hand {label} to rank {to} at {host}:{port}: {why}") from error

    def close(self) -> None:
        """End all that is under way, on both sides."""
        with self._lock:
            self._closed, lines = True, list(self._open)
        for line in lines:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    # --- who sends --------------------------------------------------------------------------------------------------------

    def _send_through(self, line: socket.socket, label: str, parcels: Sequence[Parcel], end: float) -> None:
        """Raises OSError with the reason."""
        theirs, mine = _read(line, _NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
        place = (theirs + mine).hex()
        line.sendall(mine + self._seal.close_bytes(f"caller {place}", b""))
        if self._seal.open_bytes(f"taker {place}", _read(line, SEAL_LETTERS)) is None:
            raise OSError("who listens there is no rank of this run")
        listed = [label, self._rank, [[parcel.path.name, parcel.size, parcel.blocks] for parcel in parcels]]
        _say(line, self._seal, f"list {place}", json.dumps(listed).encode())
        _must_be_empty(_hear(line, self._seal, f"answer {place}"))
        for parcel in parcels:
            with parcel.path.open("rb") as file:
                for start, length in _blocks(parcel.size, self._block_bytes):
                    if time.monotonic() > end:
                        raise OSError("it takes too long")
                    if line.sendfile(file, start, length) != length:
                        raise OSError(f"{parcel.path} is shorter than it was")
        _must_be_empty(_hear(line, self._seal, f"result {place}"))

    # --- who takes them in ------------------------------------------------------------------------------------------------

    def _listen(self, listener: socket.socket) -> None:
        while True:
            self._strangers.acquire()
            try:
                line, _ = listener.accept()
            except OSError:
                if self._closed:
                    return
                self._strangers.release()
                time.sleep(0.1)  # too many open files, for the moment
                continue
            self._start(partial(self._serve, line))

    def _serve(self, line: socket.socket) -> None:
        """Take in the files of one caller, who may be anybody and so has to prove who it is first."""
        with closing(line), suppress(OSError, ValueError, TypeError), self._held(line):
            try:
                place = self._proved(line)
            finally:
                self._strangers.release()
            if place:
                line.settimeout(IDLE_SECONDS)
                line.sendall(self._seal.close_bytes(f"taker {place}", b""))
                self._take(line, place)

    def _proved(self, line: socket.socket) -> str:
        """A name of this connection that no other has had, once the caller has proved that it is a rank; else "". Raises OSError."""
        line.settimeout(_PROOF_SECONDS)
        mine = secrets.token_bytes(_NONCE_BYTES)
        line.sendall(mine)
        place = (mine + _read(line, _NONCE_BYTES)).hex()
        return "" if self._seal.open_bytes(f"caller {place}", _read(line, SEAL_LETTERS)) is None else place

    def _take(self, line: socket.socket, place: str) -> None:
        """Take in what a rank gives. Raises OSError, ValueError and TypeError where the connection breaks off."""
        with self._lock:
            wanted, folder, taken = self._label, self._folder, self.taken
        label, giver, listed = json.loads(_hear(line, self._seal, f"list {place}"))
        files = {str(name): Taken(int(size), tuple(map(str, blocks))) for name, size, blocks in listed}
        problem = (
            f"it came under {label!r}, and {wanted!r} is expected" if label != wanted else self._no_room(folder, files, giver)
        )
        _say(line, self._seal, f"answer {place}", problem.encode())
        if problem:
            return
        buffer = bytearray(min(self._block_bytes, max((file.size for file in files.values()), default=0)))
        for name, file in files.items():
            problem = self._write(line, folder / name, file, buffer, problem)
            if not problem:
                taken[name] = file
        _say(line, self._seal, f"result {place}", problem.encode())

    def _no_room(self, folder: Path, files: Mapping[str, Taken], giver: int) -> str:
        """Why files cannot be written to a folder; "" if they can."""
        need = sum(file.size for file in files.values())
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            return f"rank {self._rank} cannot write to {folder}: {error.strerror}"
        if strange := next((name for name in files if not _NAME.fullmatch(name)), ""):
            return f"{strange!r} is no name of a file"
        return f"rank {self._rank} needs {need:,} bytes in {folder} for what rank {giver} gives, and has {free:,} free" * (
            need > free
        )

    def _write(self, line: socket.socket, path: Path, file: Taken, buffer: bytearray, problem: str) -> str:
        """Write a file that comes; after a problem it is only read, so that the giver hears of it. Returns the first problem, or ""."""
        part = path.with_name(path.name + _PART)
        with closing(_Sink(part)) as sink:
            for (_, length), sum_ in zip(_blocks(file.size, self._block_bytes), file.blocks, strict=True):
                block = memoryview(buffer)[:length]
                _fill(line, block)
                if not problem and xxhash.xxh3_128_hexdigest(block) != sum_:
                    problem = f"{path.name} has other bytes than its checksums say, as rank {self._rank} has got it"
                problem = problem or sink.write(block)
        if problem:
            part.unlink(missing_ok=True)
        else:
            part.replace(path)
        return problem

    @contextmanager
    def _held(self, line: socket.socket) -> Iterator[None]:
        """A connection that `close` ends."""
        with self._lock:
            if self._closed:
                raise OSError("this rank is ending")
            self._open.add(line)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(line)

    def _start(self, run: Callable[[], None]) -> None:
        threading.Thread(target=run, name="megatrain-handover", daemon=True).start()


class _Sink:
    """A file that is written; what fails is told, not raised."""

    def __init__(self, path: Path) -> None:
        self._file: Any = None
        self._problem = ""
        try:
            self._file = path.open("wb")
        except OSError as error:
            self._problem = f"cannot write {path}: {error.strerror}"

    def write(self, block: memoryview) -> str:
        """Append a block; returns "" or the problem."""
        try:
            if self._file is not None:
                self._file.write(block)
                self._file.flush()
        except OSError as error:
            self._problem = f"cannot write {self._file.name}: {error.strerror}"
        return self._problem

    def close(self) -> None:
        with suppress(OSError):  # told before, as all is flushed
            if self._file is not None:
                self._file.close()


def _blocks(size: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, length) of each block of a file."""
    return ((start, min(block_bytes, size - start)) for start in range(0, size, block_bytes))


def _read(line: socket.socket, length: int) -> bytes:
    """The next `length` bytes of a connection. Raises OSError."""
    data = bytearray(length)
    _fill(line, memoryview(data))
    return bytes(data)


def _fill(line: socket.socket, view: memoryview) -> None:
    """Fill a view with what comes. Raises OSError."""
    done = 0
    while done < len(view):
        got = line.recv_into(view[done:])
        if not got:
            raise OSError("the connection broke off")
        done += got


def _say(line: socket.socket, seal: Seal, place: str, data: bytes) -> None:
    sealed = seal.close_bytes(place, data)
    line.sendall(len(sealed).to_bytes(8, "big") + sealed)


def _hear(line: socket.socket, seal: Seal, place: str) -> bytes:
    """A message of the other side, which has proved who it is. Raises OSError."""
    length = int.from_bytes(_read(line, 8), "big")
    found = seal.open_bytes(place, _read(line, length)) if length <= _LONGEST_LIST else None
    if found is None:
        raise OSError("what came is not sealed by a rank of this run")
    return found


def _must_be_empty(answer: bytes) -> None:
    """Raise OSError with the other side's reason, if it gives one."""
    if answer:
        raise OSError(shown(answer.decode(errors="replace")))
