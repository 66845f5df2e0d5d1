"""This process's rank in its job: the only file that reads RANK and similar variables. Imports no torch.

`Launch.from_environment` reads torchrun's variables, or else srun's. Without either it is a plain `python` run, a world of one rank. So
is a process in the script of a SLURM job itself, or in the shell of an allocation, that srun has not started.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from megatrain.files import OneLine
from megatrain.runtime.secret import VARIABLE, SecretError, shared_secret
from megatrain.runtime.slurm import address_of, expand_nodes, expand_tasks, port_of_job
from megatrain.runtime.variables import cut, number_in
from megatrain.transport.seal import derived

REPLY = "MEGATRAIN_REPLY"
"""Variable that the launch scripts set to the file for a worker's exit code."""
SPECIAL_STEPS = 0xFFFFFFF0
"""SLURM steps from this number on were not started by srun: the batch script, a shell (interactive), helpers (extern)."""
MOST_RANKS = 1 << 20
"""Above every job there is; a number beyond would be a list of so many ranks before it was an error."""
LOCAL_NAMES = ("localhost", "ip6-localhost", "::1")


class LaunchError(OneLine, RuntimeError):
    """The environment does not tell which rank this process is, or asks for something that this machine lacks."""


@dataclass(frozen=True)
class Launch:
    """This process's place in the job."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Ranks on this node."""
    node: int = 0
    host: str = "localhost"
    """This machine's host name."""
    restart_count: int = 0
    """How many times the launcher has restarted the job."""
    master_addr: str | None = None
    """Address where the ranks meet; None in a world of 1 without a launcher."""
    master_port: int | None = None
    launcher: Literal["none", "torchrun", "srun"] = "none"
    job: str = ""
    """The launcher's name for this job; it stays the same when torchrun restarts."""
    cores: int | None = None
    """Cores of this rank alone, if SLURM was told (--cpus-per-task)."""
    reply: str | None = None
    """File for the exit code of this process, which the launch scripts read since torchrun does not pass it on."""
    launcher_process: int | None = None
    """Process number of the launcher, if the launch scripts give it."""
    launcher_serves: bool = False
    """Whether the launcher (torchrun's agent), not rank 0, serves the store where the ranks meet."""
    tasks_asked: int = 1
    """Number of tasks that the SLURM job asks for, in a process that srun has not started (its world still is 1)."""
    secret: str = field(default="", repr=False)
    """The secret that the ranks share and no stranger knows; empty if they share none."""

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Launch:
        """Read the launcher's variables; torchrun's win over srun's. Raises LaunchError if they contradict each other."""
        if "RANK" in env or "WORLD_SIZE" in env:
            launch = _from_torchrun(env)
        elif _is_step(env):
            launch = _from_srun(env, _hostnames)
        else:
            return cls(host=socket.gethostname(), tasks_asked=_tasks_asked(env))
        launch.check()
        try:
            return replace(launch, secret=shared_secret(env, not launch.is_spread))
        except SecretError as error:
            raise LaunchError(str(error)) from error

    def require_ranks(self) -> None:
        """Raise LaunchError if the job asked for several tasks but this process, about to train, was not started by srun."""
        if self.tasks_asked > 1:
            raise LaunchError(
                f"this SLURM job asks for {self.tasks_asked} tasks, but this process was started without srun, so that it would train "
                "alone. Start every rank: `srun megatrain train ...`, or `sbatch launch/srun.sbatch CONFIG.yaml ...`. For one process: "
                "`srun --ntasks 1 --nodes 1 megatrain train ...`, or a job of one task."
            )

    @property
    def store_prefix(self) -> str:
        """Prefix of keys in the store where the ranks meet, which separates this attempt of the job from earlier ones.

        A store that rank 0 serves is new in each attempt. A launcher's may be as old as the launcher; its count of restarts does not
        include those for nodes that come or go, which change the world size. Ranks that share a secret meet under a name that no
        stranger can guess.
        """
        plain = f"megatrain-{self.restart_count}-{self.world_size}" if self.launcher_serves else "megatrain"
        return f"{plain}-{derived(self.secret, plain, self.job)[:32]}" if self.secret else plain

    @property
    def is_spread(self) -> bool:
        """Whether the ranks are on several machines."""
        return self.world_size > self.local_world_size

    @property
    def key(self) -> bytes:
        """The key that the ranks seal their messages with until they have called the roll; empty where they share no secret.

        Without the count of restarts: that of a machine which has come in the place of a lost one begins anew.
        """
        return derived(self.secret, self.job, self.master_port, self.world_size).encode()

    @property
    def joining_key(self) -> bytes:
        """The key of words with which ranks come to the store; the same in jobs that could meet there, so that one turns the other away."""
        return derived(self.secret, "joining", self.store_prefix).encode()

    @property
    def warning(self) -> str:
        """A word about the safety of a job of several machines whose ranks share no secret; else empty."""
        if self.secret or not self.is_spread:
            return ""
        return (
            f"{VARIABLE} is not set: any process that reaches port {self.master_port} of {self.master_addr} could disturb this job. "
            "Set it, the same on all machines, to the output of `openssl rand -hex 32`."
        )

    def check(self) -> None:
        """Raise LaunchError if the numbers contradict each other, or a job of several nodes would meet at localhost."""
        if self.world_size > MOST_RANKS:
            raise LaunchError(
                f"{self.launcher}: a world of {self.world_size} ranks is more than the {MOST_RANKS:,} that can be."
            )
        if not 0 <= self.rank < self.world_size:
            raise LaunchError(
                f"{self.launcher}: rank {self.rank} is not in a world of {self.world_size} (0..{self.world_size - 1})."
            )
        if not 0 <= self.local_rank < self.local_world_size <= self.world_size:
            raise LaunchError(
                f"{self.launcher}: local rank {self.local_rank} of {self.local_world_size} on this node does not fit "
                f"rank {self.rank} of {self.world_size}."
            )
        require_host(self.master_addr or "localhost")
        local = self.master_addr in LOCAL_NAMES or (self.master_addr or "").startswith("127.")
        if local and self.is_spread and not self.launcher_serves:
            raise LaunchError(
                f"MASTER_ADDR={self.master_addr}, but only {self.local_world_size} of the {self.world_size} ranks are here: "
                "they cannot meet at localhost. Set MASTER_ADDR to the name or address of the first node."
            )


def require_host(host: str) -> None:
    """Raise LaunchError for a MASTER_ADDR that no host can have, before Python tells of it without its name."""
    try:
        host.encode("idna")
    except UnicodeError:
        raise LaunchError(
            f"MASTER_ADDR={cut(host)} is no name or address of a host: the parts of a name have 1 to 63 letters each, with dots between "
            "them. Set it to the name or address of the first node."
        ) from None


def _number(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    try:
        return number_in(env, key, default)
    except ValueError as error:
        raise LaunchError(str(error)) from error


def _port(env: Mapping[str, str], default: int | None = None) -> int:
    port = _number(env, "MASTER_PORT", default)
    if not 1 <= port < 1 << 16:
        raise LaunchError(f"MASTER_PORT={port} is no port: they go from 1 to 65535. Set it to a free one, for example 29500.")
    return port


def _is_step(env: Mapping[str, str]) -> bool:
    """Whether srun has started this process. A batch script has SLURM_PROCID=0 too, but no ordinary step number."""
    if "SLURM_PROCID" not in env:
        return False
    key = "SLURM_STEP_ID" if env.get("SLURM_STEP_ID") else "SLURM_STEPID"
    if step := env.get(key):
        return not step.isdecimal() or _number(env, key) < SPECIAL_STEPS
    in_job = "SLURM_JOB_ID" in env and "SLURM_JOB_NODELIST" in env  # else the variables were set by hand
    return env["SLURM_PROCID"] != "0" or "SLURM_STEP_NUM_TASKS" in env or not in_job


def _tasks_asked(env: Mapping[str, str]) -> int:
    """Number of tasks of the SLURM job around this process; 1 outside of SLURM. Without --ntasks, SLURM gives each node one."""
    if "SLURM_JOB_ID" not in env:
        return 1
    nodes = _number(env, "SLURM_JOB_NUM_NODES", _number(env, "SLURM_NNODES", 1))
    each = _number(env, "SLURM_NTASKS_PER_NODE", 1)
    return _number(env, "SLURM_NTASKS", _number(env, "SLURM_NPROCS", nodes * each))


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [key for key in needed if not env.get(key)]
    if missing:
        present = ", ".join(f"{key}={cut(env[key])}" for key in needed if env.get(key)) or "nothing"
        raise LaunchError(
            f"The launcher's variables are incomplete: {', '.join(missing)} missing ({present} set). Start with "
            "torchrun --nproc-per-node N -m megatrain train ..., or set all six, or for one process unset RANK and WORLD_SIZE."
        )
    rank, local = _number(env, "RANK"), _number(env, "LOCAL_WORLD_SIZE")
    return Launch(
        rank=rank,
        local_rank=_number(env, "LOCAL_RANK"),
        world_size=_number(env, "WORLD_SIZE"),
        local_world_size=local,
        node=_number(env, "GROUP_RANK", rank // max(local, 1)),
        host=socket.gethostname(),
        restart_count=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
        master_addr=env["MASTER_ADDR"],
        master_port=_port(env),
        launcher="torchrun",
        job=env.get("TORCHELASTIC_RUN_ID", ""),
        reply=env.get(REPLY),
        launcher_process=_number(env, "MEGATRAIN_LAUNCHER", 0) or None,
        launcher_serves=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _from_srun(env: Mapping[str, str], hostnames: Callable[[str], list[str]]) -> Launch:
    size_key = next((key for key in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") if key in env), None)
    if size_key is None:
        raise LaunchError(
            "SLURM_PROCID is set, but neither SLURM_STEP_NUM_TASKS nor SLURM_NTASKS, which say how many ranks there are. "
            "Start them with srun, which sets all, or for one process unset SLURM_PROCID."
        )
    size = _number(env, size_key)
    nodes_text = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    if size > 1 and not nodes_text and not env.get("MASTER_ADDR"):
        raise LaunchError(
            f"{size_key}={size}, but SLURM_JOB_NODELIST is missing: set it, or MASTER_ADDR, to say where ranks meet."
        )
    try:
        nodes = hostnames(nodes_text) if nodes_text else []
        local = _local_tasks(env, size, max(len(nodes), 1))
    except ValueError as error:
        raise LaunchError(f"SLURM's variables cannot be read: {error}.") from error
    if size > 1 and not (env.get("MASTER_PORT") or env.get("SLURM_JOB_ID")):
        raise LaunchError("SLURM_JOB_ID is missing: set it, or MASTER_PORT, to say at which port the ranks meet.")
    return Launch(
        rank=_number(env, "SLURM_PROCID"),
        local_rank=_number(env, "SLURM_LOCALID"),
        world_size=size,
        local_world_size=local,
        node=_number(env, "SLURM_NODEID", 0),
        host=socket.gethostname(),
        restart_count=_number(env, "SLURM_RESTART_COUNT", 0),
        master_addr=env.get("MASTER_ADDR") or (address_of(nodes[0]) if nodes and size > 1 else None),
        master_port=_port(env, port_of_job(_number(env, "SLURM_JOB_ID", 0))),
        launcher="srun",
        job=env.get("SLURM_JOB_ID", ""),
        cores=max(_number(env, "SLURM_CPUS_PER_TASK", 0), 0) or None,
    )


def _local_tasks(env: Mapping[str, str], size: int, nodes: int) -> int:
    """Number of tasks on this node. Raises ValueError if SLURM's variables do not tell."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    if text:
        counts, node = expand_tasks(text), _number(env, "SLURM_NODEID", 0)
        if not 0 <= node < len(counts):
            raise ValueError(f"SLURM_NODEID={node} is not among the {len(counts)} nodes of SLURM_TASKS_PER_NODE={cut(text)}")
        return counts[node]
    nodes = _number(env, "SLURM_NNODES", nodes)
    if size % max(nodes, 1):
        raise ValueError(f"{size} tasks do not divide by {nodes} nodes; SLURM_TASKS_PER_NODE, which would tell, is missing")
    return size // max(nodes, 1)


def _hostnames(nodes: str) -> list[str]:
    """The host names of a node list: by scontrol where it is installed, else by `expand_nodes`."""
    if shutil.which("scontrol"):
        command = ["scontrol", "show", "hostnames", nodes]
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            if done.returncode == 0 and done.stdout.split():
                return done.stdout.split()
    return expand_nodes(nodes)
