"""Decides which checkpoints of a directory are a run's own: the same command goes on from them, whatever checkpoint.resume says.

Each checkpoint keeps what its run began from, which stays the same as the run goes on:

    checkpoint.resume    a checkpoint in checkpoint.dir is the run's own where ...                        else the run begins ...
    auto                 always                                                                           anew
    PATH                 its run began from the same checkpoint (or directory)                            from PATH
    never                its run began with `never` and this very config, and has not finished (or is     anew
                         this very job, restarted by its launcher), and no newer checkpoint is another's

So PATH may be one of the directory's own earlier checkpoints (a rewind); `never` begins anew beside the checkpoints of an older run;
and a job that is stopped, requeued or restarted makes progress under both. Checkpoints of other runs are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from megatrain.checkpoint.manifest import LARGEST_MANIFEST, MANIFEST, Manifest, read_manifest
from megatrain.checkpoint.together import CheckpointError, DamagedCheckpointError
from megatrain.config.keys import show
from megatrain.config.schema import Config
from megatrain.huggingface.model_files import is_hf
from megatrain.resuming.changed import changes
from megatrain.runtime.launch import Launch
from megatrain.untrusted import read_plain


def beginning_of(config: Config, launch: Launch) -> dict[str, str]:
    """The beginning of a run without checkpoints of its own: `auto`, `never`, a checkpoint or weights; plain JSON."""
    resume = config.checkpoint.resume
    if resume in ("auto", "never"):
        return {"from": resume, "job": f"{launch.launcher} {launch.job}"}
    path = Path(resume)
    manifest = path / MANIFEST
    try:
        digest = xxhash.xxh3_128_hexdigest(read_plain(manifest, LARGEST_MANIFEST)) if manifest.is_file() else ""
    except ValueError as error:
        raise DamagedCheckpointError(f"{manifest} cannot be used: {error}") from error
    return {"from": "weights" if only_weights(config) else "checkpoint", "path": str(path.resolve()), "digest": digest}


def only_weights(config: Config) -> bool:
    """Whether a new run takes only weights from checkpoint.resume."""
    return config.checkpoint.weights_only or is_hf(Path(config.checkpoint.resume))


@dataclass
class OwnCheckpoints:
    """Tells a run's own checkpoints from others; call it newest first. Remembers why others are not the run's own."""

    config: Config
    launch: Launch
    beginning: Mapping[str, str]
    """The beginning of a run of this config (`beginning_of`)."""
    others: list[str] = field(default_factory=list)
    """Checkpoints of other runs, newest first, each with the reason why it is not this run's."""
    _rest_is_others: bool = field(default=False, init=False)
    """Whether all remaining, older checkpoints are known to be of other runs."""

    def __call__(self, path: Path, manifest: Manifest | None) -> bool:
        """Whether a checkpoint of checkpoint.dir is the run's own; `manifest` is None if it cannot be read."""
        if self.beginning["from"] == "auto":
            return True
        why = "its manifest cannot be read" if manifest is None else next(self._reasons(manifest), "")
        if why:
            self.others.append(f"{path.name} is not this run's: {why}")
            # Older checkpoints are of that other run as well, or of a run before it.
            self._rest_is_others = self._rest_is_others or (manifest is not None and self.beginning["from"] == "never")
        return not why

    def _reasons(self, manifest: Manifest) -> Iterator[str]:
        """Reasons why a checkpoint is not the run's own."""
        if self._rest_is_others:
            yield "a newer one is not"
        was = manifest.progress.get("began")
        if was is None:  # an earlier release, which with weights_only went on from any checkpoint
            if self.beginning["from"] != "weights":
                yield "it was saved by an earlier release, which did not say where its run began"
        elif self.beginning["from"] == "never" == was["from"]:
            if manifest.progress.get("finished") and not self._restarted(was):
                yield "its run has finished"
            yield from (f"its run had {key}={show(before)}" for key, before, _ in changes(manifest, self.config))
        elif not self._same_path(was):
            yield f"its run began {beginning_text(was)}"

    def _same_path(self, was: Mapping[str, str]) -> bool:
        """Whether a run began from checkpoint.resume: compares the manifest's hash if that checkpoint still exists, else the path."""
        now = self.beginning
        if "path" not in was or "path" not in now:
            return False
        key = "digest" if now["digest"] and not self._replaced() else "path"
        gone = not Path(now["path"]).exists()
        return was["path"] == now["path"] if gone else (was["from"], was[key]) == (now["from"], now[key])

    def _replaced(self) -> bool:
        """Whether the checkpoint at checkpoint.resume was since replaced, by the same step of the very run that began from its weights."""
        path = Path(self.beginning["path"])
        if path.parent != Path(self.config.checkpoint_dir).resolve():
            return False
        with suppress(CheckpointError, OSError):
            was = read_manifest(path).progress.get("began") or {}
            return all(was.get(key) == self.beginning[key] for key in ("from", "path"))
        return False

    def _restarted(self, was: Mapping[str, str]) -> bool:
        """Whether the checkpoint is of this very job, which its launcher has started again."""
        return self.launch.restart_count > 0 and self.launch.job not in ("", "none") and was["job"] == self.beginning["job"]


def beginning_text(beginning: Mapping[str, str]) -> str:
    """A beginning as text for messages: `from PATH`, `anew`."""
    if beginning["from"] in ("checkpoint", "weights"):
        return f"from {'the weights of ' if beginning['from'] == 'weights' else ''}{beginning['path']}"
    return "anew" if beginning["from"] == "auto" else "anew, with checkpoint.resume=never"
