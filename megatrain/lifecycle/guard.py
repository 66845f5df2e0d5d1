"""The guard of a run: no rank waits for ever, and the error names the rank that it waited for.

It sends nothing while all is well. Each rank has two threads. One looks once a second whether this rank has been in one collective, or has
come no further in its section of the run (`sections.py`), for longer than that section may take; whether its neighbour, the next rank of
its machine, has died; and tells this rank's monitor (`monitor.py`) that Python still runs. The other waits for a key in the store where the
ranks met.
An alarm (a rank has waited too long, or its transport broke because a peer died) sets that key for every rank. Then

    every rank    writes its state: waits in this call, is busy there, has failed
    one of them   (the first to raise the alarm) after 2 s reads all states, finds the culprits (`blame.py`), writes the verdict
    every rank    prints it, kills a frozen culprit on its own machine, and ends with exit code 1

by `os._exit`, since a rank blocked in C++ cannot raise. A rank that writes nothing is dead or frozen. If the store itself does not
answer, the rank that serves it is to blame. Every wait in this protocol has a limit; together they stay below 30 s.

A world of one rank has the same thread and monitor, and no store. A guard begins before the ranks meet (`with Guard(...)`), opens its
connections as soon as there is a store (`meet`), and ends after all else (`close`).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn

from megatrain import transport
from megatrain.data.ahead import Ahead
from megatrain.files import shown
from megatrain.lifecycle.blame import SHOWN, Identity, State, Verdict, judge, places, stacks, written_out
from megatrain.lifecycle.monitor import DUMP_SECONDS, DUMP_SIGNAL, Monitor, begin_monitor
from megatrain.lifecycle.roll import Roll, call_roll
from megatrain.lifecycle.sections import Limit, Name, SectionLimits, Sections, Suspensions, TimedSection
from megatrain.runtime.distributed import Session
from megatrain.runtime.launch import Launch
from megatrain.stderr import say
from megatrain.transport.board import STORE, Board
from megatrain.transport.group import TransportError
from megatrain.transport.store import within
from megatrain.transport.wrappers import Call, Recorder

OnEvent = Callable[[Literal["hang", "death", "stopping"], "int | None", str], None]
"""Called with the kind, the rank to blame if it is a single one, and the message; in a thread, usually on one rank only."""
Background = Callable[[], "tuple[float, str] | None"]
"""Work of another thread that a save has left: (time.monotonic at its beginning, where it is); None if there is none."""
Record = Callable[[], tuple[int, str]]
"""Steps so far, and the file in which the monitor is to record the end of a rank that cannot do so itself; empty for none."""

LOOK_SECONDS = 1.0
WHERE_SECONDS = 20.0
"""A run that was told to stop and has come no further for this long says where it is: schedulers kill after 30 s without a word."""
STORE_SECONDS = 4.0
"""Limit of each call to the store during an alarm."""
STATES_SECONDS = 2.0
"""How long the judging rank waits for all ranks to write their states."""
SURE_SECONDS = 0.5
"""After this long it looks whether all that are silent are dead or frozen."""
VERDICT_SECONDS = 8.0
"""How long the other ranks wait for the verdict."""
LINGER_SECONDS = 3.0
"""The rank that serves the store, which the others still read, ends this much later."""
LATE_SECONDS = 5.0
"""If a look comes this much too late, the whole job was suspended, perhaps: the monitor knows."""
WORD_SECONDS = 2.0
"""How long it may take the monitor to say so."""
GONE_SECONDS = 4.0
"""A neighbour that has been gone for this long has died: ranks that end after an error in common do so within less."""
ALARM_SECONDS = 40.0
"""An alarm takes less: time for the monitor to wait."""
EXIT_SECONDS = 60.0
"""Time for the interpreter to end once the run has."""
STACK_FRAMES = 6
_TRANSPORT = Path(transport.__file__).parent


class Guard:
    """Watches one run on this rank, from before the ranks meet to the end."""

    def __init__(self, launch: Launch, limits: SectionLimits, monitor: Monitor | None = None) -> None:
        """monitor: of the whole process, where it began before; else the guard has one of its own."""
        self._launch = launch
        self._rank, self._size = launch.rank, launch.world_size
        self.sections = Sections(limits)
        self._limits = limits
        self.on_event: OnEvent | None = None
        self.background: Background = lambda: None
        self.record: Record = lambda: (0, "")
        self.told: Callable[[], float | None] = lambda: None
        """When this rank was told to stop (time.monotonic); None if it was not."""
        self.reader: Callable[[], int | None] = lambda: None
        """The thread that makes the batch which the section `data` waits for; None: the main thread."""
        self._monitor, self._keeps_monitor = monitor, monitor is not None
        self._suspensions = Suspensions()
        self._recorder = Recorder()
        self._session: Session | None = None
        self._left = False
        self._closing = threading.Event()
        self._store_lost = threading.Event()
        self._alarmed = threading.Lock()
        self._main = threading.main_thread()
        self._threads: list[threading.Thread] = []
        self._waker: Board | None = None
        self._board: Board | None = None
        """Opened at the start: during an alarm, and at the end, all ranks would connect in the same moment."""
        self._roll: Roll | None = None
        self._server: Identity | None = None
        self._neighbour: Identity | None = None
        self._gone_since: float | None = None
        self._said_where = False
        self._served_by_rank_0 = self._size > 1 and not launch.launcher_serves

    # --- the main thread's side -------------------------------------------------------------------------------------------

    @contextmanager
    def section(self, name: Name, where: Callable[[], str] = str) -> Iterator[TimedSection]:
        """A section of the run, with its limit. The monitor is told at once, else it would judge by the section before for a while."""
        with self.sections.enter(name, where) as timed:
            self._beat()
            yield timed

    def tick(self) -> None:
        """Record progress: once a step, and once a batch of an evaluation."""
        self.sections.tick()

    def phase(self, name: str) -> AbstractContextManager[object]:
        """The section of a step's phase, where it has one of its own."""
        return (
            self.sections.enter("data", lambda: file_of(self.reader() or self._main.ident)) if name == "data" else nullcontext()
        )

    def __enter__(self) -> Guard:
        self._monitor = self._monitor or begin_monitor(self._rank, self._limits.start)
        if DUMP_SIGNAL is not None:
            faulthandler.register(DUMP_SIGNAL, file=2)
        self._start("look", self._check)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def meet(self) -> None:
        """Open the connections to the store where the ranks meet, and say who this rank is. Raises TransportError."""
        if self._size == 1:
            return
        self._waker, self._board = self._open_board(self._size), self._open_board(self._size)
        self._waker.write(f"identity/{self._rank}", Identity.own(self._rank).text())
        self._start("wake", self._await_alarm)

    def join(self, session: Session) -> None:
        """All ranks have met: watch the session's calls, and the neighbour. From here on only they are heard (collective)."""
        self._session, self._recorder = session, session.recorder
        if self._board is None or self._waker is None:
            return
        if session.everyone is not None:
            self._roll = call_roll(self._rank, session.everyone, session.device, self._launch.key)
            self._board.reseal(self._roll.key)
            self._waker.reseal(self._roll.key)
        first = self._rank - self._launch.local_rank
        neighbour = first + (self._launch.local_rank + 1) % self._launch.local_world_size
        self._neighbour = None if neighbour == self._rank else self._identity(neighbour)
        if self._served_by_rank_0 and self._rank != 0:
            self._server = self._neighbour if neighbour == 0 else self._identity(0)

    def _identity(self, rank: int) -> Identity | None:
        if self._roll is not None:
            return self._roll.identities[rank]
        text = None if self._board is None else self._board.wait(f"identity/{rank}", STORE_SECONDS)
        return None if text is None else Identity.parse(text)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A TransportError that leaves the body ends the process with an explanation; another error is told to the other ranks."""
        try:
            yield
        except TransportError as error:
            if self._session is not None and self._board is not None and not self._left:
                self.explain(error)
            self.leave(error)
            raise
        except BaseException as error:
            self.leave(error)
            raise

    def explain(self, error: TransportError) -> NoReturn:
        """End this process and every other rank, with a message that names the rank whose death or fault broke the transport."""
        frames = traceback.format_list(traceback.extract_tb(error.__traceback__)[-STACK_FRAMES:])
        self._alarm(State(self._rank, "failed", str(error), stack="".join(frames).rstrip()))

    def leave(self, error: BaseException | None = None) -> None:
        """Report that this rank has finished, so that it is not taken for dead. Without an error, first wait for all to finish."""
        if self._left or self._board is None or self._store_lost.is_set():
            return
        self._left, self._neighbour = True, None
        if error is None and self._session is not None and self._session.everyone is not None:
            try:
                self._session.everyone.barrier()  # the rank that serves the store must not end first
            except TransportError as broken:
                self.explain(broken)
        said = "" if error is None else "".join(traceback.format_exception_only(type(error), error)).strip()
        with suppress(TransportError):  # the store closed just now
            self._write_state(State(self._rank, "left" if error is None else "raised", said))
            self._board.write(f"wake/{self._rank}", "bye")

    def close(self) -> None:
        """End the threads, and the monitor unless it is the process's own, which then waits for that to end."""
        if self._alarmed.locked():
            threading.Event().wait()  # the thread that has raised the alarm ends the process
        self._closing.set()
        for thread in self._threads:
            thread.join(STORE_SECONDS)
        if DUMP_SIGNAL is not None:
            faulthandler.unregister(DUMP_SIGNAL)
        if self._monitor is not None and self._keeps_monitor:
            self._monitor.beat(EXIT_SECONDS, "the end of the process")
        elif self._monitor is not None:
            self._monitor.close()

    def _start(self, name: str, body: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=body, name=f"megatrain-guard-{name}", daemon=True))
        self._threads[-1].start()

    def _open_board(self, ranks: int = 1) -> Board:
        """A connection to the store, opened by `ranks` ranks at the same time. Raises TransportError."""
        address, port = self._launch.master_addr, self._launch.master_port
        if address is None or port is None:
            raise TransportError("a world of several ranks has no rendezvous store: MASTER_ADDR and MASTER_PORT are missing")
        return Board.open(address, port, f"guard/{self._launch.store_prefix}", STORE_SECONDS, ranks, self._key())

    def _key(self) -> bytes:
        return self._launch.key if self._roll is None else self._roll.key

    # --- the threads ------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Thread: once a second, look whether this rank has waited too long, and tell the monitor that this thread still runs."""
        looked = time.monotonic()
        shortest = min(self._limits.start, self._limits.hang, self._limits.save)
        while not self._closing.wait(min(LOOK_SECONDS, shortest / 4)):
            now = time.monotonic()
            wait = WORD_SECONDS if now - looked > LATE_SECONDS else 0.0
            for ended, lasted in [] if self._monitor is None else self._monitor.suspended(wait):
                self._suspensions.add(ended, lasted)
            looked = now = time.monotonic()
            if self._beat() < 0 or self._neighbour_is_gone(now):
                self._alarm(self._own_state())
            if not self._said_where and self._is_told_in_vain(now):
                self._said_where = True
                self._start("where", self._say_where)

    def _beat(self) -> float:
        """Tell the monitor what this rank does and how long it may; returns the seconds that are left of that."""
        left, what = self._left_over(time.monotonic())
        if self._monitor is not None and not self._alarmed.locked():
            self._monitor.beat(max(left, 0.0), what, *self.record())
        return left

    def _left_over(self, now: float) -> tuple[float, str]:
        """Seconds until this rank has waited too long (infinite outside of all sections and calls), and in what."""
        call, section, told = self._recorder.waiting(), self.sections.now(), self.told()
        left, what = float("inf"), "nothing"
        limit = self._limit(call) or (None if call is None else self._limits.of_call)
        if limit is not None:
            since = call.started if call is not None else now if section is None else section.since
            if limit.told and told is not None:
                since = max(since, told)
            left = since + self._suspensions.since(since) + limit.seconds + limit.grace - now
            what = f"{section or call} ({limit})"
        behind = self.background()
        if behind is not None:
            of_save = self._limits.of_save
            left_behind = behind[0] + self._suspensions.since(behind[0]) + of_save.seconds - now
            if left_behind < left:
                left, what = left_behind, f"save at {behind[1]} ({of_save})"
        return left, what

    def _limit(self, call: Call | None) -> Limit | None:
        """The limit of the section. In a save, a rank that waits for others does not know how long theirs usually takes."""
        section = self.sections.now()
        waits = call is not None and section is not None and section.name == "save"
        return self.sections.limit(self.told() is not None and not waits)

    def _is_told_in_vain(self, now: float) -> bool:
        """Whether this rank was told to stop, and has come no further since."""
        section, told = self.sections.now(), self.told()
        return told is not None and now - max(told, told if section is None else section.since) > WHERE_SECONDS

    def _say_where(self) -> None:
        """Thread: the first rank says where all are that were told, and goes on."""
        own, states = self._own_state(), {}
        with suppress(TransportError):  # then of itself alone
            if self._board is not None:
                self._board.write(f"where/{self._rank}", own.text())
                if self._board.claim("where", str(self._rank)) != str(self._rank):
                    return
                self._closing.wait(STATES_SECONDS)
                said = self._board.read_all([f"where/{rank}" for rank in range(self._size)])
                states = {state.rank: state for state in map(State.parse, said.values())}
        states[self._rank] = own
        text = shown(places(states, self._size, self._keep_stacks(states)))
        say(f"megatrain: told to stop, but come no further for {WHERE_SECONDS:g} s\n    " + text.replace("\n", "\n    "))
        if self.on_event is not None:
            self.on_event("stopping", None, text)

    def _neighbour_is_gone(self, now: float) -> bool:
        """Whether the next rank of this machine has died, without a word."""
        neighbour = self._neighbour
        if neighbour is None or neighbour.condition() != "gone":
            self._gone_since = None
            return False
        self._gone_since = self._gone_since or now
        return now - self._gone_since > GONE_SECONDS

    def _await_alarm(self) -> None:
        """Thread: block until another rank raises the alarm, or this rank leaves."""
        if self._waker is None:
            return
        try:
            text = self._waker.wait(f"wake/{self._rank}")
        except TransportError:
            self._store_lost.set()  # its server is gone; ranks that wait for that process find out
            return
        if text == "alarm":
            self._alarm(self._own_state())

    def _own_state(self) -> State:
        now, section, call = time.monotonic(), self.sections.now(), self._recorder.waiting()
        stack = stack_of(self._main.ident)
        if section is not None and section.name == "data" and (read := stack_of(self.reader())):
            stack += f"\nand its thread that makes the batch is at\n{read}"
        place, issued = str(section or ""), self._recorder.issued()
        behind, limit = self.background(), self._limits.of_save
        if behind is not None and now - behind[0] > limit.seconds / 2:
            detail = f"save at {behind[1]} ({limit})"
            return State(self._rank, "blocked", detail, seconds=now - behind[0], stack=stack, issued=issued)
        if call is not None:
            return State.waiting(
                self._rank, call, now, stack, issued, "" if section is None or section.name == "step" else place
            )
        seconds = 0.0 if section is None else now - section.since
        detail = "" if section is None else f"{place} ({self._limit(call)})"
        return State(self._rank, "busy", detail, seconds=seconds, stack=stack, issued=issued)

    def _alarm(self, state: State) -> NoReturn:
        """Raise the alarm or follow it; end the process. If several threads call this, the first does it and the others block."""
        if not self._alarmed.acquire(blocking=False):
            threading.Event().wait()
        if self._monitor is not None:
            self._monitor.beat(ALARM_SECONDS, "the end of a run that hangs", *self.record())
        try:
            verdict, speaker = self._agree_on_verdict(state)
        except TransportError as error:
            verdict, speaker = self._blame_server(state, error), state.rank == min({*state.ranks, self._size - 1} - {0})
        self._end(state, verdict, speaker)

    def _agree_on_verdict(self, state: State) -> tuple[Verdict, bool]:
        """The verdict, and whether this rank reached it. Raises TransportError if the store does not answer."""
        if self._size == 1:
            return judge({state.rank: state}, {}, 1), True
        if self._server is not None and self._server.condition() in ("gone", "stopped"):
            raise TransportError(f"{self._server} is {self._server.condition()}")
        board, fresh = self._write_state(state)
        try:
            return self._verdict_at(board)
        except TransportError:
            if fresh:
                raise
        return self._verdict_at(self._write_anew(state))  # a connection may fail where the store does not

    def _verdict_at(self, board: Board) -> tuple[Verdict, bool]:
        """The verdict of the first rank to raise the alarm; this rank's if it is that one, or nothing is heard. Raises TransportError."""
        if board.claim("judge", str(self._rank)) != str(self._rank):
            text = board.wait("verdict", VERDICT_SECONDS)
            if text is not None:
                return Verdict.parse(text), False
        board.write_all([f"wake/{rank}" for rank in range(self._size)], "alarm")
        verdict = self._reach_verdict(board)
        board.write("verdict", verdict.as_json())
        return verdict, True

    def _write_state(self, state: State) -> tuple[Board, bool]:
        """Write this rank's state; returns the board that it was written to, and whether that is a fresh one. Raises TransportError."""
        if self._board is not None:
            try:
                self._board.write(f"state/{state.rank}", state.text())
                return self._board, False
            except TransportError:
                if self._session is None:  # just opened: another would fare no better
                    raise
        return self._write_anew(state), True  # the network may have dropped a connection that was idle for days

    def _write_anew(self, state: State) -> Board:
        """Write this rank's state over a connection made now. Raises TransportError."""
        board = within(STORE_SECONDS, self._open_board, STORE)
        board.write(f"state/{state.rank}", state.text())
        return board

    def _reach_verdict(self, board: Board) -> Verdict:
        """Judge the states that ranks write within STATES_SECONDS. Raises TransportError."""
        keys = [f"state/{rank}" for rank in range(self._size)]
        began, looked = time.monotonic(), False
        while True:
            waited = time.monotonic() - began
            if waited > STATES_SECONDS or board.complete(keys) or (waited > SURE_SECONDS and not looked):
                looked = looked or waited > SURE_SECONDS
                states, silent, overwritten = self._heard(board, keys)
                ended = {rank for rank, one in silent.items() if one.condition() in ("gone", "stopped")}
                if waited > STATES_SECONDS or len(states) + len(ended) == self._size:
                    hidden = {rank: State(rank, "overwritten") for rank in overwritten if rank not in ended}
                    return judge(states | hidden, silent, self._size, self._keep_stacks(states))
            time.sleep(0.1)

    def _keep_stacks(self, states: dict[int, State]) -> str:
        """The file in log.dir with the stacks of all ranks, written where they are too many to be shown; empty if there is none."""
        step, events = self.record()
        found = stacks(states)
        if not events or len(found) <= SHOWN:
            return ""
        file = Path(events).with_name(f"stacks_step_{step:08d}.txt")
        lines = shown("\n".join(written_out(found)) + "\n")
        kept = Ahead("megatrain-guard-stacks", lambda: file.write_text(lines))
        kept.join(STORE_SECONDS)  # perhaps the disk is what does not answer
        return str(file) if kept.succeeded() else ""

    def _heard(self, board: Board, keys: list[str]) -> tuple[dict[int, State], dict[int, Identity], list[int]]:
        """States that ranks have written so far, and identities of the others, by rank; the ranks in whose place a stranger wrote.

        Raises TransportError.
        """
        texts = board.look(keys)
        states = {rank: State.parse(text) for rank, key in enumerate(keys) if (text := texts.get(key)) is not None}
        missing = [rank for rank in range(self._size) if rank not in states]
        overwritten = [rank for rank in missing if keys[rank] in texts]
        if self._roll is not None:
            return states, {rank: self._roll.identities[rank] for rank in missing}, overwritten
        silent = board.read_all([f"identity/{rank}" for rank in missing])
        identities = [Identity.parse(text) for text in silent.values()]
        return states, {identity.rank: identity for identity in identities}, overwritten

    def _is_ours(self, identity: Identity) -> bool:
        """Whether a process named in the store is a rank's for sure: it answered the roll, or, before that, knew the secret."""
        return bool(self._launch.secret) if self._roll is None else self._roll.has(identity)

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
        """Tell the verdict, end processes that cannot end by themselves, exit with 1, whatever comes between."""
        try:
            self._tell(state, verdict, speaker)
        finally:
            os._exit(1)

    def _tell(self, state: State, verdict: Verdict, speaker: bool) -> None:
        """Print the verdict, call `on_event`, kill processes that cannot end by themselves."""
        named = ", ".join(str(rank) for rank in verdict.culprits[:8]) or "none"
        text = verdict.text.replace("\n", "\n    ")
        own = "" if str(state) in verdict.text or state.rank in verdict.culprits else f"\n    this {state}"
        say(shown(f"megatrain: rank {state.rank} ends after a {verdict.kind}; to blame: rank {named}\n    {text}{own}"))
        if speaker and self.on_event is not None:
            culprit = verdict.culprits[0] if len(verdict.culprits) == 1 else None
            callback = threading.Thread(target=self.on_event, args=(verdict.kind, culprit, shown(verdict.text)), daemon=True)
            callback.start()
            callback.join(STORE_SECONDS)
        for identity in filter(self._is_ours, verdict.kill):
            if identity.condition() == "running" and DUMP_SIGNAL is not None:  # stuck in C, perhaps: where?
                if speaker:
                    identity.send(DUMP_SIGNAL)
                time.sleep(DUMP_SECONDS)
            if identity.send(signal.SIGKILL):
                say(f"megatrain: rank {state.rank} killed {identity}, which could not end by itself")
        if self._served_by_rank_0 and state.rank == 0:
            time.sleep(LINGER_SECONDS)


def file_of(thread: int | None) -> str:
    """The file that a thread is at: that of the innermost object or call at work in it which has one; empty if none is near."""
    frame = sys._current_frames().get(thread or 0)
    for _ in range(STACK_FRAMES):
        if frame is None:
            break
        inside = frame.f_locals
        for found in (inside.get("path"), *(getattr(inside.get("self"), name, None) for name in ("path", "bin_path"))):
            if isinstance(found, Path):
                return str(found)
        frame = frame.f_back
    return ""


def stack_of(thread: int | None) -> str:
    """The innermost frames of a thread, innermost last; empty if it has ended. Below a call of the transport, which is told beside it, no
    more.
    """
    frame = sys._current_frames().get(thread or 0)
    frames = [] if frame is None else list(traceback.extract_stack(frame))
    while len(frames) > 1 and {Path(of.filename).parent for of in frames[-2:]} == {_TRANSPORT}:
        frames.pop()
    return "".join(traceback.format_list(frames[-STACK_FRAMES:])).rstrip()
