"""Mail for the engine before a step: new requests, those that nobody waits for any more, the end. The same on every rank.

    rank 0   HTTP --> mailbox --> mail --broadcast--> engine.step()
    rank 1                         ... --broadcast--> engine.step()      the same requests in the same order, so the same steps

A broadcast is 8 bytes where there is no mail, as before most steps.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from megatrain.inference.requests import Request, Sampling
from megatrain.inference.text_places import LEFT_TO_RIGHT, BlankPlaces, Segment, TextPlaces
from megatrain.parallel.mesh import Axis


@dataclass(frozen=True)
class Mail:
    """The news that one step begins with."""

    new: tuple[tuple[int, Request], ...] = ()
    """(key, request) in the order of their arrival; a key is given once."""
    dropped: tuple[int, ...] = ()
    """Keys of requests that are to end."""
    end: bool = False
    """Whether nothing will follow."""

    def __bool__(self) -> bool:
        return bool(self.new or self.dropped or self.end)


class Mailbox:
    """Where one thread leaves mail for another."""

    def __init__(self) -> None:
        self._new: list[tuple[int, Request]] = []
        self._dropped: list[int] = []
        self._end = False
        self._changed = threading.Condition()

    def add(self, requests: Sequence[tuple[int, Request]]) -> None:
        """Leave new requests."""
        with self._changed:
            self._new += requests
            self._changed.notify()

    def drop(self, keys: Sequence[int]) -> None:
        """Say that nobody waits for some requests."""
        with self._changed:
            self._dropped += keys
            self._changed.notify()

    def close(self) -> None:
        """Say that this is all."""
        with self._changed:
            self._end = True
            self._changed.notify()

    def collect(self, seconds: float) -> Mail:
        """All that is there; waits so long where there is nothing."""
        until = time.monotonic() + seconds
        with self._changed:
            while not (self._new or self._dropped or self._end):
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            mail = Mail(tuple(self._new), tuple(self._dropped), self._end)
            self._new, self._dropped = [], []
            return mail


def shared(mail: Mail, world: Axis, device: torch.device) -> Mail:
    """The mail of rank 0, on every rank; collective. Raises TransportError where a rank has died."""
    if world.group is None:
        return mail
    packed = pack(mail) if world.rank == 0 and mail else b""
    length = torch.tensor([len(packed)], dtype=torch.int64, device=device)
    world.group.broadcast(length)
    size = int(world.group.to_host(length)) if world.rank else len(packed)
    if not size:
        return Mail()
    data = torch.frombuffer(bytearray(packed or bytes(size)), dtype=torch.uint8).to(device)
    world.group.broadcast(data)
    return mail if world.rank == 0 else unpack(world.group.to_host(data).numpy().tobytes())


def pack(mail: Mail) -> bytes:
    """Mail as JSON."""
    new = [(key, _written(request)) for key, request in mail.new]
    return json.dumps({"new": new, "dropped": mail.dropped, "end": mail.end}).encode()


def unpack(data: bytes) -> Mail:
    """The inverse of `pack`."""
    read = json.loads(data)
    return Mail(tuple((key, _request(values)) for key, values in read["new"]), tuple(read["dropped"]), read["end"])


def _written(request: Request) -> dict[str, Any]:
    """A request's fields as JSON has them."""
    values: dict[str, Any] = {each.name: getattr(request, each.name) for each in fields(Request)}
    values["sampling"] = {each.name: getattr(request.sampling, each.name) for each in fields(Sampling)}
    values["ends"] = sorted(request.ends)
    values["places"] = _written_places(request.places)
    return values


def _written_places(places: TextPlaces) -> Any:
    if places == LEFT_TO_RIGHT:
        return None
    if not isinstance(places, BlankPlaces):
        raise TypeError(f"positions of the kind {type(places).__name__} cannot be sent to other ranks")
    return [places.prefix, [[each.start, each.blank, each.counts_on] for each in places.segments]]


def _request(values: dict[str, Any]) -> Request:
    places, sampling = values.pop("places"), values.pop("sampling")
    sampling["logit_bias"] = tuple((token, bias) for token, bias in sampling["logit_bias"])
    sampling["never"] = tuple(sampling["never"])
    for name in ("tokens", "stops"):
        values[name] = tuple(values[name])
    values["ends"] = frozenset(values["ends"])
    blanks = LEFT_TO_RIGHT if places is None else BlankPlaces(places[0], tuple(Segment(*each) for each in places[1]))
    return Request(**values, sampling=Sampling(**sampling), places=blanks)
