"""What the workers of a launcher write: a file for each rank's stdout and stderr, the exit code that each means, and its error.

An error that ranks share is told once, not by each of them.

Beside `agent.py`, and imported by it and `agent_nodes.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

from megatrain.lifecycle.stop import errors_file

RANK_0_SECONDS = 2.0
"""Where the nodes of a job write to one console: how long the error of rank 0 is waited for, to see whether it is told already."""


class RankLogs(LogsSpecs):
    """Each rank's stdout and stderr in a file of its own, and on the console; on a terminal, rank 0's on the terminal alone.

    What an earlier start of the same rank wrote is kept, with a number.
    """

    def __init__(self, folder: Path, marker: Path, terminal: bool) -> None:
        super().__init__(str(folder))
        self.folder, self.marker, self.terminal = folder, marker, terminal
        self.told, self.insisted = int(signal.SIGTERM), False
        self.where = "this machine"
        self._replies: dict[int, Path] = {}
        self.grows = False
        """Nodes wait to join: the workers are stopped, which they take for a request to stop, only to be started again with them."""

    @property
    def root_log_dir(self) -> str:
        """Where the files are."""
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The files of the workers that are about to start."""
        if self.grows:
            self.marker.unlink(missing_ok=True)
            self.grows = False
        self.tell_errors()  # of an earlier start
        self.folder.mkdir(parents=True, exist_ok=True)
        replies = tempfile.mkdtemp(prefix="megatrain-")
        atexit.register(shutil.rmtree, replies, ignore_errors=True)
        places, self._replies = LogsDest(), {}
        for local, env in envs.items():
            rank = int(env["RANK"])
            places.error_files[local] = env["TORCHELASTIC_ERROR_FILE"] = f"{replies}/{local}.json"
            self._replies[rank] = Path(replies, f"{local}.code")
            env["MEGATRAIN_REPLY"] = str(self._replies[rank])
            places.stdouts[local] = places.stderrs[local] = ""  # as this process's own
            if rank == 0 and self.terminal:
                continue
            places.stdouts[local] = places.tee_stdouts[local] = str(kept(self.folder / f"rank_{rank:05d}.out"))
            places.stderrs[local] = places.tee_stderrs[local] = str(kept(self.folder / f"rank_{rank:05d}.err"))
        return places

    def replies(self) -> set[str]:
        """The exit codes that the workers meant; BEGUN of one that failed or was killed; empty of one that hears nothing yet."""
        return {read(path) for path in self._replies.values()}

    def tell_errors(self) -> set[int]:
        """Print each error that workers have left and not been told of, once; put it in the file of each rank that had it.

        Returns these ranks.
        """
        errors = {rank: text for rank, path in self._replies.items() if (text := read(errors_file(path)))}
        for rank, text in errors.items():
            errors_file(self._replies[rank]).unlink()
            with contextlib.suppress(OSError), (self.folder / f"rank_{rank:05d}.err").open("a") as file:
                file.write(text)
        for text in distinct(errors):
            if not self._told_by_rank_0(text):
                print(text, end="", file=sys.stderr, flush=True)
        return set(errors)

    def _told_by_rank_0(self, text: str) -> bool:
        """Whether the first node has told this, in a job whose nodes write to one console; False where their disks are not shared."""
        if 0 in self._replies or "SLURM_STEP_ID" not in os.environ:
            return False
        end = time.monotonic() + RANK_0_SECONDS
        while not (said := text in read(self.folder / "rank_00000.err")) and time.monotonic() < end:
            time.sleep(0.1)
        return said


def distinct(errors: Mapping[int, str]) -> list[str]:
    """Errors of ranks, each once, in the order of ranks; not those that another one quotes: where a rank fails, the others say so."""
    texts = list(dict.fromkeys(errors[rank] for rank in sorted(errors)))
    cores = {text: text.removeprefix("megatrain: error: ").strip() for text in texts}
    return [text for text in texts if not any(cores[text] in other for other in texts if other != text)]


def kept(path: Path) -> Path:
    """The path, free: a file that is there already gets a number; an empty one is of no use."""
    if path.exists() and path.stat().st_size:
        number = 1
        while (older := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        path.rename(older)
    return path


def read(path: Path) -> str:
    """A file's text, empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
