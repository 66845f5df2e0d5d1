"""Small agreements between ranks: the first rank that failed, and short texts. Without a group (one rank) nothing is sent."""

from __future__ import annotations

import torch

from megatrain.transport.group import Group


def lowest(mine: bool, group: Group | None, device: torch.device) -> int | None:
    """The lowest place in the group for which `mine` is true, the same on every rank; None if none. One collective of 8 bytes."""
    if group is None:
        return 0 if mine else None
    first = torch.tensor([group.rank if mine else group.size], dtype=torch.int64, device=device)
    group.all_reduce(first, "min")
    place = int(group.to_host(first))
    return None if place == group.size else place


def broadcast_text(text: str, group: Group | None, device: torch.device, source: int = 0) -> str:
    """The text of the rank at place `source`, on every rank."""
    if group is None:
        return text
    data = _encode(text, device)
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    group.broadcast(length, source)
    if group.rank != source:
        data = torch.empty(int(group.to_host(length)), dtype=torch.uint8, device=device)
    group.broadcast(data, source)
    return _decode(group.to_host(data))


def gather_texts(text: str, group: Group | None, device: torch.device) -> list[str]:
    """Every rank's text, in order of place in the group, on every rank."""
    if group is None:
        return [text]
    data = _encode(text, device)
    lengths = torch.empty(group.size, dtype=torch.int64, device=device)
    group.all_gather(lengths, torch.tensor([len(data)], dtype=torch.int64, device=device))
    lengths = group.to_host(lengths)
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    gathered = torch.empty(group.size * longest, dtype=torch.uint8, device=device)
    group.all_gather(gathered, padded)
    rows = group.to_host(gathered).view(group.size, longest)  # one copy, not one for each rank
    return [_decode(rows[i, :n]) for i, n in enumerate(lengths.tolist())]


def _encode(text: str, device: torch.device) -> torch.Tensor:
    """UTF-8 bytes as uint8 [n], and a last zero byte, since transports may refuse empty tensors."""
    return torch.frombuffer(bytearray(text.encode(errors="replace") + b"\0"), dtype=torch.uint8).to(device)


def _decode(data: torch.Tensor) -> str:
    return data.numpy().tobytes()[:-1].decode()
