"""Audits of a run as it goes on: state that changes in updates alone, copies that are equal, computations that can be repeated.

at every update                   sums of the bits of what this rank owns, after it and before the next one (optim/state_watch.py)
train.audit_every, and a save     what those have seen, over all ranks, so that no checkpoint keeps what a device has changed by itself
train.audit_every                 copies of parameters, masters and states (optim/audit.py)
both                              numbers that all ranks have alike besides the tensors (numbers.py)
train.audit_compute_every         a micro-batch computed twice (rerun.py)

An error ends the run on every rank, and names the ranks to blame, their hosts and the tensors; before that it is told, to be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from megatrain.numbers import compare, numbers_of
from megatrain.optim.audit import AuditError, audit
from megatrain.optim.state_watch import StateWatch, watched_every
from megatrain.rerun import kind_here, recompute, repeatable
from megatrain.resuming.resume import progress_of
from megatrain.runtime.flops import model_flops_per_token
from megatrain.runtime.rounding import unlike
from megatrain.training import Run
from megatrain.transport.consensus import gather_texts


class Auditor:
    """The audits of one run, as a context manager around its loop; without train.audit_every and train.audit_compute_every none."""

    def __init__(
        self,
        run: Run,
        tell: Callable[[AuditError], None] = lambda error: None,
        kept: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """tell: called on every rank with the error that is about to end the run. kept: what a checkpoint keeps besides tensors; None: of
        a run that lives in no process of its own.
        """
        config = run.config
        self.run, self._tell, self._kept = run, tell, partial(progress_of, run) if kept is None else kept
        self.watch = StateWatch(run.flat, run.optimizer) if config.train.audit_every else None
        tokens = config.train.global_batch_size * config.model.seq_length / run.ctx.world.size
        flops = tokens * model_flops_per_token(config.model, run.chunks[0].build.vocab_size)
        self.every = 1 if self.watch is None else watched_every(self.watch.nbytes, flops, run.ctx.device)
        """Steps between those whose result is watched."""
        self._looked = False
        """Whether `check` has looked since the last update."""

    def notes(self) -> list[str]:
        """Lines for the log on what is not looked at, or not always (collective)."""
        found = []
        if self.every > 1:
            found.append(
                f"audit: state is watched between updates in 1 of {self.every} steps, as a step is short beside it; larger batches "
                "(train.global_batch_size) have it watched in all"
            )
        ctx = self.run.ctx
        kinds = unlike(gather_texts(kind_here(self.run), ctx.world.group, ctx.device))
        if not self.run.config.train.audit_compute_every:
            return found
        if kinds:
            found.append(f"audit: {kinds}; results are compared between ranks that are alike alone (train.audit_compute_every)")
        if not repeatable(self.run):
            found.append(
                "audit: computations are not repeated (train.audit_compute_every), as they only give the same bits on this device with "
                "train.deterministic=true"
            )
        return found

    def updated(self) -> None:
        """An update is queued: remember its result."""
        self._looked = False
        if self.watch is not None and self.run.step % self.every == 0:
            self.watch.after_update(self.run.step)

    def check(self, *, copies: bool) -> None:
        """Look what was seen since the last time and, with `copies`, compare all copies (collective). Raises ReplicaError on every rank."""
        if self.watch is not None and (copies or not self._looked):
            self._looked = True
            with self._telling():
                compare(numbers_of(self.run, self._kept()), self.run.ctx)
                audit(self.run.flat, self.run.optimizer, self.run.ctx, self.watch, copies=copies)

    def recompute(self) -> None:
        """Compute a micro-batch twice, where that gives the same bits (collective). Raises ComputeError on every rank."""
        if repeatable(self.run):
            with self._telling():
                recompute(self.run)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except AuditError as error:
            self._tell(error)
            raise

    def _before(self, run: Run) -> None:
        """Observes the run before its updates."""
        if self.watch is not None:
            self.watch.before_update(run.step)

    def __enter__(self) -> Auditor:
        if self.watch is not None:
            self.watch.after_update(self.run.step)
        self.run.observers.before_update.append(self._before)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.run.observers.before_update.remove(self._before)
