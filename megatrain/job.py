"""A run in a process: `Run` (model, optimizer, data) with the session, checkpoint directory and history of the process."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatrain.checkpoint.claim import Claim
from megatrain.data.blended import BlendedSamples
from megatrain.data.left_out import LeftOut
from megatrain.lifecycle.guard import Guard
from megatrain.lifecycle.spikes import Spikes
from megatrain.runtime.distributed import Session
from megatrain.training import Run


@dataclass(kw_only=True)
class Job(Run):
    """A run, and the process that it lives in."""

    session: Session
    guard: Guard
    left_out: LeftOut[BlendedSamples]
    """The loader's samples, without those of spikes that the run went back from."""
    config_text: str
    """The resolved config as YAML, with the origin of each value."""
    config_file: Path | None = None
    """The file that the config was read from; None if it was made in Python."""
    claim: Claim = field(default_factory=Claim)
    """The run's claim of its checkpoint directory."""
    log_claim: Claim = field(default_factory=Claim)
    """The run's claim of log.dir."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Sizes and hashes of its texts and tokenizer (data/identity.py)."""
    program: dict[str, str] = field(default_factory=dict)
    """Versions and a hash of the code that it runs with (runtime/installed.py); each checkpoint keeps it."""
    beginning: dict[str, str] = field(default_factory=dict)
    """The run's beginning: anew, a checkpoint or weights (resuming/beginning.py); each checkpoint keeps it."""
    resumed_from: Path | None = None
    goes_on: bool = False
    """Whether that is a checkpoint of its own, and not where it began."""
    notes: list[str] = field(default_factory=list)
    """For the log: which checkpoint the run starts from, and why, unless checkpoint.resume=auto says it all."""
    damaged: list[str] = field(default_factory=list)
    """Damaged checkpoints that were passed over, each with its fault."""
    changes: list[str] = field(default_factory=list)
    """For the log: the keys that differ from the checkpoint's config, each with its effect."""

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = "correct" in self.objective.statistics  # predicts tokens, which are all alike at first
        self.spikes = Spikes(self.config.train, math.log(self.chunks[0].build.vocab_size) if tokens else math.nan)
        self.caution = self.spikes.caution

    def close(self) -> None:
        """Release the run's directories, the data loader, the session and its guard. Waits for the other ranks."""
        with self.guard.section("end"):
            self.give_up()
            self.loader.close()
            try:
                self.guard.leave(sys.exc_info()[1])  # in a `finally`, the error that is on its way
            finally:
                self.session.close()
        self.guard.close()

    def give_up(self) -> None:
        """Release the run's directories."""
        self.claim.release()
        self.log_claim.release()
