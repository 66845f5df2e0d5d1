"""Keeps the inputs of a run's start in RUN/launches/TIME/: launch script, config as given, command, environment, packages.

Values of variables whose names look like secrets are left out, and so are passwords in addresses.
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from megatrain.files import doing

FOLDER = "launches"
SCRIPT_VARIABLE = "MEGATRAIN_SCRIPT"
"""The launch scripts set it to their own path."""
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|PWD_|CREDENTIAL|AUTH|COOKIE|PRIVATE|CERT|DSN|SIGNATURE|WEBHOOK", re.IGNORECASE)
_PASSWORD = re.compile(r"://[^/@\s]+@")
HIDDEN = "(not kept)"


def keep(run: Path, config: Path | None, env: Mapping[str, str], command: list[str]) -> Path:
    """Write the files into a new folder of `run` and return that. Raises OSError."""
    folder = _new_folder(run / FOLDER)
    with doing("writing", folder):
        script = env.get(SCRIPT_VARIABLE)
        for source in (config, Path(script) if script else None):
            if source is not None and source.is_file():
                shutil.copyfile(source, folder / source.name)
        (folder / "command.txt").write_text(f"{shlex.join(command)}\n")
        environment = folder / "environment.txt"
        environment.touch(mode=0o600)
        environment.write_text("".join(f"{name}={_shown(name, value)}\n" for name, value in sorted(env.items())))
        (folder / "packages.txt").write_text("\n".join([f"python {sys.version}", *_packages(), *_commit()]) + "\n")
    return folder


def _new_folder(parent: Path) -> Path:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%S")
    for number in range(1000):
        folder = parent / (now if number == 0 else f"{now}.{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(f"{parent} holds a thousand starts of the second {now}")


def _shown(name: str, value: str) -> str:
    """A value of the environment on one line, without possible secrets."""
    return HIDDEN if _SECRET.search(name) else _PASSWORD.sub(f"://{HIDDEN}@", value).replace("\n", "\\n")


def _packages() -> list[str]:
    """Name and version of every installed package."""
    named = {str(one.metadata["Name"]): one.version for one in importlib.metadata.distributions() if one.metadata["Name"]}
    return [f"{name}=={version}" for name, version in sorted(named.items(), key=lambda item: item[0].lower())]


def _commit() -> list[str]:
    """The git commit of the checkout that this file is in; empty if it is in none."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [f"commit {done.stdout.strip()}"] if done.returncode == 0 else []
