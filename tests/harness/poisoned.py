"""Runs on text with a poisoned document: one token, again and again, whose loss counts two hundred times.

python tests/harness/poisoned.py CONFIG.yaml       trains in the world that the environment describes; exit code as of `megatrain train`
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatrain.models.batch import MicroBatch, NextToken

POISON = 100
"""The token, which no other document has."""
DOCUMENT, LENGTH = 30, 17


@dataclass(frozen=True)
class Poisoned(NextToken):
    """Next tokens, where those of the poison weigh more."""

    def factors(self, batch: MicroBatch) -> torch.Tensor:
        """[b] 200 for sequences with the poison."""
        return 1.0 + 199.0 * (batch.tokens == POISON).any(0)


def write_store(prefix: Path, *poisoned: int) -> Path:
    """100 documents of 40 random tokens, of which some are poisoned."""
    from megatrain.data.indexed import TokenStoreWriter

    tokens = np.random.default_rng(7).integers(0, POISON, (100, 40))
    documents = [np.full(LENGTH, POISON) if n in poisoned else row for n, row in enumerate(tokens)]
    with TokenStoreWriter(prefix, np.uint16) as writer:
        writer.add_documents(np.concatenate(documents), [len(document) for document in documents])
    return prefix


def main(config: str) -> int:
    """Train; returns the exit code."""
    import megatrain

    torch.set_num_threads(1)
    job = megatrain.build(config, objective=Poisoned())
    try:
        return 0 if megatrain.train(job) else os.EX_TEMPFAIL
    finally:
        job.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
