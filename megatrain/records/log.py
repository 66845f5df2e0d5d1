"""Records of a run: metrics.jsonl, events.jsonl, TensorBoard, console lines. Rank 0 writes them.

Every line of the two .jsonl files is one JSON object, written in one call to a file opened for appending, so that several
processes may write events to one file and a killed run leaves whole lines. JSON has no NaN: a value that is not finite is null,
and the row then has `nonfinite` with the value as text: {"step": 7, "loss": null, ..., "nonfinite": {"loss": "nan"}}.

Records matter less than the run. A directory that cannot be written is an error at the start; later, a full disk gives one
warning, training goes on, and lines are written again once there is space.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from megatrain.files import open_own, require_own, shown, whole
from megatrain.records.progress import StepBar, person_watching
from megatrain.records.rows import ComputeRow, EvaluationRow, StepRow, TasksRow, finite, perplexity, read_metrics
from megatrain.records.samples_page import SamplesRow, add_samples, as_markdown, console_lines
from megatrain.stderr import note

if TYPE_CHECKING:
    from megatrain.records.tensorboard import TensorBoard

EventKind = Literal[
    "start",
    "resume",
    "restart",
    "damaged_checkpoint",
    "save",
    "save_failed",
    "skipped",
    "tasks",
    "bad_evaluation",
    "spike",
    "rollback",
    "skip_data",
    "diverged",
    "audit",
    "stopping",
    "hang",
    "death",
    "slow",
    "signal",
    "end",
]


IN_FLIGHT_SECONDS = 0.05
"""Time in which a write of one line by another process, which takes microseconds, has made progress."""


class JsonLines:
    """A file of JSON objects, one a line, to which several processes may append."""

    def __init__(self, path: Path) -> None:
        """Open or create `path`. After an incomplete last line (a crash of the machine) the next record begins a new line. Raises
        OSError.
        """
        self.path = path
        self._file = open_own(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        self._broken = self._ends_within_a_line()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line in one call, so that lines of other processes cannot mix with it. Raises OSError."""
        line = (json.dumps(finite(record), default=str) + "\n").encode()
        if self._broken:
            line = b"\n" + line
        written = os.write(self._file, line)
        self._broken = written < len(line)
        if self._broken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def gone(self) -> bool:
        """Whether the file was removed, or replaced by another, so that what is appended is lost."""
        try:
            return not os.path.samestat(self.path.lstat(), os.fstat(self._file))
        except OSError:
            return True

    def open_again(self) -> None:
        """Open `path` anew, with its directory. Raises OSError, and then goes on with the file that was removed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = JsonLines(self.path)
        os.close(self._file)
        self._file, self._broken = new._file, new._broken

    def close(self) -> None:
        """Close the file; it must not be used afterwards."""
        os.close(self._file)

    def _ends_within_a_line(self) -> bool:
        """Whether the last line is incomplete. Waits while the file grows, as another process may be writing its line page by page."""
        size = -1
        while (now := os.fstat(self._file).st_size) != size:
            size = now
            if size == 0 or os.pread(self._file, 1, size - 1) == b"\n":
                return False
            time.sleep(IN_FLIGHT_SECONDS)
        return True


class LogDisplay(NamedTuple):
    """Settings of the console, and which writers a log has beside its .jsonl files."""

    every: int = 1
    """Steps between console lines (log.every)."""
    writers: Sequence[str] = ("tensorboard",)
    """Other writers of the numbers (log.to)."""
    watched: bool | None = None
    """Whether a progress bar is drawn; None: where stderr is a terminal."""


class RunLog:
    """All records of a run. Every rank has one; ranks other than 0 write events only."""

    def __init__(
        self,
        log_dir: Path | str,
        shown: LogDisplay | None = None,
        *,
        total_steps: int,
        sequence_length: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        lost: Callable[[], str] = str,
    ) -> None:
        """Open the files of a run that has done `start_step` of `total_steps` updates.

        lost: why `log_dir` is not this run's any more, asked on rank 0 where it was removed; "" while it is.

        Raises OSError, on rank 0, where `log_dir` cannot be written.
        """
        every, writers, watched = shown or LogDisplay()
        if every < 1:
            raise ValueError(f"log.every={every} is no number of steps. Use 1 for a console line at each step, or 100.")
        self.directory = Path(log_dir)
        self._rank, self._every, self._first, self._total = rank, every, start_step + 1, total_steps
        self._lost, self._given_up = lost, False
        self._warned: set[str] = set()
        self._metrics: JsonLines | None = None
        self._events: JsonLines | None = None
        self._tensorboard: TensorBoard | None = None
        self._bar: StepBar | None = None
        self._compute: ComputeRow | None = None
        if rank != 0:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._metrics = JsonLines(self.directory / "metrics.jsonl")
            self._events = JsonLines(self.directory / "events.jsonl")
            if "tensorboard" in writers:
                self._curves = partial(self._open_tensorboard, sequence_length, world_size)
                self._if_installed("tensorboard", self._curves, start_step)
        except OSError as error:
            reason = f"log.dir={log_dir} cannot be written ({error.strerror or error})."
            said = f"{reason} Set log.dir to a directory of your own, such as /tmp/run."
            raise (OSError(said) if error.errno is None else OSError(error.errno, said)) from error
        if person_watching() if watched is None else watched:
            self._if_installed("progress bar", self._open_bar, start_step)

    def step(self, row: StepRow) -> None:
        """Record one update. The console shows the first, every `every`-th, the last, and any that was skipped or not finite."""
        if self._rank != 0:
            return
        self._append(self._metrics, asdict(row))
        if self._tensorboard is not None:
            self._try("tensorboard", self._tensorboard.step, asdict(row))
        if self._bar is not None:
            self._bar.update(row.step, row.loss, row.tokens_per_second)
        wrong = row.skipped or not math.isfinite(row.loss)
        if row.step % self._every == 0 or row.step in (self._first, self._total) or wrong:
            self.say(step_line(row, self._total, self._compute))

    def evaluation(self, row: EvaluationRow) -> None:
        """Record one evaluation."""
        if self._rank != 0:
            return
        self._append(self._metrics, asdict(row))
        if self._tensorboard is not None:
            self._try("tensorboard", self._tensorboard.evaluation, asdict(row))
        self.say(evaluation_lines(row))

    def samples(self, row: SamplesRow) -> None:
        """Record what the model wrote: on the page samples.md, in TensorBoard, and in few lines on the console."""
        if self._rank != 0 or self._given_up:
            return
        self._try("samples.md", add_samples, self.directory / "samples.md", row)
        if self._tensorboard is not None:
            texts = {f"samples/{number}": as_markdown(of) for number, of in enumerate(row.samples, 1)}
            self._try("tensorboard", self._tensorboard.texts, row.step, texts)
        self.say(console_lines(row))

    def tasks(self, row: TasksRow, document: Callable[[], Mapping[str, Any]]) -> None:
        """Record what the model made of tasks; document: makes the whole results, for a file of their own."""
        if self._rank != 0:
            return
        name = f"tasks/step_{row.tasks_of_step:08d}.json"
        self.write(name, document())
        self._append(self._metrics, asdict(row))
        if self._tensorboard is not None:
            self._try("tensorboard", self._tensorboard.tasks, asdict(row))
        self.event("tasks", row.tasks_of_step, file=str(self.directory / name), seconds=round(row.task_seconds, 3))
        self.say(tasks_line(row))
        self._if_installed("tasks.png", self._try, "tasks.png", self._draw_tasks)

    def norms(self, step: int, parts: Mapping[str, tuple[float, float]]) -> None:
        """Record the norms of gradients and weights of each part of the model at update `step`, before it is applied."""
        if self._rank != 0:
            return
        named = {f"{kind}-norm/{part}": pair[i] for part, pair in parts.items() for i, kind in enumerate(("grad", "weight"))}
        self._append(self._metrics, {"norms_of_step": step, **named})
        if self._tensorboard is not None:
            self._try("tensorboard", self._tensorboard.scalars, step, named)

    def compute(self, row: ComputeRow) -> None:
        """Record the ranks' own times in an interval; later lines of the console have them."""
        if self._rank != 0:
            return
        self._compute = row
        self._append(self._metrics, asdict(row))
        if self._tensorboard is not None:
            self._try("tensorboard", self._tensorboard.compute, asdict(row))

    def event(self, kind: EventKind, step: int | None = None, rank: int | None = None, **fields: Any) -> None:
        """Append an event; `rank` is the rank that caused it. Any rank and any thread may call."""
        record: dict[str, Any] = {
            "event": kind,
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "step": step,
        }
        if rank is not None:
            record["rank"] = rank
        if self._events is None:
            self._try("events.jsonl", self._open_events)
        self._append(self._events, {**record, **fields})

    def say(self, text: str) -> None:
        """Print lines on stdout, above the progress bar if there is one, without terminal codes; rank 0 only."""
        if self._rank != 0:
            return
        text = shown(text)  # a checkpoint or another host may have said what stands there
        if self._bar is not None and sys.stdout.isatty():
            self._bar.print(text)
        else:
            self._try("stdout", _print, text)

    def write(self, name: str, tree: Mapping[str, Any]) -> None:
        """Write a file of its own, as JSON; rank 0 only."""
        if self._rank == 0:
            self._try(name, self._write, self.directory / name, tree)

    def draw(self, references: Mapping[str, float] | None = None) -> None:
        """Redraw loss.png from metrics.jsonl, with horizontal lines at `references` (nats); rank 0 only."""
        if self._rank == 0:
            self._if_installed("loss.png", self._try, "loss.png", self._draw, references or {})

    def went_back(self, step: int) -> None:
        """Let TensorBoard forget what came after `step`, as a resume does; in metrics.jsonl the last row of a step counts anyway."""
        if self._tensorboard is not None:
            self._try("tensorboard", self._tensorboard.close)
            self._try("tensorboard", self._curves, step)

    def close(self) -> None:
        """Take down the bar, flush and close the files. May be called twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._tensorboard is not None:
            self._try("tensorboard", self._tensorboard.close)
            self._tensorboard = None
        for file in (self._metrics, self._events):
            if file is not None:
                file.close()
        self._metrics = self._events = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open_tensorboard(self, sequence_length: int, world_size: int, start_step: int) -> None:
        from megatrain.records.tensorboard import TensorBoard  # noqa: PLC0415  (0.3 s that only rank 0 need spend)

        self._tensorboard = TensorBoard(self.directory / "tensorboard", sequence_length, world_size, start_step)
        if start_step > 0:
            self._tensorboard.restore(*read_metrics(self.directory / "metrics.jsonl"))

    def _open_bar(self, start_step: int) -> None:
        self._bar = StepBar(self._total, start_step)

    def _open_events(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._events = JsonLines(self.directory / "events.jsonl")

    def _draw(self, references: Mapping[str, float]) -> None:
        from megatrain.records.plot import draw_loss  # noqa: PLC0415  (0.5 s that only rank 0 need spend)

        require_own(self.directory / "loss.png")
        draw_loss(self.directory / "metrics.jsonl", self.directory / "loss.png", references)

    def _draw_tasks(self) -> None:
        from megatrain.records.tasks_plot import draw_tasks  # noqa: PLC0415  (0.5 s that only rank 0 need spend)

        require_own(self.directory / "tasks.png")
        draw_tasks(self.directory / "metrics.jsonl", self.directory / "tasks.png")

    def _write(self, path: Path, tree: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_own(path)
        with whole(path, text=True) as file:
            file.write(json.dumps(finite(tree)) + "\n")

    def _append(self, file: JsonLines | None, record: Mapping[str, Any]) -> None:
        if file is None or self._given_up:
            return
        if file.gone():
            self._try(file.path.name, self._make_again, file)
        if not self._given_up:
            self._try(file.path.name, file.append, record)

    def _make_again(self, file: JsonLines) -> None:
        """Go on in new files where log.dir, or one of them, was removed; not where another run has the directory now."""
        why = self._lost() if self._rank == 0 else ""
        self._warn("log.dir", why or f"{file.path} was removed while the run goes on; from here on it is written anew")
        self._given_up = bool(why)
        if self._given_up:
            return
        file.open_again()
        if self._tensorboard is not None and not self._tensorboard.directory.is_dir():
            self._tensorboard.close()
            self._curves(0)

    def _try(self, what: str, write: Callable[..., None], *args: Any) -> None:
        """Call `write`; on OSError print one warning on stderr."""
        try:
            write(*args)
        except OSError as error:
            self._warn(what, f"{what} of {self.directory} cannot be written ({error.strerror or error})")

    def _if_installed(self, what: str, call: Callable[..., None], *args: Any) -> None:
        """Make something that needs an optional package; if that is missing, print one warning on stderr."""
        try:
            call(*args)
        except ImportError as error:
            package = (error.name or what).partition(".")[0]
            self._warn(what, f"no {what}, since {package} cannot be imported (pip install {package})")

    def _warn(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            note(f"warning: {text}; training goes on")


def step_line(row: StepRow, total_steps: int, compute: ComputeRow | None = None) -> str:
    """One update as a line in Megatron's format: `step 200/1000 | loss: 2.3456E+00 | grad norm: 0.812 | ... |`.

    compute: the ranks' own times in the last interval of which they are known.
    """
    parts = [
        f"step {row.step}/{total_steps}",
        f"loss: {row.loss:.4E}",
        f"grad norm: {row.grad_norm:.3f}",
        f"learning rate: {row.learning_rate:.3E}",
        f"tokens/s: {row.tokens_per_second:.0f}",
        f"step time (ms): {1000 * row.step_seconds:.1f}",
        f"TFLOP/s per device: {row.tflops_per_device:.3f}",
    ]
    if row.mfu is not None:
        parts.append(f"mfu: {100 * row.mfu:.1f}%")
    if compute is not None:
        ratio = compute.slowest_ratio
        slowest = "" if math.isnan(ratio) else f", rank {compute.slowest_rank} on {compute.slowest_host} {ratio:.2f}x"
        parts.append(
            f"compute (ms): {1000 * compute.compute_seconds_min:.1f} to {1000 * compute.compute_seconds_max:.1f}{slowest}"
        )
    if row.skipped:
        parts.append("skipped")
    return " | ".join(parts) + " |"


def evaluation_lines(row: EvaluationRow) -> str:
    """One evaluation in Megatron's format, between dashed lines."""
    parts = [
        f"validation loss at step {row.step}",
        f"lm loss value: {row.valid_loss:.6E}",
        f"lm loss PPL: {perplexity(row.valid_loss):.6E}",
    ]
    if row.valid_token_accuracy is not None:
        parts.append(f"token accuracy: {100 * row.valid_token_accuracy:.2f}%")
    if row.cloze_accuracy is not None:
        parts.append(f"blanks right: {100 * row.cloze_accuracy:.2f}%")
    lines = [" | ".join(parts) + " |"]
    lines += [
        f"{name}: lm loss value: {loss:.6E} | lm loss PPL: {perplexity(loss):.6E} |" for name, loss in row.valid_losses.items()
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join((rule, *lines, rule))


def tasks_line(row: TasksRow) -> str:
    """The tasks of one step, each with its first metric and its 95% interval: `quiz_en: acc 0.51 (0.38 to 0.64)`."""

    def text(number: float | None) -> str:
        return "not finite" if number is None else f"{number:.4g}"

    parts = [f"tasks at step {row.tasks_of_step}"]
    for name, metrics in row.tasks.items():
        first = next(iter(metrics))
        low, high = row.tasks_low[name][first], row.tasks_high[name][first]
        parts.append(f"{name}: {first} {text(metrics[first])} ({text(low)} to {text(high)})")
    return " | ".join([*parts, f"seconds: {row.task_seconds:.1f}"]) + " |"


def _print(text: str) -> None:
    """Print with one write, so that lines of several processes do not mix."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
