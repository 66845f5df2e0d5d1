"""Layouts as data: their names, all layouts on up to some number of ranks, and small sets that cover all combinations.

A name lists the differences from one process, joined by `-`:

    single      tp2-sp      pp4-zb_h1      tp2-sp-pp2-interleaved:2-dp2-zero3      dp4-zero2-split      dp4-zero3:2
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import gcd
from typing import Any, Literal, TypeVar

from megatrain.config.schema import Config, TrainConfig
from megatrain.config.source import ConfigError
from megatrain.config.validate import validate_layout
from megatrain.parallel.flat import usual_size
from megatrain.parallel.mesh import MeshShape
from megatrain.parallel.schedules import FAMILIES, chunks_problem

BATCHES = ("global_batch_size", "micro_batch_size", "batch_ramp")
"""Keys of the train section that determine which sequences form a batch."""
USUAL_CHUNKS = {"interleaved": 2, "zb_v": 2}
"""Schedule -> its default number of chunks a stage; 1 for all others."""


@dataclass(frozen=True)
class Layout:
    """One way to lay a model out over ranks."""

    tp: int = 1
    sequence_parallel: bool = False
    pp: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    dp: int = 1
    zero: int = 1
    master: Literal["fp32", "split"] = "fp32"
    zero_ranks: int | None = None
    """Number of replicas that share one set of shards; None: all."""

    @property
    def shape(self) -> MeshShape:
        """The layout's mesh."""
        return MeshShape(tp=self.tp, dp=self.dp, pp=self.pp, zero_ranks=self.zero_ranks)

    def __str__(self) -> str:
        """The layout's name."""
        parts = [f"tp{self.tp}"] * (self.tp > 1) + ["sp"] * self.sequence_parallel + [f"pp{self.pp}"] * (self.pp > 1)
        if self.pp > 1 or self.schedule != "1f1b":
            usual = self.chunks == USUAL_CHUNKS.get(self.schedule, 1)
            parts.append(self.schedule if usual else f"{self.schedule}:{self.chunks}")
        zero = f"zero{self.zero}" if self.zero_ranks is None else f"zero{self.zero}:{self.zero_ranks}"
        parts += [f"dp{self.dp}", zero] * (self.dp > 1) + ["split"] * (self.master == "split")
        return "-".join(parts) or "single"

    @classmethod
    def parse(cls, name: str) -> Layout:
        """The layout that a name describes. Raises ValueError that quotes the part that is not understood."""
        found: dict[str, Any] = {}
        for part in [] if name == "single" else name.split("-"):
            found |= _part(part, name)
        return cls(**found)

    def apply(self, config: Config) -> Config:
        """`config` with this layout. Micro-batches become smaller if a replica's share of the global batch needs it and they are not part
        of the data.
        """
        given, train = config.parallel, config.train
        fits = given.layer_split is not None and len(given.layer_split) == self.pp * self.chunks
        parallel = replace(
            given,
            tensor_parallel_size=self.tp,
            sequence_parallel=self.sequence_parallel,
            pipeline_parallel_size=self.pp,
            virtual_pipeline_size=self.chunks,
            schedule=self.schedule,  # type: ignore[arg-type]
            layer_split=given.layer_split if fits else None,
            zero_stage=self.zero,  # type: ignore[arg-type]
            zero_ranks=self.zero_ranks,
        )
        micro = train.micro_batch_size
        if not config.data.drawn_per_micro_batch:
            micro = gcd(micro, max(1, batch_unit(train) // self.dp))
        return replace(
            config,
            parallel=parallel,
            optim=replace(config.optim, master=self.master),
            train=replace(train, micro_batch_size=micro),
        )

    def problem(self, config: Config) -> str:
        """Why `config` cannot have this layout; "" if it can."""
        train, fixed = config.train, config.data.drawn_per_micro_batch
        if batch_unit(train) % (self.dp * (train.micro_batch_size if fixed else 1)):
            ramp = "" if train.batch_ramp is None else f" with train.batch_ramp={list(train.batch_ramp)}"
            whole = f" in whole micro-batches of {train.micro_batch_size}" if fixed else ""
            return f"train.global_batch_size={train.global_batch_size}{ramp} cannot be shared by {self.dp} replicas{whole}"
        try:
            validate_layout(self.apply(config), self.shape.world)
        except ConfigError as error:
            return str(error)
        return chunks_problem(self.schedule, self.chunks) or ""


def batch_unit(train: TrainConfig) -> int:
    """Greatest number of sequences that divides every global batch, those of a ramp included."""
    start, increment, _ = train.batch_ramp or (0, 0, 0)
    return gcd(train.global_batch_size, start, increment)


def for_replicas(config: Config, replicas: int) -> Config:
    """A config whose batches divide over `replicas` replicas, and over any divisor of that, without another micro-batch size.

    Where micro-batches are part of the data (`drawn_per_micro_batch`), they must be the same under every layout: global batches are rounded
    to the nearest multiple; before that, micro-batches become a smaller divisor if one for each replica would exceed the global batch.
    Other configs are returned unchanged.
    """
    train = config.train
    if not config.data.drawn_per_micro_batch or batch_unit(train) % (train.micro_batch_size * replicas) == 0:
        return config
    sizes = (size for size in range(train.micro_batch_size, 0, -1) if train.micro_batch_size % size == 0)
    micro = next((size for size in sizes if size * replicas <= train.global_batch_size), 1)
    unit = micro * replicas
    whole = max(1, round(train.global_batch_size / unit)) * unit
    ramp = train.batch_ramp
    if ramp is not None:
        start = max(1, round(ramp[0] / unit)) * unit
        whole, ramp = max(whole, start + unit), (start, unit, ramp[2])
    return replace(config, train=replace(train, micro_batch_size=micro, global_batch_size=whole, batch_ramp=ramp))


def changed_batches(given: Config, config: Config) -> str:
    """The changes that `for_replicas` made, as text for the user."""
    keys = [key for key in BATCHES if getattr(given.train, key) != getattr(config.train, key)]
    return ", ".join(f"train.{key}={getattr(config.train, key)} here instead of {getattr(given.train, key)}" for key in keys)


def _part(part: str, name: str) -> dict[str, Any]:
    """The fields of a layout that one part of its name sets."""
    if part == "sp":
        return {"sequence_parallel": True}
    if part == "split":
        return {"master": "split"}
    schedule, _, chunks = part.partition(":")
    if schedule in FAMILIES:
        return {"schedule": schedule, "chunks": int(chunks) if chunks.isdigit() else USUAL_CHUNKS.get(schedule, 1)}
    if shared := re.fullmatch(r"zero([123]):([1-9]\d*)", part):
        return {"zero": int(shared[1]), "zero_ranks": int(shared[2])}
    number = re.fullmatch(r"(tp|pp|dp|zero)(\d+)", part)
    if number is None or (number[1] == "zero" and int(number[2]) > 3) or (number[1] != "zero" and int(number[2]) < 1):
        raise ValueError(
            f"{part!r} in the layout {name!r} is not understood. A layout is `single`, or parts joined by `-`: tp2, sp, pp2, "
            f"a schedule ({', '.join(FAMILIES)}, with :N for N chunks), dp2, zero0 to zero3 (with :N for shards over N replicas), split."
        )
    return {number[1]: int(number[2])}


def every_layout(world: int, masters: Sequence[str] = ("fp32",)) -> Iterator[Layout]:
    """All layouts on 1, 2, 4 ... up to `world` ranks. ZeRO stages other than 1 only with replicas."""
    sizes = [1 << power for power in range(world.bit_length()) if 1 << power <= world]
    for pp in sizes:
        for tp in sizes:
            for dp in sizes:
                if tp * pp * dp > world:
                    continue
                for sequence_parallel in (False, True) if tp > 1 else (False,):
                    for schedule in FAMILIES:
                        for zero, ranks in _shardings(dp):
                            for master in masters:
                                chunks = USUAL_CHUNKS.get(schedule, 1)
                                yield Layout(tp, sequence_parallel, pp, schedule, chunks, dp, zero, master, ranks)  # type: ignore[arg-type]


def _shardings(dp: int) -> list[tuple[int, int | None]]:
    """The pairs (ZeRO stage, number of replicas that share a set of shards; None: all) for `dp` replicas."""
    if dp == 1:
        return [(1, None)]
    some = [1 << power for power in range(1, dp.bit_length() - 1)]
    return [(0, None), *product((1, 2, 3), (None, *some))]


Point = TypeVar("Point", bound=tuple[Any, ...])


def covering(points: Sequence[Point], strength: int = 3) -> list[Point]:
    """A greedy subset of `points` in which every combination of values of every `strength` columns still occurs."""
    columns = list(combinations(range(len(points[0])), strength))
    held = [{(c, tuple(p[i] for i in c)) for c in columns} for p in points]
    wanted = {combination for one in held for combination in one}
    chosen: list[Point] = []
    while wanted:
        best = max(range(len(points)), key=lambda i: len(wanted & held[i]))
        chosen.append(points[best])
        wanted -= held[best]
    return chosen


def shrunk(config: Config) -> Config:
    """A small config of the same structure: it keeps kinds of layers, ratios of heads, and odd sizes of vocabulary and depth."""
    model = config.model
    heads = next((h for h in (8, 6, 4, 7, 5, 3, 2) if model.num_attention_heads % h == 0), 1)
    heads = min(heads, model.num_attention_heads)
    ratio = model.num_attention_heads // model.query_groups
    groups = max(1, heads // ratio)
    head_dim = min(model.head_size, 8)
    hidden = heads * head_dim
    ffn = model.ffn_hidden_size
    vocab = model.vocab_size
    length = min(model.seq_length, 16 if config.data.objective == "next_token" else 32)
    unused = min(model.positions - model.seq_length, length)
    layers, pattern = min(model.num_layers, 8 + model.num_layers % 2), model.window_pattern[: model.num_layers]
    window = None if model.window is None else min(model.window, max(2, model.window * length // model.seq_length))
    small = replace(
        model,
        num_layers=layers,
        window=window,
        window_pattern=pattern if len(pattern) <= layers else tuple(dict.fromkeys(pattern)),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=None if model.num_query_groups is None else groups,
        ffn_hidden_size=None if ffn is None else max(heads, round(ffn / model.hidden_size * head_dim) * heads),
        seq_length=length,
        max_positions=None if model.max_positions is None else length + unused,
        vocab_size=vocab if vocab is None or vocab <= 128 else 96 + vocab % 16,
    )
    # The ramp takes a few steps from half of the batch; both batches divide over 8 replicas.
    ramp = None if config.train.batch_ramp is None else (8, 8, 16)
    train = replace(config.train, global_batch_size=16, micro_batch_size=2, batch_ramp=ramp)
    parallel = replace(
        config.parallel,
        layer_split=None,
        bucket_size=min(config.parallel.bucket_size or usual_size(0, 1, 0), 20 * hidden * hidden),
    )
    return replace(config, model=small, train=train, parallel=parallel)
