"""torchrun as the launch scripts start it: a stop request saves and exits with 75, no process is left behind, errors are short.

    python lifecycle/agent.py RUN [torchrun's options] -m megatrain VERB ...

RUN is the run's directory: ranks write logs/rank_00000.out and .err there, and a run that was told to stop leaves the file `preempted`.
Plain torchrun differs: SIGUSR2 kills it and leaves its workers running; a second signal while workers save ends the wait for them;
a machine's own host name may lead it to a loopback address; its exit code is 1 whatever the workers' is, after 40 lines of traceback.

Exit code: 0 done; 75 stopped early, start it again; 76 training went wrong, look first; 1 a failure.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatrain.lifecycle.stop import INSIST_SECONDS, LISTENING, PREEMPTED, SIGNALS, write_marker
from megatrain.runtime.launch import Launch, LaunchError

SHUTDOWN_SECONDS = 600
"""Time that workers have, once told to stop, to end a step and save; a scheduler's own limit is usually shorter."""
INSISTED_SECONDS = 2.0
"""Workers still running this long after a second Ctrl-C are killed."""
MOST_FILES = 1 << 20


def _end_at_start(number: int, frame: FrameType | None) -> NoReturn:
    """Signal handler until workers are started: nothing to save, so leave the marker and exit with 75."""
    say_stopped(Path(sys.argv[1], PREEMPTED), number)
    os._exit(os.EX_TEMPFAIL)


def say_stopped(marker: Path, number: int) -> None:
    """Write the marker that a job script looks for, in place of workers that could not."""
    write_marker(marker, Launch(), signal.Signals(number).name, None)


HEARD = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]  # nohup
for _number in HEARD:
    signal.signal(_number, _end_at_start)
_chosen = os.environ.get("TORCH_CPP_LOG_LEVEL")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a store that closes at the end needs no C++ stack

import psutil  # noqa: E402  # after the signal handlers, since these imports take seconds
from torch.distributed import DistError  # noqa: E402
from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError  # noqa: E402
from torch.distributed.launcher.api import elastic_launch  # noqa: E402
from torch.distributed.run import config_from_args, parse_args  # noqa: E402

from megatrain.checkpoint.claim import taken  # noqa: E402
from megatrain.files import shown  # noqa: E402
from megatrain.lifecycle.agent_logs import RankLogs  # noqa: E402
from megatrain.lifecycle.agent_nodes import join_seconds, meet_at, watch_membership  # noqa: E402
from megatrain.lifecycle.agent_store import LOOPBACK  # noqa: E402
from megatrain.runtime.secret import VARIABLE as SECRET  # noqa: E402
from megatrain.stderr import say  # noqa: E402
from megatrain.transport.store import allow_files  # noqa: E402

if _chosen is None:
    del os.environ["TORCH_CPP_LOG_LEVEL"]  # workers decide for themselves
for _logger in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
    logging.getLogger(_logger).setLevel(logging.CRITICAL)  # failures are reported below; some loggers have a level of their own


def main(run: Path, words: list[str]) -> int:
    """Run torchrun; returns the exit code."""
    marker = run / PREEMPTED
    logs = RankLogs(run / "logs", marker, sys.stdout.isatty())
    allow_files(MOST_FILES)  # the store that the nodes share holds connections of every rank
    os.environ["MEGATRAIN_LAUNCHER"] = str(os.getpid())  # so that a worker sees when this process has gone
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    try:
        code = launch(logs, words)
    except RendezvousTimeoutError:
        code = complain(
            f"error: {socket.gethostname()}: too few nodes came to {logs.where} within {join_seconds()} s. Were all started, with this "
            "MASTER_ADDR and MEGATRAIN_SECRET? JOIN_TIMEOUT sets how long to wait."
        )
    except (LaunchError, RendezvousError, DistError, OSError) as error:
        code = complain(f"error: {socket.gethostname()}: {error or 'the other nodes have ended'}")
    except SignalException:
        code = after_signal(logs, marker)
    logs.tell_errors()
    return code


def after_signal(logs: RankLogs, marker: Path) -> int:
    """Exit code of a run that was told to stop, once its workers have ended; the workers' own code if they had just finished."""
    replies = logs.replies()
    if not replies or "" in replies:  # a worker does not listen for signals yet: none has trained
        say_stopped(marker, logs.stop_signal)
        return os.EX_TEMPFAIL
    if LISTENING not in replies:
        return max(int(code) for code in replies)
    if logs.second_interrupt:
        return complain("interrupted; the last checkpoint holds") + 129
    return complain(f"error: told to stop, but the run has not saved; what its ranks said: {logs.folder}")


def launch(logs: RankLogs, words: list[str]) -> int:
    """Start the workers and wait for them."""
    arguments = parse_args(words)
    arguments.log_dir = os.devnull  # `logs` replaces torchrun's own, for which it would leave a folder behind
    if arguments.standalone:  # a store of this machine at a free port, and a name that no other job has
        arguments.rdzv_backend, arguments.rdzv_endpoint, arguments.rdzv_id = "c10d", f"{LOOPBACK}:0", os.urandom(8).hex()
        os.environ.setdefault(SECRET, os.urandom(32).hex())
    config, command, rest = config_from_args(arguments)
    if "train" in words and (problem := taken(logs.folder.parent, "log.dir", config.run_id)):
        raise LaunchError(problem)  # before the logs of the run's ranks are renamed
    config.logs_specs, config.signals_to_handle = logs, "SIGQUIT"  # the other signals are handled here
    config.log_line_prefix_template, config.role = "${role_name}", ""  # no prefix on lines, which programs read too
    if arguments.standalone:
        config.local_addr = LOOPBACK
        config.rdzv_configs |= {"is_host": True}
    else:
        meet_at(config)
        logs.where = config.rdzv_endpoint
    watch_membership(config, logs, arguments.standalone)
    listen(logs)
    try:
        elastic_launch(config, command)(*rest)
    except ChildFailedError as failed:
        told = {os.EX_TEMPFAIL, 128 + signal.SIGTERM, -signal.SIGTERM}  # torchrun's signal to the others when one fails
        codes = {one.exitcode for one in failed.failures.values()}
        if os.EX_TEMPFAIL in codes and codes <= told:
            return os.EX_TEMPFAIL  # a worker was told to stop, and the others by it, or by torchrun before their first step
        if os.EX_PROTOCOL in codes and codes <= {*told, os.EX_PROTOCOL}:
            return os.EX_PROTOCOL  # training went wrong on all, and torchrun's signal met some before they had ended
        first = {rank: one for rank, one in failed.failures.items() if one.exitcode not in told} or failed.failures
        explained = logs.tell_errors()
        for rank, failure in sorted(first.items()):
            if rank in explained:
                continue
            ended = f"{signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            said = f"; what it said: {logs.folder}/rank_{rank:05d}.err" * (rank > 0 or not logs.terminal)
            complain(f"rank {rank} (process {failure.pid} on {socket.gethostname()}) ended with {ended}{said}")
        return 1
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # all has ended
    return 0


def listen(logs: RankLogs) -> None:
    """From here on the first signal makes torchrun tell the workers to stop and wait for them; a second Ctrl-C is passed on to them.

    Workers are told by SIGUSR2: torchrun sends SIGTERM to the other workers when one has failed, which is no request to stop.
    """
    heard: list[float] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(time.monotonic())
        if len(heard) == 1:
            logs.stop_signal = number
            raise SignalException(f"process {os.getpid()} was told to stop", signal.SIGUSR2)
        if number == signal.SIGINT and heard[-1] - heard[0] > INSIST_SECONDS:
            logs.second_interrupt = True
            tell_workers(signal.SIGINT)
            threading.Timer(INSISTED_SECONDS, tell_workers, [signal.SIGKILL]).start()

    for number in HEARD:
        signal.signal(number, hear)


def tell_workers(number: int) -> None:
    """Send a signal to the direct children of this process."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def complain(message: str) -> int:
    """Print an error; returns 1, the exit code of a failure."""
    say(shown(f"megatrain: {message}"))
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
