"""Keeps the inputs of a run's start in RUN/launches/TIME/: launch script, config as given, command, environment, packages.

Of the environment only what matters for a run is kept (KEPT): a secret may have any name. What looks like a secret in a
value, in the command or in the script is masked (secrets.py).
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
from megatrain.records.secrets import SECRET, masked

FOLDER = "launches"
SCRIPT_VARIABLE = "MEGATRAIN_SCRIPT"
"""The launch scripts set it to their own path."""
KEPT = re.compile(
    r"""(?:MEGATRAIN|TORCH|TORCHELASTIC|TORCHINDUCTOR|PYTORCH|CUDA|CUBLAS|CUDNN|NVIDIA|NCCL|GLOO|UCX|FI|HIP|HSA|ROCR|ROCM|MIOPEN|RCCL
    |TRITON|NUMBA|OMP|GOMP|KMP|MKL|OPENBLAS|MALLOC|JEMALLOC|SLURM|SLURMD|LC)_\w+|PYTHON\w*|PATH|LD_LIBRARY_PATH|LD_PRELOAD|GLIBC_TUNABLES
    |HOME|USER|HOSTNAME|SHELL|LANG|LANGUAGE|TZ|TERM|TMPDIR|VIRTUAL_ENV|CONDA_PREFIX|CONDA_DEFAULT_ENV|LOADEDMODULES
    |(?:LOCAL_|GROUP_|ROLE_)?(?:RANK|WORLD_SIZE)|MASTER_ADDR|MASTER_PORT|NNODES|NPROC_PER_NODE|RUN_ID|MAX_RESTARTS|JOIN_TIMEOUT
    |RAYON_NUM_THREADS|XDG_CACHE_HOME|HF_HOME|HF_HUB_OFFLINE""",
    re.VERBOSE,
)
"""Names of the variables that are kept: they change how a run computes, communicates or is placed."""
_SPOKEN = re.compile(r"EXPORT_ENV|COMMENT|EXTRA")
"""Names of variables that hold other variables, or what a user has said; they are left out, as are names of secrets."""
_FIELD = re.compile(r"^(Name|Version): *(.*?) *$", re.MULTILINE)


def keep(run: Path, config: Path | None, env: Mapping[str, str], command: list[str]) -> Path:
    """Write the files into a new folder of `run` and return that. Raises OSError."""
    folder = _new_folder(run / FOLDER)
    with doing("writing", folder):
        script = env.get(SCRIPT_VARIABLE)
        if config is not None and config.is_file():
            shutil.copyfile(config, folder / config.name)
        if script and Path(script).is_file():
            (folder / Path(script).name).write_text(masked(Path(script).read_text(errors="replace")))
        (folder / "command.txt").write_text(f"{masked(shlex.join(command))}\n")
        environment = folder / "environment.txt"
        environment.touch(mode=0o600)
        environment.write_text(_listed(env))
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


def _listed(env: Mapping[str, str]) -> str:
    """The variables of the environment that matter for a run, a line each, and how many others there were."""
    names = sorted(name for name in env if KEPT.fullmatch(name) and not (SECRET.search(name) or _SPOKEN.search(name)))
    lines = [f"{name}={masked(env[name])}".replace("\n", "\\n") for name in names]
    return "\n".join([*lines, f"# {len(env) - len(names)} other variables are not kept"]) + "\n"


def _packages() -> list[str]:
    """Name and version of every installed package; read here, since importlib.metadata parses each one's whole description twice."""
    named: dict[str, str] = {}
    for one in importlib.metadata.distributions():
        head = (one.read_text("METADATA") or one.read_text("PKG-INFO") or "").partition("\n\n")[0]
        fields = dict(_FIELD.findall(head))
        if "Name" in fields:
            named[fields["Name"]] = fields.get("Version", "")
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
