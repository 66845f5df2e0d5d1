"""torchrun as the launch scripts use it: what is told to stop stops, with exit code 75; nothing is left behind; errors are short.

    python launch/agent.py RUN [torchrun's options] -m megatrain VERB ...

RUN is the run's directory: ranks write logs/rank_00000.out and .err there, and a run that was told to stop leaves the file `preempted`.
Plain torchrun differs in this: it dies of SIGUSR2 and leaves its workers alone; a second signal while they save ends the wait for
them; a machine's own name may lead it to a loopback address; it returns 1 whatever its workers return, after 40 lines of traceback.

Exit code: 0 done, 75 stopped early, start it again, 1 a failure.
"""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import json
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar, cast

T = TypeVar("T")
EX_TEMPFAIL = 75
PREEMPTED = "preempted"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SHUTDOWN_SECONDS = 600
"""Workers that were told to stop have so long to end a step and save; a scheduler's own limit is usually shorter."""
PROBE_SECONDS = 5.0
INSISTED_SECONDS = 2.0
"""What is left of the workers so long after Ctrl-C was pressed once more is killed."""
MOST_FILES = 1 << 20
ANSWER_SECONDS = 15
"""How long the store may take to answer: where its host has gone, each of the last words to it waits so long."""


def _end_at_start(number: int, frame: FrameType | None) -> NoReturn:
    """No worker was started: nothing is to be saved."""
    say_stopped(Path(sys.argv[1], PREEMPTED), number)
    os._exit(EX_TEMPFAIL)


def say_stopped(marker: Path, number: int) -> None:
    """Leave the marker, which a job script looks for, where no worker has."""
    with contextlib.suppress(OSError):
        marker.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"why": signal.Signals(number).name, "step": None, "time": time.time(), "job": ""})
        marker.write_text(text + "\n")


HEARD = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]  # nohup
for _number in HEARD:
    signal.signal(_number, _end_at_start)
_chosen = os.environ.get("TORCH_CPP_LOG_LEVEL")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a store that has gone at the end is no news: no stacks of C++

import psutil  # noqa: E402  # after the signals: the rest takes seconds
from torch.distributed import DistError, TCPStore  # noqa: E402
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, SignalException  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.elastic.rendezvous import (  # noqa: E402
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402
from torch.distributed.run import config_from_args, parse_args  # noqa: E402

from megatrain.parallel.transport import TransportError  # noqa: E402
from megatrain.parallel.transport_store import within  # noqa: E402
from megatrain.runtime import ports  # noqa: E402
from megatrain.runtime.interface import VARIABLE, Interface, check_names, choose, interfaces  # noqa: E402
from megatrain.runtime.launch import LaunchError  # noqa: E402
from megatrain.runtime.slurm import address_of  # noqa: E402
from megatrain.runtime.stop import BEGUN, INSIST_SECONDS  # noqa: E402

if _chosen is None:
    del os.environ["TORCH_CPP_LOG_LEVEL"]  # workers decide for themselves
logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is told below


def main(run: Path, words: list[str]) -> int:
    """Run torchrun; returns the exit code."""
    marker = run / PREEMPTED
    logs = RankLogs(run / "logs", marker, sys.stdout.isatty())
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (many, most))  # the store that the nodes share holds connections of every rank
    os.environ["MEGATRAIN_LAUNCHER"] = str(os.getpid())  # so that a worker sees when this process has gone
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    try:
        code = launch(logs, words)
    except RendezvousTimeoutError:
        code = complain(
            f"error: {socket.gethostname()}: too few nodes came to {logs.where} within {join_seconds()} s. Were all started, with this "
            "MASTER_ADDR? JOIN_TIMEOUT sets how long to wait."
        )
    except (LaunchError, RendezvousError, DistError, OSError) as error:
        code = complain(f"error: {socket.gethostname()}: {error or 'the other nodes have ended'}")
    except SignalException:
        code = after_signal(logs, marker)
    return code


def after_signal(logs: RankLogs, marker: Path) -> int:
    """The exit code of a run that was told to stop, once its workers have ended: 0 where they were done just then."""
    replies = logs.replies()
    if not replies or "" in replies:  # some worker did not hear yet, so that none has trained
        say_stopped(marker, logs.told)
        return EX_TEMPFAIL
    if BEGUN not in replies:
        return max(int(code) for code in replies)
    if logs.insisted:
        return complain("interrupted; the last checkpoint holds") + 129
    return complain(f"error: told to stop, but the run has not saved; what its ranks said: {logs.folder}")


def launch(logs: RankLogs, words: list[str]) -> int:
    """Start the workers and wait for them."""
    arguments = parse_args(words)
    if arguments.standalone:  # a store of this machine at a free port, and a name that no other job has
        arguments.rdzv_backend, arguments.rdzv_endpoint, arguments.rdzv_id = "c10d", "localhost:0", os.urandom(8).hex()
    config, command, rest = config_from_args(arguments)
    config.logs_specs, config.signals_to_handle = logs, "SIGQUIT"  # the other signals are handled here
    config.log_line_prefix_template, config.role = "${role_name}", ""  # lines as they are: programs read them too
    if not arguments.standalone:
        meet_at(config)
        logs.where = config.rdzv_endpoint
        watch_membership(config, logs)
    listen(logs)
    try:
        elastic_launch(config, command)(*rest)
    except ChildFailedError as failed:
        told = {EX_TEMPFAIL, 128 + signal.SIGTERM, -signal.SIGTERM}  # by torchrun, since another one failed
        codes = {one.exitcode for one in failed.failures.values()}
        if EX_TEMPFAIL in codes and codes <= told:
            return EX_TEMPFAIL  # a worker was told to stop, and the others by it, or by torchrun before their first step
        first = {rank: one for rank, one in failed.failures.items() if one.exitcode not in told} or failed.failures
        for rank, failure in sorted(first.items()):
            ended = f"{signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            said = f"; what it said: {logs.folder}/rank_{rank:05d}.err" * (rank > 0 or not logs.terminal)
            complain(f"rank {rank} (process {failure.pid} on {socket.gethostname()}) ended with {ended}{said}")
        return 1
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # all has ended
    return 0


# --- where nodes meet -----------------------------------------------------------------------------------------------------


def meet_at(config: LaunchConfig) -> None:
    """Say to torchrun's rendezvous what it would otherwise guess from host names. Raises LaunchError."""
    host, _, port = config.rdzv_endpoint.rpartition(":")
    host, present = address_of(host), interfaces()
    check_names(os.environ, [one.name for one in present])
    if config.max_nodes > 1 or os.environ.get(VARIABLE):
        config.local_addr = choose(os.environ.get(VARIABLE), host, present).address
    config.rdzv_endpoint = f"{host}:{port}"
    serves = serves_store(host, int(port), present)
    if not serves:
        wait_for(host, int(port))
    config.rdzv_configs |= {"is_host": serves, "join_timeout": join_seconds(), "read_timeout": ANSWER_SECONDS}
    # A store of its own for each start of the workers: one that is shared keeps the address of a node that has gone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


def watch_membership(config: LaunchConfig, logs: RankLogs) -> None:
    """Have `logs` know when torchrun restarts the workers because nodes have come, and no call wait for a store whose host has gone.

    torch's own limits do not hold there: a host that is cut off or has no power is waited for until TCP gives up, a quarter of an hour.
    """

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        parameters.backend = "c10d"
        handler = rendezvous_handler_registry.create_handler(parameters)
        count, enter, leave = handler.num_nodes_waiting, handler.next_rendezvous, handler.shutdown

        def num_nodes_waiting() -> int:
            waiting = answered(count)
            logs.grows = logs.grows or waiting > 0
            return waiting

        def next_rendezvous() -> RendezvousInfo:
            answered(handler.is_closed)  # is the store there?
            return enter()

        def shutdown() -> bool:
            try:
                return answered(leave)
            except RendezvousError:
                return False

        handler.num_nodes_waiting, handler.next_rendezvous, handler.shutdown = num_nodes_waiting, next_rendezvous, shutdown
        return handler

    rendezvous_handler_registry.register("megatrain", create)
    config.rdzv_backend = "megatrain"


def answered(call: Callable[[], T]) -> T:
    """What a call to the store gives. Raises RendezvousConnectionError if it does not end in time; it is left behind in its thread."""
    outcome: list[tuple[T | None, Exception | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not outcome:
        raise RendezvousConnectionError(
            f"the store where the nodes meet has not answered for {ANSWER_SECONDS} s: has its host gone?"
        )
    result, error = outcome[0]
    if error is not None:
        raise error
    return cast(T, result)


def join_seconds() -> int:
    """How long nodes wait for each other."""
    return int(os.environ.get("JOIN_TIMEOUT") or 600)


def serves_store(host: str, port: int, present: Sequence[Interface]) -> bool:
    """Whether this agent is to serve the store: it is at MASTER_ADDR, and no other agent of the job was there before."""
    node = os.environ.get("SLURM_NODEID") if "SLURM_STEP_ID" in os.environ else None
    mine = is_here(host, present) if node is None else node == "0"
    problem = ports.trouble(port) if mine else ""
    if problem and (node is not None or not is_store(host, port)):
        raise LaunchError(f"port {port} of {host}, where the nodes would meet, {problem}")
    return mine and not problem


def is_here(host: str, present: Sequence[Interface]) -> bool:
    """Whether a host is this machine."""
    try:
        addresses = {str(one[4][0]) for one in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise LaunchError(f"MASTER_ADDR={host} cannot be resolved on {socket.gethostname()}: {error}") from error
    own = {one.address for one in present}
    return any(address in own or ipaddress.ip_address(address).is_loopback for address in addresses)


def is_store(host: str, port: int) -> bool:
    """Whether another agent of this job, on the same machine, serves the store already."""
    try:
        within(PROBE_SECONDS, lambda: TCPStore(host, port, is_master=False, wait_for_workers=False), "the store")
    except TransportError:
        return False
    return True


def wait_for(host: str, port: int) -> None:
    """Return when something listens there. Raises LaunchError."""
    deadline = time.monotonic() + join_seconds()
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{socket.gethostname()} could not reach {host}:{port}, where the nodes meet, within {join_seconds()} s ({error}). "
                    "Was the job started there, does MASTER_ADDR name it, is the port open? JOIN_TIMEOUT sets how long to wait."
                ) from error
            time.sleep(0.5)


# --- logs and signals -------------------------------------------------------------------------------------------------------


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


def listen(logs: RankLogs) -> None:
    """From here on the first signal makes torchrun tell the workers and wait for them; Ctrl-C once more is passed on.

    They are told by SIGUSR2: SIGTERM is what torchrun sends to the others when one worker has failed, which is no request.
    """
    heard: list[float] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(time.monotonic())
        if len(heard) == 1:
            logs.told = number
            raise SignalException(f"process {os.getpid()} was told to stop", signal.SIGUSR2)
        if number == signal.SIGINT and heard[-1] - heard[0] > INSIST_SECONDS:
            logs.insisted = True
            tell_workers(signal.SIGINT)
            threading.Timer(INSISTED_SECONDS, tell_workers, [signal.SIGKILL]).start()

    for number in HEARD:
        signal.signal(number, hear)


def tell_workers(number: int) -> None:
    """Send a signal to the processes that this one has started."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def read(path: Path) -> str:
    """A file's text, empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def complain(message: str) -> int:
    """Say what is wrong; the exit code of a failure."""
    print(f"megatrain: {message}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
