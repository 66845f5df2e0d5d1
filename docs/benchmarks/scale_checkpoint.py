"""The part of docs/benchmarks/scale.py that is about checkpoints: 175 billion parameters, saved by 16,384 ranks. No number is drawn."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import xxhash
from pretended_world import RANKS, SHAPE, Pretended, timed

from megatrain.assembly import layer_pieces, units_of
from megatrain.checkpoint.directory import SAVING
from megatrain.checkpoint.manifest import FileRow, Manifest, StoredTensor, check_file, file_name, row_from_json, tensor_to_json
from megatrain.checkpoint.save import Contents, Saver, _publish
from megatrain.checkpoint.tensor_file import BLOCK_BYTES, header_of
from megatrain.config.load import dump, from_dict
from megatrain.config.schema import Config
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.parallel.flat import Bucket, make_buckets, usual_size
from megatrain.parallel.mesh import MeshShape, ParallelContext, Rows
from megatrain.parallel.portion import Partition

VOCABULARY = 50_257
KINDS = ("weights", "exp_avg", "exp_avg_sq")


def big_config() -> Config:
    """175 billion parameters on all ranks."""
    parallel = {"tensor_parallel_size": SHAPE.tp, "pipeline_parallel_size": SHAPE.pp, "zero_stage": 1}
    return from_dict(
        {"model": {"preset": "gpt3_175b", "vocab_size": VOCABULARY}, "parallel": parallel, "data": {"train": ["corpus"]}}
    )


def stage_buckets(config: Config, stage: int) -> list[Bucket]:
    """The buckets of the ranks of a pipeline stage; no number is drawn."""
    ctx = ParallelContext.build(Pretended(SHAPE.rank_at(pp=stage), RANKS), SHAPE, "meta")
    with patch("megatrain.models.gpt.initialise", lambda *_: None):
        build = Build(Rows(ctx.tp, True), torch.bfloat16, ctx.device, config.model, VOCABULARY, seed=1)
        chunks = build_gpt(build, *layer_pieces(config, VOCABULARY), stage)
    units = units_of(chunks)
    elements = sum(p.numel() for p in {p for unit in units for p in unit.parameters})
    return make_buckets(units, {"dp_cp": SHAPE.dp}, usual_size(elements, SHAPE.dp, config.parallel.zero_stage), by_unit=False)


def runs_of(buckets: list[Bucket], place: int) -> dict[str, int]:
    """Name -> elements of what a data rank writes."""
    return {
        parameter.spec.name: count
        for bucket in buckets
        for parameter, _, _, count in bucket.ranges(place * bucket.part, (place + 1) * bucket.part)
    }


def stored(buckets: list[Bucket], stage: int) -> dict[str, StoredTensor]:
    """Name -> row of the manifest."""
    return {
        parameter.spec.name: StoredTensor(parameter.spec, stage, dict.fromkeys(KINDS, "float32"), Partition(start, bucket.part))
        for bucket in buckets
        for parameter, start in zip(bucket.parameters, bucket.starts, strict=True)
    }


def file_rows(size: int, tp: int, pp: int, dp: int) -> list[FileRow]:
    """The files of a rank, with made-up checksums."""
    place = {"tp": tp, "pp": pp, "dp": dp}
    names = [file_name(kind, place) for kind in KINDS]
    blocks = -(-size // BLOCK_BYTES)
    sums = {name: tuple(xxhash.xxh3_128_hexdigest(f"{name} {i}".encode()) for i in range(blocks)) for name in names}
    return [FileRow(name, kind, place, size, sums[name]) for kind, name in zip(KINDS, names, strict=True)]


def manifest() -> dict[str, Any]:
    """The manifest of the big model, and what ranks tell one another when they save and load it."""
    config = big_config()
    files: list[FileRow] = []
    tensors: dict[str, StoredTensor] = {}
    names: list[list[str]] = []
    most = 0
    for stage in range(SHAPE.pp):
        buckets = stage_buckets(config, stage)
        of_stage = stored(buckets, stage)
        tensors, most = of_stage | tensors, max(most, len(of_stage))
        for place in range(SHAPE.dp):
            runs = runs_of(buckets, place)
            names.append(sorted(runs))
            size = header_of([(name, torch.float32, (count,)) for name, count in runs.items()])[2]
            files += [row for tp in range(SHAPE.tp) for row in file_rows(size, tp, stage, place)]
    text = dump(config, {})
    made = Manifest(1000, 0.0, {"samples": 1}, SHAPE, tuple(files), tensors, text)
    writing, data = timed(made.to_bytes)
    reading, _ = timed(lambda: Manifest.from_bytes(data))
    longest = max(len(json.dumps(of)) + 1 for of in names)
    stages = [sorted({name for of in names[i : i + SHAPE.dp] for name in of}) for i in range(0, len(names), SHAPE.dp)]
    widest = max(len(json.dumps(of)) + 1 for of in stages)
    return {
        "files": len(files),
        "tensors": len(tensors),
        "bytes": len(data),
        "bytes a file": round(len(json.dumps([asdict(row) for row in files], indent=1)) / len(files), 1),
        "seconds to make": writing,
        "seconds to read": reading,
        "bytes a rank hears of others when it loads": len(KINDS) * (SHAPE.dp * longest + SHAPE.pp * widest),
        "bytes a rank hears of others when it saves": RANKS * (len(str(max(row.bytes for row in files) * len(KINDS))) + 1 + 8),
        "bytes a rank hears of others when it audits": SHAPE.dp * most * 8,
        "bytes of config.yaml": len(text),
    }


def publish(part: int = 8) -> dict[str, Any]:
    """Rank 0's work to make one checkpoint of what all ranks have written, measured with 1/part of the ranks."""
    config, ranks = big_config(), RANKS // part
    buckets = stage_buckets(config, 1)
    shape = MeshShape(tp=SHAPE.tp, dp=ranks // SHAPE.tp)
    with tempfile.TemporaryDirectory() as folder:
        work, final = Path(folder, SAVING + "step_00000001"), Path(folder, "step_00000001")
        work.mkdir()
        known = stored(buckets, 0)
        for rank in range(ranks):
            place = shape.coordinates(rank)
            runs = runs_of(buckets, place["dp"] % SHAPE.dp)
            rows = file_rows(1000, place["tp"], 0, place["dp"])
            for row in rows:
                with (work / row.name).open("wb") as file:
                    file.truncate(row.bytes)
            left = {"files": [asdict(row) for row in rows], "tensors": [tensor_to_json(known[name]) for name in runs]}
            (work / f"rank-{rank:05d}.json").write_text(json.dumps(left))
        ctx = ParallelContext.build(Pretended(0, ranks), shape)
        saver: Any = SimpleNamespace(ctx=ctx, _patience_ends=float("inf"))
        collecting, rows_of_all = timed(lambda: Saver._rows_of_all(saver, work))
        publishing, _ = timed(lambda: _publish(work, final, Contents(1, {}, ""), rows_of_all, ctx, BLOCK_BYTES))
        rows = [row_from_json(row) for left in rows_of_all for row in left["files"]]
        looking, _ = timed(lambda: [check_file(final, row) for row in rows])
    of_all = {"read what ranks left": collecting, "check, and publish": publishing, "look at all files": looking}
    return {"ranks": ranks, "files": len(rows), "seconds, of all ranks": {k: round(v * part, 2) for k, v in of_all.items()}}
