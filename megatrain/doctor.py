"""`megatrain doctor`: before a job, alone or on all its ranks through the same launchers: would it run, and how fast is each rank?"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatrain.config.load import from_dict, load
from megatrain.config.schema import Config
from megatrain.init_from import shapes_of
from megatrain.parallel.consensus import gather_texts
from megatrain.program import vocabulary
from megatrain.runtime.distributed import connect
from megatrain.runtime.doctor import Finding, Report, as_json, judge, judge_alone, look, measure
from megatrain.runtime.flops import parameter_count
from megatrain.runtime.launch import Launch

JOIN_SECONDS = 60.0
"""How long a rank waits for the others."""


def checkpoint_bytes(config: Config) -> int:
    """Of a whole checkpoint: weights, masters and moments; 0 where the vocabulary is not known."""
    if config.model.vocab_size is None and config.data.tokenizer is None:
        return 0
    count = parameter_count(config.model, vocabulary(config))
    weight = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}[config.train.precision]
    masters = (2 if config.optim.master == "split" else 4) if weight == 2 else 0
    states = max(4, weight) * (1 if config.optim.name == "sgd" else 2)
    return count * (weight + masters + states)


def main(config_path: str | None, overrides: Sequence[str], json_too: bool) -> int:
    """Exit code 0 where a job would run, 1 where it would fail. Raises ConfigError, LaunchError or TransportError."""
    config = from_dict({}) if config_path is None else load(config_path, overrides, shapes_of).config
    launch = Launch.from_environment(os.environ)
    directory = Path(config.checkpoint_dir) if config_path is not None else Path.cwd()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", launch.local_rank % gpus) if gpus and config.parallel.device != "cpu" else torch.device("cpu")
    mine = look(launch.rank, device, directory, os.environ)
    if alone := judge_alone(mine):  # this rank could not even meet the others
        _print([mine], alone, json_too)
        return 1
    session = connect(launch, config.parallel, JOIN_SECONDS)
    try:
        measure(mine, session.everyone, session.device, directory)
        texts = gather_texts(json.dumps(asdict(mine)), session.everyone, session.device)
        reports = [Report(**json.loads(text)) for text in texts]
        findings = judge(reports, checkpoint_bytes(config), config.checkpoint.keep)
        if session.rank == 0:
            _print(reports, findings, json_too)
    finally:
        session.close()
    return int(any(finding.level == "fail" for finding in findings))


def _print(reports: Sequence[Report], findings: Sequence[Finding], json_too: bool) -> None:
    """A line a rank, slowest first, then what is wrong."""
    if json_too:
        sys.stdout.write(json.dumps(as_json(reports, findings)) + "\n")
        return
    first = reports[0]
    out = [", ".join(f"{name} {version}" for name, version in first.versions.items())]
    out.append(f"backends: {', '.join(first.backends)} | kernels: {first.kernels} | interfaces: {', '.join(first.interfaces)}")
    out.append(f"{'rank':>5} {'node':20} {'device':28} {'TFLOP/s':>8} {'all-reduce MB/s':>16} {'disk MB/s':>10} {'free GB':>8}")
    for report in sorted(reports, key=lambda report: report.tflops):
        out.append(
            f"{report.rank:5} {report.node:20.20} {', '.join(report.devices):28.28} {report.tflops:8.3g} "
            f"{report.all_reduce_mb_per_second:16.3g} {report.write_mb_per_second:10.3g} {report.free_bytes / 1e9:8.1f}"
        )
    out += [f"{finding.level.upper()}: {finding.message}" for finding in findings]
    failed = sum(finding.level == "fail" for finding in findings)
    out.append(f"a job would fail: {failed} reason{'s' if failed > 1 else ''}" if failed else "a job would run")
    sys.stdout.write("\n".join(out) + "\n")
