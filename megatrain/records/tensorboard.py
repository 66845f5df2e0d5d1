"""TensorBoard under Megatron's tag names, so that charts made for Megatron runs also show a run of megatrain.

Megatron draws most values twice, over steps and over samples (`lm loss`, `lm loss vs samples`). A resume must remove the points that
will be written again. TensorBoard removes, for all tags, all points at or beyond one step number. Numbers of samples are larger
than step numbers, so the curves over samples would be removed too; they are written again from metrics.jsonl.

Event formats are those of the tensorboard package; the file is written here, a record in one call without a thread, so that a
killed run loses nothing and a full disk raises at once.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import DataClass, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DataType
from tensorboard.summary.writer.record_writer import RecordWriter

from megatrain.files import open_own
from megatrain.records.rows import perplexity

RESTORED_ROWS = 4000
"""Most rows written again on a resume, evenly spaced; TensorBoard itself shows 1000 points of a scalar by default."""

_NAME = "events.out.tfevents."
"""The beginning of an event file's name."""

Row = Mapping[str, Any]


class TensorBoard:
    """Writes rows of metrics.jsonl as scalars."""

    def __init__(
        self, directory: Path, sequence_length: int, world_size: int, start_step: int = 0, *, restart: bool = True
    ) -> None:
        """Start an event file in `directory`. restart: whether earlier points after `start_step` are removed. Raises OSError."""
        self._sequence_length, self._world_size, self._start_step = sequence_length, world_size, start_step
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        name = f"{_NAME}{max(time.time_ns() // 10**6, _newest(directory) + 1):013d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open_own(directory / name)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if restart:  # at step 0 too, where a run begins anew or goes back to
            session = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=start_step + 1, session_log=session))

    def step(self, row: Row) -> None:
        """Write one update. Raises OSError if the disk is full."""
        self.scalars(
            row["step"],
            {
                **_training(row),
                "batch-size": round(row["tokens_per_second"] * row["step_seconds"] / self._sequence_length),
                "world-size": self._world_size,
                "iteration-time": row["step_seconds"],
                "throughput": row["tflops_per_device"],
                "mem-max-allocated-bytes": row["memory_peak_bytes"],
            },
        )
        self._over_samples(row, _training(row))

    def evaluation(self, row: Row) -> None:
        """Write one evaluation. Raises OSError if the disk is full."""
        self.scalars(row["step"], _validation(row))
        self._over_samples(row, _validation(row))

    def compute(self, row: Row) -> None:
        """Write the ranks' own times in an interval. Raises OSError if the disk is full."""
        values = {f"compute-time/{which}": row[f"compute_seconds_{which}"] for which in ("min", "median", "max")}
        self.scalars(
            row["compute_of_step"], values | {"slowest-ratio": row["slowest_ratio"], "slowest-rank": row["slowest_rank"]}
        )

    def tasks(self, row: Row) -> None:
        """Write what the model made of tasks, under the names that `megatrain eval --tasks` gives. Raises OSError if the disk is full."""
        values = {f"eval/{task}/{metric}": value for task, metrics in row["tasks"].items() for metric, value in metrics.items()}
        self.scalars(row["tasks_of_step"], values)

    def restore(self, steps: Sequence[Row], evaluations: Sequence[Row]) -> None:
        """Write again, from the rows of a run, the points over samples that the resume removed. Raises OSError."""
        for all_rows, values in ((steps, _training), (evaluations, _validation)):
            rows = [row for row in all_rows if row["step"] <= self._start_step < self._samples(row)]
            stride = max(1, -(-len(rows) // RESTORED_ROWS))
            for row in rows[::stride]:
                self._over_samples(row, values(row))

    def close(self) -> None:
        """Close the file; it must not be used afterwards."""
        os.close(self._file)

    def _samples(self, row: Row) -> int:
        return int(row["tokens"]) // self._sequence_length

    def _over_samples(self, row: Row, values: Mapping[str, float | None]) -> None:
        self.scalars(self._samples(row), {f"{tag} vs samples": value for tag, value in values.items()})

    def scalars(self, at: int, values: Mapping[str, float | None]) -> None:
        """Write points at a step (or number of samples); None is left out. Raises OSError if the disk is full."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if value is not None]
        self._write(Event(wall_time=time.time(), step=at, summary=Summary(value=points)))

    def texts(self, at: int, texts: Mapping[str, str]) -> None:
        """Write texts in Markdown at a step. Raises OSError if the disk is full."""
        plugin = SummaryMetadata.PluginData(plugin_name="text")
        about = SummaryMetadata(plugin_data=plugin, data_class=DataClass.DATA_CLASS_TENSOR)
        points = [
            Summary.Value(tag=tag, metadata=about, tensor=TensorProto(dtype=DataType.DT_STRING, string_val=[text.encode()]))
            for tag, text in texts.items()
        ]
        self._write(Event(wall_time=time.time(), step=at, summary=Summary(value=points)))

    def _write(self, event: Event) -> None:
        """Append one whole record or nothing: readers stop for good at an incomplete record."""
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        data = record.getvalue()
        before = os.fstat(self._file).st_size
        if os.write(self._file, data) < len(data):
            os.ftruncate(self._file, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _newest(directory: Path) -> int:
    """The largest time in the names of a directory's event files, in milliseconds: readers take files in the order of their names, so a
    clock that was set back must not put a later file first.
    """
    times = (path.name.removeprefix(_NAME).partition(".")[0] for path in directory.glob(f"{_NAME}*"))
    return max((int(of) for of in times if of.isdecimal()), default=0)


def _training(row: Row) -> dict[str, float | None]:
    """Megatron's tags that are drawn over steps and over samples; None where metrics.jsonl has null."""
    values = {"lm loss": row["loss"], "grad-norm": row["grad_norm"], "learning-rate": row["learning_rate"]}
    return values | {"loss-scale": row.get("loss_scale")}


def _validation(row: Row) -> dict[str, float | None]:
    loss = row["valid_loss"]
    together = {"lm loss validation": loss, "lm loss validation ppl": None if loss is None else perplexity(loss)}
    return together | {f"lm loss validation/{name}": of for name, of in row.get("valid_losses", {}).items()}
