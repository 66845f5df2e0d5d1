"""Devices that lie: a bit that changes by itself on one rank of a real job, which ends with the rank, host and tensor named."""

import socket
import time

import jobs
import pytest

AUDIT_EVERY, AT = 20, 23
SCRIPT = """
import sys
import time
import torch
from pathlib import Path
from megatrain.auditor import Auditor
from megatrain.cli.main import main
from megatrain.parallel.zero import FlatParameters

kind, told = sys.argv[1], Path(sys.argv[2])
real, reduction = Auditor.updated, FlatParameters._start_reduction


def flip(tensor):
    tensor.detach().view(-1).view(torch.uint8)[0] ^= 1


def updated(self):
    real(self)
    if self.run.step != {at}:
        return
    flat, optimizer = self.run.flat, self.run.optimizer
    flat.settle()
    local = flat.trained[0]
    if kind == "parameter":
        flip(local.own_weights)
    elif kind == "gathered parameter":
        flip(local.weights[: local.own.start] if local.own.start else local.weights[local.own.stop :])
    elif kind == "master":
        flip(optimizer.masters[0].masters)
    elif kind != "gradient":
        flip(optimizer.states[0][kind])
    told.write_text(str(time.time()))


def start(self, local, last):
    sent = local is self.trained[0] and local.grads is not None and not local.reduced
    if kind == "gradient" and sent and told.exists():
        at = int(torch.randint(0, local.bucket.parameters[0].numel(), (1,)))  # a device that miscalculates now and then
        flip(local.grads[at : at + 1])
    reduction(self, local, last)


Auditor.updated, FlatParameters._start_reduction = updated, start
sys.exit(main(sys.argv[3:]))
""".replace("{at}", str(AT))
SAID = {
    "parameter": "parameter {name} changed by itself on rank 1 ({host}) before the update of step 24",
    "gathered parameter": "in some step, parameter ",
    "master": "master {name} changed by itself on rank 1 ({host}) before the update of step 24",
    "exp_avg": "exp_avg {name} changed by itself on rank 1 ({host}) before the update of step 24",
    "exp_avg_sq": "exp_avg_sq {name} changed by itself on rank 1 ({host}) before the update of step 24",
    "gradient": "rank 1 on {host} gives other bits the second time in gradient of ",
}

CASES = [(kind, stage, "dp 2") for kind in SAID for stage in range(4) if kind != "gathered parameter" or stage in (1, 2)]
CASES += [(kind, 1, "tp 2 x pp 2") for kind in SAID if kind != "gathered parameter"]
"""At stage 0 nobody else owns a part of what a rank has; at stage 3 it is gathered again before each use."""


@pytest.mark.fault(
    injection="a bit flips in a {kind} on one rank, ZeRO {stage}",
    promise="found within train.audit_every = 20 steps, rank, host and tensor named",
    bound=30,
    layout="{layout}",
)
@pytest.mark.parametrize(("kind", "stage", "layout"), CASES)
def test_a_bit_flips(tmp_path, measured, kind, stage, layout):
    size, parallel = (2, {}) if layout == "dp 2" else (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2})
    audits = {"steps": 60, "precision": "bf16", "audit_every": AUDIT_EVERY, "audit_compute_every": AUDIT_EVERY}
    store = jobs.write_store(tmp_path / "store")
    tree = jobs.tiny(
        store, tmp_path / "run", parallel={**parallel, "zero_stage": stage}, train=audits, checkpoint={"save_every": 10}
    )
    config, port, told = jobs.write_config(tmp_path / "c.yaml", tree), jobs.free_port(), tmp_path / "told"
    (tmp_path / "fault.py").write_text(SCRIPT)
    with jobs.Job(tmp_path / "job") as job:
        for rank in range(size):
            words = [str(tmp_path / "fault.py"), kind, str(told)] if rank == 1 else []
            job.fork([*words, "train", str(config)], jobs.environment(rank, size, port))
        ended = job.finish()
    measured.detected(time.time() - float(told.read_text()))
    assert [end.code for end in ended] == [1] * size, ended
    said = SAID[kind].format(host=socket.gethostname(), name="X").split("X")
    for end in ended:
        assert all(part in end.err for part in said), end.err
    (event,) = (event for event in jobs.events(tmp_path / "run") if event["event"] == "audit")
    assert event["rank"] == 1 and event["tensors"] and all(event["message"] in end.err for end in ended), event
    assert max(jobs.rows(tmp_path / "run")) <= 40
    saved = [int(path.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step_*")]
    assert max(saved) <= (AT if kind != "gradient" else 40), "no checkpoint has it"
