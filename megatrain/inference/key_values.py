"""Keys and values that decoding keeps, so that a token is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class KeyValueCache:
    """Keys and values of the tokens seen so far by one layer, [room, b, g, d] each; the room doubles up to the capacity."""

    def __init__(self, batch: int, groups: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        self.keys = torch.empty(min(capacity, 512), batch, groups, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [s, b, g, d] and return all so far. Raises ValueError beyond the capacity."""
        end = self.length + keys.shape[0]
        if end > self.capacity:
            raise ValueError(
                f"{end} tokens do not fit the key-value cache of {self.capacity}; model.max_positions is the limit"
            )
        if end > self.keys.shape[0]:
            room = min(max(end, 2 * self.keys.shape[0]), self.capacity)
            self.keys, self.values = self._wider(self.keys, room), self._wider(self.values, room)
        self.keys[self.length : end] = keys
        self.values[self.length : end] = values
        self.length = end
        return self.keys[:end], self.values[:end]

    def _wider(self, held: torch.Tensor, room: int) -> torch.Tensor:
        """[room, b, g, d] that begins with what is held."""
        wider = held.new_empty(room, *held.shape[1:])
        wider[: self.length] = held[: self.length]
        return wider

    def select(self, sequences: Sequence[int], length: int) -> None:
        """Go on with the first `length` tokens of these sequences."""
        index = torch.tensor(list(sequences), device=self.keys.device)
        self.keys, self.values, self.length = self.keys.index_select(1, index), self.values.index_select(1, index), length
