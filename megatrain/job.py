"""A run in a process: `Run` (model, optimizer, data) with the session, checkpoint directory and history of the process."""

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
    """The resolved config as YAML, with the origin of each value."""
    config_file: Path | None = None
    """The file that the config was read from; None if it was made in Python."""
    claim: Claim = field(default_factory=lambda: Claim(None))
    """The run's claim of its checkpoint directory."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Identity of its texts and tokenizer: sizes and hashes."""
    began: dict[str, str] = field(default_factory=dict)
    """The run's beginning: anew, a checkpoint or weights (resuming/beginning.py); each checkpoint keeps it."""
    resumed_from: Path | None = None
    told: list[str] = field(default_factory=list)
    """Messages on which checkpoint was taken or passed over, and why, where checkpoint.resume alone does not tell."""
    damaged: list[str] = field(default_factory=list)
    """Damaged checkpoints that were passed over, each with its fault."""
    changes: list[str] = field(default_factory=list)
    """Messages on keys that differ from the checkpoint's config, and the effect."""

    def close(self) -> None:
        """Release the checkpoint directory, the data loader and the session."""
        self.claim.release()
        self.loader.close()
        self.session.close()
