"""What the workers of a launcher write: a file for each rank's stdout and stderr, and the exit code that each means.

Beside `agent.py`, and imported by it and `agent_nodes.py`.
"""

from __future__ import annotations

import atexit
import shutil
import signal
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs


class RankLogs(LogsSpecs):
    """Each rank's stdout and stderr in a file of its own, and on the console; on a terminal, rank 0's on the terminal alone.

    What an earlier start of the same rank wrote is kept, with a number.
    """

    def __init__(self, folder: Path, marker: Path, terminal: bool) -> None:
        super().__init__(str(folder))
        self.folder, self.marker, self.terminal = folder, marker, terminal
        self.told, self.insisted = int(signal.SIGTERM), False
        self.where = "this machine"
        self._replies: list[Path] = []
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
        self.folder.mkdir(parents=True, exist_ok=True)
        replies = tempfile.mkdtemp(prefix="megatrain-")
        atexit.register(shutil.rmtree, replies, ignore_errors=True)
        places, self._replies = LogsDest(), []
        for local, env in envs.items():
            rank = int(env["RANK"])
            places.error_files[local] = env["TORCHELASTIC_ERROR_FILE"] = f"{replies}/{local}.json"
            self._replies.append(Path(replies, f"{local}.code"))
            env["MEGATRAIN_REPLY"] = str(self._replies[-1])
            places.stdouts[local] = places.stderrs[local] = ""  # as this process's own
            if rank == 0 and self.terminal:
                continue
            places.stdouts[local] = places.tee_stdouts[local] = str(kept(self.folder / f"rank_{rank:05d}.out"))
            places.stderrs[local] = places.tee_stderrs[local] = str(kept(self.folder / f"rank_{rank:05d}.err"))
        return places

    def replies(self) -> set[str]:
        """The exit codes that the workers meant; BEGUN of one that failed or was killed; empty of one that hears nothing yet."""
        return {read(path) for path in self._replies}


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
