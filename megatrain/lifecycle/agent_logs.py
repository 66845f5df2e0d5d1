"""Output of the workers of a launcher: files for each rank's stdout and stderr, its intended exit code, and its error.

An error that several ranks report is printed once.

`agent.py` and `agent_nodes.py` import it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

from megatrain.files import open_own
from megatrain.lifecycle.stop import errors_file
from megatrain.stderr import say

RANK_0_SECONDS = 2.0
"""In a job whose nodes share one console: how long to wait for rank 0's error, to see whether it has printed the same."""


class RankLogs(LogsSpecs):
    """Each rank's stdout and stderr go to files of its own and to the console; on a terminal, rank 0's to the terminal alone.

    A file from an earlier start of the same rank is kept, with a number added to its name.
    """

    def __init__(self, folder: Path, marker: Path, terminal: bool) -> None:
        super().__init__(str(folder))
        self.folder, self.marker, self.terminal = folder, marker, terminal
        self.stop_signal, self.second_interrupt = int(signal.SIGTERM), False
        self.where = "this machine"
        self._replies: dict[int, Path] = {}
        self.grows = False
        """Whether nodes wait to join. The workers are then stopped, as by a stop request, only to be started again with the new nodes."""

    @property
    def root_log_dir(self) -> str:
        """The directory of the files."""
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The output files and environment of the workers that torchrun is about to start (torchrun's interface)."""
        if self.grows:
            self.marker.unlink(missing_ok=True)
            self.grows = False
        self.tell_errors()  # errors of an earlier start
        self.folder.mkdir(parents=True, exist_ok=True)
        replies = tempfile.mkdtemp(prefix="megatrain-")
        atexit.register(shutil.rmtree, replies, ignore_errors=True)
        places, self._replies = LogsDest(), {}
        for local, env in envs.items():
            rank = int(env["RANK"])
            places.error_files[local] = env["TORCHELASTIC_ERROR_FILE"] = f"{replies}/{local}.json"
            self._replies[rank] = Path(replies, f"{local}.code")
            env["MEGATRAIN_REPLY"] = str(self._replies[rank])
            places.stdouts[local] = places.stderrs[local] = ""  # inherit this process's stdout and stderr
            if rank == 0 and self.terminal:
                continue
            places.stdouts[local] = places.tee_stdouts[local] = str(kept(self.folder / f"rank_{rank:05d}.out"))
            places.stderrs[local] = places.tee_stderrs[local] = str(kept(self.folder / f"rank_{rank:05d}.err"))
        return places

    def replies(self) -> set[str]:
        """Replies of the workers: an exit code; LISTENING if it failed or was killed; empty if it does not listen for signals yet."""
        return {read(path) for path in self._replies.values()}

    def tell_errors(self) -> set[int]:
        """Print each error that workers have left in files, once, and append it to the log of each rank that had it.

        Returns these ranks.
        """
        errors = {rank: text for rank, path in self._replies.items() if (text := read(errors_file(path)))}
        for rank, text in errors.items():
            errors_file(self._replies[rank]).unlink()
            with contextlib.suppress(OSError), os.fdopen(open_own(self.folder / f"rank_{rank:05d}.err"), "a") as file:
                file.write(text)
        for text in distinct(errors):
            if not self._printed_by_rank_0(text):
                say(text.removesuffix("\n"))
        return set(errors)

    def _printed_by_rank_0(self, text: str) -> bool:
        """Whether rank 0's node has printed this error, in a job whose nodes share one console; False if rank 0's log is not visible
        here.
        """
        if 0 in self._replies or "SLURM_STEP_ID" not in os.environ:
            return False
        end = time.monotonic() + RANK_0_SECONDS
        while not (said := text in read(self.folder / "rank_00000.err")) and time.monotonic() < end:
            time.sleep(0.1)
        return said


def distinct(errors: Mapping[int, str]) -> list[str]:
    """Different errors of ranks, in rank order, without those quoted inside another: when a rank fails, the others quote its error."""
    texts = list(dict.fromkeys(errors[rank] for rank in sorted(errors)))
    cores = {text: text.removeprefix("megatrain: error: ").strip() for text in texts}
    return [text for text in texts if not any(cores[text] in other for other in texts if other != text)]


def kept(path: Path) -> Path:
    """`path`, after a non-empty file there, or a link or fifo, was renamed by adding a number."""
    found = path.lstat() if os.path.lexists(path) else None
    if found is not None and (found.st_size or not stat.S_ISREG(found.st_mode)):
        number = 1
        while os.path.lexists(older := path.with_name(f"{path.name}.{number}")):
            number += 1
        path.rename(older)
    return path


def read(path: Path) -> str:
    """A file's text; empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
