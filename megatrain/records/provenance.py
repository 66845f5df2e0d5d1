"""Keeps the inputs of a run's start in RUN/launches/TIME/: launch script, config as given, command, environment, packages.

Of the environment only what matters for a run is kept (KEPT): a secret may have any name. What looks like a secret in a
value, in the command or in the script is masked.
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
KEPT = re.compile(
    r"""(?:MEGATRAIN|TORCH|TORCHELASTIC|TORCHINDUCTOR|PYTORCH|CUDA|CUBLAS|CUDNN|NVIDIA|NCCL|GLOO|UCX|FI|HIP|HSA|ROCR|ROCM|MIOPEN|RCCL
    |TRITON|NUMBA|OMP|GOMP|KMP|MKL|OPENBLAS|MALLOC|JEMALLOC|SLURM|SLURMD|LC)_\w+|PYTHON\w*|PATH|LD_LIBRARY_PATH|LD_PRELOAD|GLIBC_TUNABLES
    |HOME|USER|HOSTNAME|SHELL|LANG|LANGUAGE|TZ|TERM|TMPDIR|VIRTUAL_ENV|CONDA_PREFIX|CONDA_DEFAULT_ENV|LOADEDMODULES
    |(?:LOCAL_|GROUP_|ROLE_)?(?:RANK|WORLD_SIZE)|MASTER_ADDR|MASTER_PORT|NNODES|NPROC_PER_NODE|RUN_ID|MAX_RESTARTS|JOIN_TIMEOUT
    |RAYON_NUM_THREADS|XDG_CACHE_HOME|HF_HOME|HF_HUB_OFFLINE""",
    re.VERBOSE,
)
"""Names of the variables that are kept: they change how a run computes, communicates or is placed."""
_SECRET = re.compile(
    r"KEY|TOKEN|SECRET|PASS|PWD|CREDENTIAL|AUTH|COOKIE|PRIVATE|CERT|DSN|SIGNATURE|WEBHOOK|JWT|BEARER|_PAT\b", re.IGNORECASE
)
"""Names of variables that are left out all the same."""
HIDDEN = "(not kept)"
_IN_ADDRESS = re.compile(r"(://)(?:[^\s/@]*:\S*|[^\s/@]+)(?=@)")
_ASSIGNED = re.compile(
    r"""((?:passw(?:or)?d|passphrase|secret|(?<![A-Za-z])(?:token|pass|pwd|auth|bearer|jwt|pat|sig)|api_?key|access_?key(?:_id)?|account_?key
    |private_?key|credentials?|signature|webhook)["']?\s*[=:]\s*)(?:"[^"]*"|'[^']*'|(?:Bearer\s+|Basic\s+)?[^\s;&,"']+)""",
    re.IGNORECASE | re.VERBOSE,
)
_OPTION = re.compile(r"(--?[\w-]*(?:password|passwd|secret|token|api-?key)\s+)(?!-)\S+", re.IGNORECASE)
_BEARER = re.compile(r"(\b(?:Bearer|Basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_ISSUED = re.compile(r"\b()(?:gh[a-z]_|github_pat_|glpat-|hf_|sk-|xox[a-z]-|AKIA|ASIA|eyJ[\w-]+\.)[\w.-]{10,}")
"""Beginnings that services give to the secrets that they issue."""


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


def masked(text: str) -> str:
    """A text with passwords in addresses, values given to names such as `password`, and tokens of known services replaced by HIDDEN."""
    for pattern in (_IN_ADDRESS, _BEARER, _ASSIGNED, _OPTION, _ISSUED):
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return text


def _listed(env: Mapping[str, str]) -> str:
    """The variables of the environment that matter for a run, a line each, and how many others there were."""
    names = sorted(name for name in env if KEPT.fullmatch(name) and not _SECRET.search(name))
    lines = [f"{name}={masked(env[name])}".replace("\n", "\\n") for name in names]
    return "\n".join([*lines, f"# {len(env) - len(names)} other variables are not kept"]) + "\n"


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
