"""The guard of a run: no rank waits for ever, and the error names the rank that it waited for.

It sends nothing while all is well. Each rank has two threads: one checks once a second whether this rank has
been in one collective, or has made no step, for longer than train.hang_timeout_seconds; the other waits for a key in the store where
the ranks met.
An alarm (a rank has waited too long, or its transport broke because a peer died) sets that key for every rank. Then

    every rank    writes its state: waits in this call, is busy there, has failed
    one of them   (the first to raise the alarm) after 2 s reads all states, finds the culprits (`blame.py`), writes the verdict
    every rank    prints it, kills a frozen culprit on its own machine, and ends with exit code 1

by `os._exit`, since a rank blocked in C++ cannot raise. A rank that writes nothing is dead or frozen. If the store itself does not
answer, the rank that serves it is to blame. Every wait in this protocol has a limit; together they stay below 30 s.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Literal, NoReturn

from megatrain.lifecycle.blame import Identity, State, Verdict, judge
from megatrain.runtime.distributed import Session
from megatrain.transport.board import Board
from megatrain.transport.group import TransportError

OnEvent = Callable[[Literal["hang", "death"], "int | None", str], None]
"""Called with the kind, the rank to blame if it is a single one, and the message; in a thread, usually on one rank only."""

LOOK_SECONDS = 1.0
STORE_SECONDS = 4.0
"""Limit of each call to the store during an alarm."""
STATES_SECONDS = 2.0
"""How long the judging rank waits for all ranks to write their states."""
VERDICT_SECONDS = 8.0
"""How long the other ranks wait for the verdict."""
LINGER_SECONDS = 3.0
"""The rank that serves the store, which the others still read, ends this much later."""
SUSPENDED_SECONDS = 5.0
"""If a check comes this much too late, this process itself was suspended."""
STACK_FRAMES = 6


class Guard:
    """Watches one run, as a context manager around its loop. A TransportError that leaves the body ends the process with an explanation."""

    def __init__(self, session: Session, timeout_seconds: float, on_event: OnEvent | None = None) -> None:
        self._session = session
        self._launch = session.launch
        self._size = session.world.size
        self._timeout = timeout_seconds
        self._on_event = on_event
        self._ticked = time.monotonic()
        self._paused = 0
        self._closing = threading.Event()
        self._store_lost = threading.Event()
        self._alarmed = threading.Lock()
        self._main = threading.main_thread()
        self._threads: list[threading.Thread] = []
        self._waker: Board | None = None
        self._board: Board | None = None
        """Opened at the start: during an alarm, and at the end, all ranks would connect in the same moment."""
        self._server: Identity | None = None
        self._served_by_rank_0 = self._size > 1 and not self._launch.launcher_serves

    def tick(self) -> None:
        """Record progress: once a step, and once a batch of an evaluation."""
        self._ticked = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend the limit on time without a step, around work on the disk that may take long."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self.tick()

    def explain(self, error: TransportError) -> NoReturn:
        """End this process and every other rank, with a message that names the rank whose death or fault broke the transport."""
        frames = traceback.format_list(traceback.extract_tb(error.__traceback__)[-STACK_FRAMES:])
        self._alarm(State(self._session.rank, "failed", str(error), stack="".join(frames).rstrip()))

    def __enter__(self) -> Guard:
        if self._size > 1:
            self._start_watching()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, TransportError) and self._size > 1:
            self.explain(error)
        self._closing.set()
        if self._size > 1:
            self._leave(error)

    def _start_watching(self) -> None:
        self._waker, self._board = self._open_board(self._size), self._open_board(self._size)
        self._waker.write(f"identity/{self._session.rank}", Identity.own(self._session.rank).text())
        if self._served_by_rank_0 and self._session.rank != 0:
            text = self._waker.wait("identity/0", self._timeout)
            self._server = None if text is None else Identity.parse(text)
        for name, body in (("look", self._check), ("wake", self._await_alarm)):
            self._threads.append(threading.Thread(target=body, name=f"megatrain-guard-{name}", daemon=True))
            self._threads[-1].start()

    def _open_board(self, ranks: int = 1) -> Board:
        """A connection to the store, opened by `ranks` ranks at the same time. Raises TransportError."""
        address, port = self._launch.master_addr, self._launch.master_port
        if address is None or port is None:
            raise TransportError("a world of several ranks has no rendezvous store: MASTER_ADDR and MASTER_PORT are missing")
        return Board.open(address, port, f"guard/{self._launch.store_prefix}", STORE_SECONDS, ranks, self._launch.key)

    def _leave(self, error: BaseException | None) -> None:
        """Report that this rank has finished, so that it is not taken for dead, and end the threads."""
        if self._store_lost.is_set():
            return  # nobody is left to tell
        said = "" if error is None else "".join(traceback.format_exception_only(type(error), error)).strip()
        state = State(self._session.rank, "left" if error is None else "raised", said)
        try:
            board = self._write_state(state)
            board.write(f"wake/{state.rank}", "bye")
        except TransportError:
            return  # the store closed just now
        for thread in self._threads:
            thread.join(STORE_SECONDS)
        if error is None and self._session.everyone is not None:
            self._session.everyone.barrier()  # the rank that serves the store must not end first

    def _check(self) -> None:
        """Thread: once a second, check whether this rank has waited too long."""
        looked = awake = time.monotonic()
        while not self._closing.wait(min(LOOK_SECONDS, self._timeout / 4)):
            now = time.monotonic()
            if now - looked > SUSPENDED_SECONDS + LOOK_SECONDS:
                awake = now  # a job that was suspended gets the whole limit again
            looked = now
            call = self._session.recorder.waiting()
            since = max(awake, self._ticked if call is None else call.started)
            if now - since > self._timeout and not (call is None and self._paused):
                self._alarm(self._own_state())

    def _await_alarm(self) -> None:
        """Thread: block until another rank raises the alarm, or this rank leaves."""
        if self._waker is None:
            return
        try:
            text = self._waker.wait(f"wake/{self._session.rank}")
        except TransportError:
            self._store_lost.set()  # its server is gone; ranks that wait for that process find out
            return
        if text == "alarm":
            self._alarm(self._own_state())

    def _own_state(self) -> State:
        now = time.monotonic()
        frame = sys._current_frames().get(self._main.ident or 0)
        stack = "" if frame is None else "".join(traceback.format_list(traceback.extract_stack(frame)[-STACK_FRAMES:])).rstrip()
        recorder = self._session.recorder
        call = recorder.waiting()
        if call is not None:
            return State.waiting(self._session.rank, call, now, stack, recorder.issued())
        detail = f"no step for {now - self._ticked:.1f} s"
        return State(self._session.rank, "busy", detail, seconds=now - self._ticked, stack=stack, issued=recorder.issued())

    def _alarm(self, state: State) -> NoReturn:
        """Raise the alarm or follow it; end the process. If several threads call this, the first does it and the others block."""
        if not self._alarmed.acquire(blocking=False):
            threading.Event().wait()
        try:
            verdict, speaker = self._agree_on_verdict(state)
        except TransportError as error:
            verdict, speaker = self._blame_server(state, error), state.rank == min({*state.ranks, self._size - 1} - {0})
        self._end(state, verdict, speaker)

    def _agree_on_verdict(self, state: State) -> tuple[Verdict, bool]:
        """The verdict, and whether this rank reached it. Raises TransportError if the store does not answer."""
        if self._server is not None and self._server.condition() in ("gone", "stopped"):
            raise TransportError(f"{self._server} is {self._server.condition()}")
        board = self._write_state(state)
        first = board.count("alarms") == 1
        if not first:
            text = board.wait("verdict", VERDICT_SECONDS)
            if text is not None:
                return Verdict.parse(text), False
        else:
            board.write_all([f"wake/{rank}" for rank in range(self._size)], "alarm")
        verdict = self._reach_verdict(board)
        board.write("verdict", verdict.as_json())
        return verdict, True

    def _write_state(self, state: State) -> Board:
        """Write this rank's state; returns the board that it was written to. Raises TransportError."""
        key, text = f"state/{state.rank}", state.text()
        if self._board is not None:
            with suppress(TransportError):  # the network may have dropped a connection that was idle for days
                self._board.write(key, text)
                return self._board
        board = self._open_board()
        board.write(key, text)
        return board

    def _reach_verdict(self, board: Board) -> Verdict:
        """Judge the states that ranks write within STATES_SECONDS. Raises TransportError."""
        keys = [f"state/{rank}" for rank in range(self._size)]
        deadline = time.monotonic() + STATES_SECONDS
        while time.monotonic() < deadline and not board.complete(keys):
            time.sleep(0.1)
        texts = board.read_all(keys)
        states = {rank: State.parse(texts[key]) for rank, key in enumerate(keys) if key in texts}
        silent = board.read_all([f"identity/{rank}" for rank in range(self._size) if rank not in states])
        identities = [Identity.parse(text) for text in silent.values()]
        return judge(states, {identity.rank: identity for identity in identities}, self._size)

    def _blame_server(self, state: State, error: TransportError) -> Verdict:
        where = f"{self._launch.master_addr}:{self._launch.master_port}"
        if not self._served_by_rank_0:
            return Verdict("hang", (), f"{state}\nthe launcher's rendezvous store at {where} does not answer ({error})")
        condition = "elsewhere" if self._server is None else self._server.condition()
        meaning = {"gone": "has died", "stopped": "is frozen (stopped by a signal)"}.get(condition, "does not answer")
        text = f"{self._server or 'rank 0'}, which serves the rendezvous store at {where}, {meaning}\n{state}"
        dead = condition == "gone" or (condition == "elsewhere" and state.doing == "failed")
        return Verdict("death" if dead else "hang", (0,), text, () if self._server is None else (self._server,))

    def _end(self, state: State, verdict: Verdict, speaker: bool) -> NoReturn:
        """Print the verdict, call `on_event`, kill processes that cannot end by themselves, exit with 1."""
        named = ", ".join(str(rank) for rank in verdict.culprits[:8]) or "none"
        text = verdict.text.replace("\n", "\n    ")
        own = "" if str(state) in verdict.text or state.rank in verdict.culprits else f"\n    this {state}"
        print_error(f"megatrain: rank {state.rank} ends after a {verdict.kind}; to blame: rank {named}\n    {text}{own}")
        if speaker and self._on_event is not None:
            culprit = verdict.culprits[0] if len(verdict.culprits) == 1 else None
            callback = threading.Thread(target=self._on_event, args=(verdict.kind, culprit, verdict.text), daemon=True)
            callback.start()
            callback.join(STORE_SECONDS)
        for identity in verdict.kill:
            if identity.kill():
                print_error(f"megatrain: rank {state.rank} killed {identity}, which could not end by itself")
        if self._served_by_rank_0 and state.rank == 0:
            time.sleep(LINGER_SECONDS)
        os._exit(1)


def print_error(text: str) -> None:
    """Write lines to stderr without Python's buffers, whose locks another thread may hold for ever."""
    os.write(2, (text + "\n").encode(errors="replace"))
