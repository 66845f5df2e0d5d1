"""Steps of a script, for a person to watch: commands that are shown before they run, results that are made once.

Beside `quickstart.py`, and imported by it alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

EX_TEMPFAIL = 75
"""Exit code of a training run that was told to stop and has saved."""
EX_PROTOCOL = 76
"""Exit code of a training run that went wrong and should not be started again as it is."""
CHECK_SECONDS = 5.0
"""How often a running command is asked whether it should stop."""


class Failed(Exception):
    """A step did not work; the message says which, and what to do."""


def key(inputs: Any) -> str:
    """Eight hex digits that name the inputs."""
    return hashlib.sha256(json.dumps(inputs, default=str).encode()).hexdigest()[:8]


def once(stamp: Path, what: str, make: Callable[[], None]) -> None:
    """Run `make` unless its stamp says that it ran to the end before."""
    if stamp.exists():
        return
    step(what)
    make()
    publish(stamp, "")


def publish(path: Path, text: str) -> None:
    """Write a file so that it is either there whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


def verb(*words: object) -> None:
    """Run `megatrain WORDS...`."""
    call(sys.executable, "-m", "megatrain", *words)


def call(*words: object, stop: Callable[[], bool] = lambda: False) -> bool:
    """Run a command, shown first, to its end (True), or until `stop()`, asked now and then, has it save and end (False).

    Raises Failed when the command fails; an interrupt lets it save and end.
    """
    command = [str(word) for word in words]
    shown = shlex.join(command).replace(shlex.quote(sys.executable), "python").replace(f"{Path.cwd()}/", "")
    print(f"  $ {shown}", flush=True)
    # In a session of its own, so that Ctrl-C reaches this process alone, which then has the child save before it ends.
    child = subprocess.Popen(command, env={**os.environ, "PYTHON": sys.executable}, start_new_session=True)
    stopped = False
    try:
        while (code := wait(child, CHECK_SECONDS)) is None:
            if not stopped and stop():
                child.send_signal(signal.SIGTERM)  # local.sh passes it on; training saves and ends
                stopped = True
    except KeyboardInterrupt:
        print("\nstopping ...", file=sys.stderr, flush=True)
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    if code == EX_TEMPFAIL and not stopped:
        raise KeyboardInterrupt
    if code == EX_PROTOCOL:
        raise Failed("training went wrong, and does not go on by itself; what it said stands above, and so does where to look.")
    if code not in (0, EX_TEMPFAIL):
        raise Failed(
            f"the last command ended with exit code {code}; what it said stands above. The same command goes on from there."
        )
    return code == 0


def wait(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code, or None if the process still runs after so many seconds."""
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP (the terminal was closed) are taken as Ctrl-C is."""
    raise KeyboardInterrupt


def step(what: str) -> None:
    """A heading."""
    print(f"\n=== {what}", flush=True)


def say(what: str) -> None:
    """A line below a heading."""
    print(f"  {what}", flush=True)
