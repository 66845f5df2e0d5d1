"""`megatrain doctor` checks before a job, on one machine or on all its ranks through the same launchers: would it run, how fast is it?

every rank inspects its machine -> sends its report to rank 0 through the store where they meet; no group exists yet
rank 0: can all ranks join?     -> if not, it prints why, and all ranks end
all ranks join and measure      -> send their reports to rank 0, which prints its findings and gives all ranks one exit code
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from megatrain.assembly import DTYPES
from megatrain.config.load import from_dict, load
from megatrain.config.schema import Config
from megatrain.doctor.measure import MESSAGE_NUMBERS, Report, look, measure
from megatrain.doctor.rules import Finding, as_json, judge, judge_apart, judge_missing, name_wrong_interfaces, short
from megatrain.files import shown
from megatrain.init_from import shapes_of
from megatrain.kernels.dispatch import require
from megatrain.plan.memory import state_bytes
from megatrain.program import vocabulary
from megatrain.runtime import ports
from megatrain.runtime.distributed import choose_device, connect
from megatrain.runtime.flops import parameter_count
from megatrain.runtime.interface import launched
from megatrain.runtime.interface import use as use_interface
from megatrain.runtime.launch import Launch, LaunchError
from megatrain.runtime.slurm import expand_nodes
from megatrain.transport.group import TransportError
from megatrain.transport.leftovers import remove_leftovers
from megatrain.transport.meeting import Meeting

MARGIN_SECONDS = 30.0
"""Time that measuring may take beyond the limit of one collective."""
MULTINODE_PORT = 29400
"""The port that launch/multinode.sh uses by default."""
SHOWN = 16
"""Most ranks in the printed table, and findings below it; --json gives all."""


@dataclass(frozen=True)
class Inputs:
    """The command's inputs: config, directory, and how to print."""

    config: Config
    directory: Path
    """checkpoint.dir, or the working directory if no config is given."""
    checkpoint_bytes: int
    """Size of one whole checkpoint; 0: unknown."""
    json_too: bool


def main(config_path: str | None, overrides: Sequence[str], json_too: bool, port: int | None, wait_seconds: float) -> int:
    """Run the command. Returns exit code 0 where a job would run, 1 where it would fail.

    port: a port that must be free on rank 0's node besides the one where the ranks will meet. wait_seconds: how long to wait for ranks.
    Raises LaunchError where the environment does not tell this process's rank, and TransportError, on ranks other than 0, where rank 0
    cannot be reached; both messages name the node.
    """
    node = socket.gethostname()
    try:
        launch = launched(os.environ)
    except LaunchError as error:
        raise LaunchError(f"{node}: {error}") from error
    mine = Report(launch.rank, node, launch.local_world_size)
    inputs, device = _look(mine, launch, config_path, overrides, json_too)
    if not _look_at_ports(mine, launch, port):
        return _end(inputs, [mine])
    try:
        meeting = Meeting(
            launch.rank,
            launch.world_size,
            (launch.master_addr or "", launch.master_port or 0),
            wait_seconds,
            launcher_serves=launch.launcher_serves,
            prefix=f"doctor-{launch.restart_count}-{launch.store_prefix}",
            key=launch.key,
        )
    except TransportError as error:
        if launch.rank != 0:
            raise TransportError(f"{node}: {error}") from error
        mine.problems.append(str(error))
        return _end(inputs, [mine])
    try:
        return _examine(meeting, inputs, mine, launch, device, wait_seconds)
    except TransportError as error:
        raise TransportError(f"{node}: {error}") from error
    finally:
        meeting.close()


def _examine(meeting: Meeting, inputs: Inputs, mine: Report, launch: Launch, device: torch.device, wait_seconds: float) -> int:
    """Judge the readings of all ranks and, if they can join a group, their measurements. Returns the exit code, the same on all ranks."""
    # Rank 0 may come at the end of the time that others wait for it, and then waits as long for the last of them.
    patience = 2 * wait_seconds + MARGIN_SECONDS
    texts = meeting.collect(json.dumps(asdict(mine)), wait_seconds)
    apart = 0
    if launch.rank == 0:
        reports = _reports(texts)
        advice = (
            "Were they started, with the same world size, MASTER_ADDR, MASTER_PORT and MEGATRAIN_SECRET, and do they reach "
            f"{launch.master_addr}:{launch.master_port}?"
        )
        missing = judge_missing(reports, launch.world_size, wait_seconds, _nodes(os.environ), advice)
        apart = int(bool(missing or judge_apart(reports)))
        if apart:
            _end(inputs, reports, missing)
    if int(meeting.decide(str(apart), patience)):
        return 1
    _measure(mine, inputs, launch, wait_seconds)
    texts = meeting.collect(json.dumps(asdict(mine)), wait_seconds + MARGIN_SECONDS)
    code = 0
    if launch.rank == 0:
        reports = _reports(texts)
        advice = "They had come, and then died or hung while all were measuring: see what they said."
        missing = judge_missing(reports, launch.world_size, wait_seconds + MARGIN_SECONDS, (), advice)
        code = _end(inputs, reports, missing)
    return int(meeting.decide(str(code), patience))


def _reports(texts: Mapping[int, str]) -> list[Report]:
    return [Report(**json.loads(text)) for text in texts.values()]


def _nodes(env: Mapping[str, str]) -> list[str]:
    """Names of the job's machines from SLURM's variables; [] without them."""
    try:
        return expand_nodes(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "")
    except ValueError:
        return []


# --- looking and measuring -----------------------------------------------------------------------------------------------------


def _look(
    mine: Report, launch: Launch, config_path: str | None, overrides: Sequence[str], json_too: bool
) -> tuple[Inputs, torch.device]:
    """(inputs, this rank's device). A problem goes into the report `mine`, so that the other ranks learn of it instead of waiting."""
    config, device, count = from_dict({}), torch.device("cpu"), 0
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        if config_path is not None:
            config = load(config_path, overrides, shapes_of).config
        device, backend = choose_device(config.parallel, launch, gpus)
        mine.backend = f"{backend} on {device.type}"
        require(config.train.kernels, device, DTYPES[config.train.precision])
        count = checkpoint_bytes(config)
    except (ValueError, RuntimeError, OSError) as error:
        mine.problems.append(str(error))
    directory = Path.cwd() if config_path is None else Path(config.checkpoint_dir)
    look(mine, device, directory, os.environ)
    if launch.local_rank == 0 and (removed := remove_leftovers()):
        mine.doubts.append(removed)
    if not name_wrong_interfaces(mine):  # else the same fault would be reported twice
        try:
            mine.interface = str(use_interface(launch, dict(os.environ)) or "")
        except LaunchError as error:
            mine.problems.append(str(error))
    return Inputs(config, directory, count, json_too), device


def checkpoint_bytes(config: Config) -> int:
    """Size of a whole checkpoint (weights, masters, moments) in bytes; 0 where the vocabulary size is unknown."""
    if config.model.vocab_size is None and config.data.tokenizer is None:
        return 0
    each = state_bytes(0, 1, config.train.precision, config.optim.name, config.optim.master)
    return int(parameter_count(config.model, vocabulary(config)) * (each.parameters + each.optimizer))


def _look_at_ports(mine: Report, launch: Launch, asked: int | None) -> bool:
    """False if rank 0 cannot listen on the port where the ranks will meet (checked by rank 0). Other ports in use only go into the
    report.
    """
    if launch.rank != 0:
        return True
    meets = launch.master_port if launch.world_size > 1 and not launch.launcher_serves else None
    if asked is not None and asked != meets and (why := ports.trouble(asked)):
        mine.problems.append(f"port {asked} {why}")
    if meets is not None and (why := ports.trouble(meets)):
        mine.problems.append(f"port {meets}, where the ranks are to meet, {why}")
        return False
    if asked is None and launch.launcher == "none" and (why := ports.trouble(MULTINODE_PORT)):
        mine.doubts.append(f"port {MULTINODE_PORT}, which launch/multinode.sh would take here, {why}")
    return True


def _measure(mine: Report, inputs: Inputs, launch: Launch, wait_seconds: float) -> None:
    """Join the other ranks and measure. A failure goes into the report."""
    try:
        # The meeting's store, which rank 0 serves, is already up: `connect` must not serve another.
        session = connect(replace(launch, launcher_serves=True), inputs.config.parallel, wait_seconds)
        try:
            measure(mine, session.everyone, session.device, inputs.directory)
        finally:
            session.close()
    except (ValueError, RuntimeError, OSError) as error:
        mine.problems.append(str(error))


# --- printing -------------------------------------------------------------------------------------------------------------


def _end(inputs: Inputs, reports: Sequence[Report], missing: Sequence[Finding] = ()) -> int:
    """Judge the reports, print, and return the exit code."""
    findings = [*missing, *judge(reports, inputs.checkpoint_bytes, inputs.config.checkpoint.keep)]
    if inputs.json_too:
        sys.stdout.write(json.dumps(as_json(reports, findings)) + "\n")
    else:
        sys.stdout.write(shown("\n".join(_lines(reports, findings))) + "\n")  # what other machines have said
    sys.stdout.flush()
    return int(any(finding.level == "fail" for finding in findings))


def _lines(reports: Sequence[Report], findings: Sequence[Finding]) -> list[str]:
    """The printed lines: one for each rank, slowest first, then the findings."""
    first = reports[0]
    interfaces = [" ".join([name, *addresses]) for name, addresses in first.interfaces.items() if addresses]
    lines = [
        f"on {first.node}: {', '.join(f'{name} {version}' for name, version in first.versions.items())}",
        f"backends: {', '.join(first.backends)} | kernels: {first.kernels} | interfaces: {', '.join(interfaces)}"
        + (f", of which {first.interface} serves" if first.interface else ""),
    ]
    if first.all_reduce_mb_per_second:
        megabytes = MESSAGE_NUMBERS * 4 / 1e6
        lines.append(
            f"all-reduce of {megabytes:.0f} MB over {len(reports)} ranks: {short(first.all_reduce_mb_per_second)} MB/s"
        )
    lines.append(f"{'rank':>5} {'node':20} {'device':28} {'TFLOP/s':>8} {'link MB/s':>10} {'disk MB/s':>10} {'free GB':>8}")
    slowest = sorted(reports, key=lambda report: report.tflops)
    for report in slowest[:SHOWN]:
        speeds = (report.tflops, report.link_mb_per_second, report.write_mb_per_second)
        tflops, link, disk = (short(speed) if speed else "-" for speed in speeds)  # -: not measured
        lines.append(
            f"{report.rank:5} {report.node:20.20} {', '.join(report.devices):28.28} {tflops:>8} {link:>10} {disk:>10} "
            f"{report.free_bytes / 1e9:8.1f}"
        )
    lines += _more(slowest, "ranks")
    lines += [f"{finding.level.upper()}: {finding.message}" for finding in findings[:SHOWN]]
    lines += _more(findings, "findings")
    failed = sum(finding.level == "fail" for finding in findings)
    lines.append(f"a job would fail: {failed} reason{'s' if failed > 1 else ''}" if failed else "a job would run")
    return lines


def _more(rows: Sequence[object], what: str) -> list[str]:
    return [f"... and {len(rows) - SHOWN} more {what} (--json has all)"] if len(rows) > SHOWN else []
