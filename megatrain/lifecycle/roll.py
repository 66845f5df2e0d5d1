"""The roll of a run: who each rank is, and a key that only these ranks have.

It is called once, when all have met, through the ranks' own connections: no later word of the store's can put another process in a rank's
place, and a message of an earlier run, or of before the roll, opens under no key of this one.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatrain.lifecycle.blame import Identity
from megatrain.transport.consensus import gather_texts
from megatrain.transport.group import Group


@dataclass(frozen=True)
class Roll:
    """The identity of each rank's process, and the key of this start."""

    identities: Mapping[int, Identity]
    key: bytes

    def has(self, identity: Identity) -> bool:
        """Whether this is the process that answered as its rank."""
        return self.identities.get(identity.rank) == identity


def call_roll(rank: int, group: Group, device: torch.device, secret: bytes) -> Roll:
    """The roll of all ranks of the group (collective); secret: a key that strangers do not have, of which the new one is made."""
    texts = gather_texts(json.dumps([Identity.own(rank).text(), secrets.token_hex(32)]), group, device)
    identities = [Identity.parse(json.loads(text)[0]) for text in texts]
    key = hashlib.sha256("\0".join([secret.decode(), *texts]).encode()).hexdigest()
    return Roll({identity.rank: identity for identity in identities}, key.encode())
