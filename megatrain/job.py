"""A run in a process: what the training program holds besides the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatrain.checkpoint.directory import Claim
from megatrain.runtime.distributed import Session
from megatrain.training import Run


@dataclass(kw_only=True)
class Job(Run):
    """A run, and the process that it lives in."""

    session: Session
    config_text: str
    """The resolved config with the origin of each value."""
    config_file: Path | None = None
    """Where the config was read from, if it was a file."""
    claim: Claim = field(default_factory=lambda: Claim(None))
    """Of the directory of its checkpoints."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What its texts and its tokenizer are."""
    began: dict[str, str] = field(default_factory=dict)
    """What it began from, before all its checkpoints."""
    resumed_from: Path | None = None
    told: list[str] = field(default_factory=list)
    """Which checkpoint was taken or passed over, and why, where checkpoint.resume alone does not say."""
    damaged: list[str] = field(default_factory=list)
    """Checkpoints that were passed over, with what is wrong with them."""
    changes: list[str] = field(default_factory=list)
    """What in the config is not as it was when the checkpoint was saved, and what that does."""

    def close(self) -> None:
        """Give back what the job holds of the machine."""
        self.claim.release()
        self.loader.close()
        self.session.close()
