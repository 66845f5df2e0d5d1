"""`megatrain serve`: a model over HTTP, in one process or under a layout of tensor and pipeline parallelism.

rank 0     main thread: HTTP and signals      a thread: the engine
others     main thread: the engine, which does as rank 0's
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from megatrain.inference.engine import EngineSettings
from megatrain.inference.opening import Opened, TokenizerWish, opened
from megatrain.lifecycle.stop import end_with_launcher
from megatrain.runtime.interface import launched
from megatrain.serving.connections import make_server
from megatrain.serving.desk import Desk
from megatrain.serving.endpoints import Endpoints
from megatrain.serving.mail import Mailbox
from megatrain.serving.opening_served import served_of
from megatrain.serving.refusal import Refusal
from megatrain.serving.replica import StepParts, follow, lead
from megatrain.serving.served import Served
from megatrain.serving.serving_limits import ServingLimits
from megatrain.serving.traffic_log import TrafficLog
from megatrain.stderr import note

LAST_WORDS_SECONDS = 0.5
"""How long a server whose engine has died says so before it ends."""


@dataclass(frozen=True)
class ServeOptions:
    """The arguments of `megatrain serve`."""

    checkpoint: str
    overrides: Sequence[str]
    host: str
    port: int
    name: str | None
    template: str | None
    tokenizer: TokenizerWish
    dtype: torch.dtype
    settings: EngineSettings
    limits: ServingLimits
    grace: float
    """Seconds that open answers have after a signal."""
    log: Path | None
    log_bytes: int
    log_files: int
    feedback: Path | None


def main(options: ServeOptions) -> int:
    """`megatrain serve`: answer until a signal comes. Returns 0.

    Raises CheckpointError, ConfigError, LaunchError, TransportError, OSError or ValueError, with advice.
    """
    launch = launched(os.environ)
    end_with_launcher(launch)
    if launch.rank == 0:
        Server(options).run()
        return 0
    with _signals_of_follower() as loaded, _model(options) as model:
        loaded.set()
        follow(model.engine, model.ctx)
    return 0


@contextmanager
def _model(options: ServeOptions) -> Iterator[Opened]:
    """The model, one replica of it. Raises ValueError where there are more."""
    with opened(
        options.checkpoint, options.overrides, tokenizer=options.tokenizer, dtype=options.dtype, settings=options.settings
    ) as model:
        replicas = model.ctx.dp.size
        if replicas > 1:
            ranks = model.ctx.world.size // replicas
            raise ValueError(
                f"{model.ctx.world.size} ranks are {replicas} replicas of a model on {ranks}, and a server has one. Use {ranks}, or "
                f"parallel.tensor_parallel_size={model.ctx.tp.size * replicas}, or several servers behind a balancer of HTTP."
            )
        yield model


@contextmanager
def _signals_of_follower() -> Iterator[threading.Event]:
    """Signals end a rank that is loading; then rank 0 decides when all end. Sets nothing: the body sets the event when it has loaded."""
    loaded = threading.Event()

    def told(_number: int, _frame: FrameType | None) -> None:
        if not loaded.is_set():
            os._exit(0)

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield loaded
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Server:
    """Rank 0: HTTP in this thread, the engine in another."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        require_folders({"--log": options.log, "--feedback": options.feedback})
        self.socket = listening(options.host, options.port)
        self.log = None if options.log is None else TrafficLog(options.log, options.log_bytes, options.log_files)
        self.mailbox = Mailbox()
        self.desk = Desk(self.mailbox, options.limits.most_running, options.limits.queue)
        self.endpoints = Endpoints(self.desk, options.limits, self.log, options.feedback)
        self.server = make_server(self.endpoints.app(), options.limits, options.grace)
        self.signals = 0
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._engine, name="megatrain-engine", daemon=True)

    def run(self) -> None:
        """Serve until a signal comes, or the engine fails: then its error is raised."""
        host, port = self.socket.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        note(f"megatrain: serving {self.options.checkpoint} at http://{shown}:{port} (the page to chat is there too)")
        asyncio.run(self._serve())
        self.mailbox.close()
        self.thread.join()
        if self.log is not None:
            self.log.close()
        if self.failure is not None:
            raise self.failure

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._told, number)
        self.thread.start()
        await self.server.serve([self.socket])

    def _told(self, number: int) -> None:
        """A signal: the first ends the server when all is answered, at most after the grace; a second one now."""
        if self.desk.state == "loading":
            note("megatrain: told to stop while the model was being loaded")
            os._exit(0)
        self.signals += 1
        if self.signals > 1:
            self._end_answers()
            return
        self.desk.change("stopping", "the server is stopping.")
        left = (
            f": {self.desk.open} texts are still being written, for {self.options.grace:g} s at most" if self.desk.open else ""
        )
        note(f"megatrain: {signal.Signals(number).name}: stopping{left}")
        self.server.should_exit = True
        self.loop.call_later(self.options.grace, self._end_answers)

    def _end_answers(self) -> None:
        self.desk.end_all(Refusal("the server is stopping.", status=503, code="stopping"))

    # --- the engine's thread ------------------------------------------------------------------------------------------------------

    def _engine(self) -> None:
        """Load the model and work; whatever goes wrong ends the server."""
        try:
            with _model(self.options) as model:
                served = served_of(model, self.options.name, self.options.template)
                self._call(self._ready, served)
                lead(model.engine, model.ctx, self.mailbox, self._deliver, self.desk.pause)
        except BaseException as error:
            self.failure = error
            self._call(self._died, str(error))

    def _deliver(self, parts: StepParts) -> None:
        self._call(self.desk.deliver, parts)

    def _call(self, function: object, *arguments: object) -> None:
        """Have a function called in the server's loop, while there is one."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]

    # --- in the loop --------------------------------------------------------------------------------------------------------------

    def _ready(self, served: Served) -> None:
        gc.collect()
        gc.freeze()  # what was imported stays for ever: garbage of connections is then looked for often, and found quickly
        self.desk.open_for(served.max_length)
        self.endpoints.served = served
        if self.log is not None:
            self.log.know(served.codec)
        note(f"megatrain: {served.name} is ready: {served.layout}, {served.attention}")

    def _died(self, said: str) -> None:
        self.desk.change("dead", f"the engine has died: {said}")
        self.desk.end_all(Refusal(self.desk.said, status=500, code="dead"))
        self.loop.call_later(LAST_WORDS_SECONDS, self._stop)

    def _stop(self) -> None:
        self.server.should_exit = True


def require_folders(files: Mapping[str, Path | None]) -> None:
    """Raise ValueError where a file could not be written, of which the thumbs would tell hours later."""
    for name, path in files.items():
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{name} {path}: there is no folder {path.parent}. Make it first.")
        if path is not None and path.is_dir():
            raise ValueError(f"{name} {path} is a folder. Give a file in it.")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError with advice."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(
        family, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )  # by its protocol asyncio knows that it shall not wait
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise OSError(
            error.errno,
            f"{host}:{port} cannot be listened at ({error.strerror}). Use another --port (0: any that is free) or --host.",
        ) from None
    return found
