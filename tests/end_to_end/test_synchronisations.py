"""Nothing in a step has the host wait for the device, and its report does so once: on a GPU that is not there, and on one that is."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from pretended_gpu import PretendedGpu

from megatrain import assembly, training
from megatrain.assembly import assemble
from megatrain.config.load import from_dict
from megatrain.data.loader import Loader
from megatrain.kernels import attention, dispatch, matmul
from megatrain.kernels.sdpa import Choice
from megatrain.models import gpt
from megatrain.models.batch import NextToken
from megatrain.parallel.mesh import Done, MeshShape, ParallelContext
from megatrain.testing.trace import random_source
from megatrain.training import queue_step
from megatrain.transport import host
from megatrain.transport.group import Group, World

MODEL = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 16, "vocab_size": 61}
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "num_query_groups": 2, "tied_embeddings": False}
GLM = {"family": "glm", "position": "learned_2d", "norm_placement": "deepnorm", "attention_dropout": 0.1}
BLANKS = {"objective": "glm", "glm": {"objective_mix": {"mode": "weighted", "blank": 1.0, "sentence": 0.0, "document": 2.0}}}
SWITCHES = {
    "gpt2": ({"model": {"dropout": 0.1}}, MeshShape(), 0),
    "llama, z-loss, in chunks": (
        {"model": {**LLAMA, "logit_softcap": 30.0}, "train": {"loss_chunk": 24, "z_loss": 1e-4}},
        MeshShape(dp=2),
        3,
    ),
    "bf16, split masters": (
        {"model": LLAMA, "train": {"precision": "bf16", "recompute": "selective"}, "optim": {"master": "split"}},
        MeshShape(dp=2),
        1,
    ),
    "fp16": ({"train": {"precision": "fp16", "recompute": "full", "kernels": "reference"}}, MeshShape(dp=2), 0),
    "alibi, sgd": (
        {"model": {"position": "alibi"}, "optim": {"name": "sgd"}, "train": {"kernels": "reference"}},
        MeshShape(dp=2),
        2,
    ),
    "documents": ({"model": {**LLAMA, "attention_dropout": 0.1}, "data": {"isolate_documents": True}}, MeshShape(tp=2), 0),
    "documents, fused": ({"model": {"num_attention_heads": 1}, "data": {"isolate_documents": True}}, MeshShape(), 0),
    "glm": ({"model": GLM, "data": BLANKS}, MeshShape(), 0),
}


def config_of(sections, shape=None, zero=0):
    """A tiny run of 2 micro-batches."""
    size = 4 * (shape.dp if shape else 1)
    train = {"steps": 9, "global_batch_size": size, "micro_batch_size": 2, "precision": "fp32"}
    tree = {
        "model": MODEL,
        "data": {"train": "random", "tokenizer": "bytes" if "glm" in str(sections) else None},
        "optim": {"lr": 1e-2},
        "train": train,
        "parallel": {"zero_stage": zero, "tensor_parallel_size": shape.tp if shape else 1},
    }
    return from_dict({section: {**tree[section], **sections.get(section, {})} for section in tree})


class Alone(Group):
    """A group whose other ranks are not there."""

    def __init__(self, name, ranks):
        self.name, self.ranks, self.rank = name, tuple(ranks), 0

    def _done(self, *_given, **_named):
        return Done()

    _all_reduce = _all_gather = _reduce_scatter = _all_to_all = _broadcast = _send = _recv = barrier = _done


class AloneWorld(World):
    """Rank 0 of a world whose other ranks are not there."""

    rank = 0

    def __init__(self, size):
        self.size = size

    def group(self, name, ranks):
        return Alone(name, ranks)


class Noted(host.Moment):
    """A moment of a device that is not there."""

    waits = 0

    def __init__(self, _device):
        super().__init__(torch.device("cpu"))

    def wait(self):
        Noted.waits += 1


@pytest.fixture
def pretended(monkeypatch):
    """Replace everything that needs a real GPU or other ranks."""
    monkeypatch.setattr(host, "Moment", Noted)
    monkeypatch.setattr(training, "Moment", Noted)
    monkeypatch.setattr(assembly, "check_whole", lambda *_, **_named: None)
    monkeypatch.setattr(gpt, "initialise", lambda *_: None)
    monkeypatch.setattr(assembly, "kernels_of", lambda *_: Choice())
    if dispatch.triton is not None:
        monkeypatch.setattr(type(dispatch.jit(config_of)), "__getitem__", lambda *_: lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(attention, "flex", lambda q, *_: (q + 0).flatten(2))
    monkeypatch.setattr(attention, "fused", lambda q, *_: (q + 0).flatten(2))
    yield
    for asked_once in (dispatch.multiprocessors, matmul.adds_inside):
        asked_once.cache_clear()


def counted(config, shape=None, objective=None):
    """Queue two steps after a first one and return: what the host waits for, copies to the device; waits before and in reports."""
    shape = shape or MeshShape()
    samples, compose = random_source(config, 61)
    train, gpu = config.train, PretendedGpu()
    with gpu.here(), Loader(samples, train.global_batch_size, train.micro_batch_size, 0, shape.dp, compose=compose) as loader:
        ctx = ParallelContext.build(AloneWorld(shape.world), shape, "cuda")
        run = assemble(config, ctx, loader, 61, objective=objective)
        queue_step(run).report()
        gpu.waits.clear()
        gpu.copies = Noted.waits = 0
        queued = [queue_step(run) for _ in range(2)]
        found = dict(gpu.waits), gpu.copies, Noted.waits
        assert [step.report().step for step in queued] == [2, 3]
        assert dict(gpu.waits) == found[0]
    return *found, Noted.waits


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_step_waits_for_nothing_and_its_report_once(pretended, switch):
    """Two copies to the device in a step: the batch, and whose squares of gradients this rank counts."""
    sections, shape, zero = SWITCHES[switch]
    assert counted(config_of(sections, shape, zero), shape) == ({}, 4, 0, 2)


@dataclass(frozen=True)
class Asking(NextToken):
    """An objective that looks at the device, or sends it what lies in pageable memory, in one way or another."""

    way: str

    def weight(self, batch):
        weights = batch.loss_weights
        if self.way == "number":
            assert float(weights.sum()) == 0.0
        elif self.way == "copy":
            assert weights.cpu().shape == weights.shape
        elif self.way == "tensor":
            weights = weights * torch.tensor([2.0, 3.0], device=weights.device)
        elif self.way == "pageable":
            weights = weights * torch.ones(16, 2).to(weights.device, non_blocking=True)
        elif self.way == "masked":
            weights = weights[weights > 0]
        return super().weight(replace(batch, loss_weights=weights))


@pytest.mark.parametrize(
    ("way", "noted"),
    [
        ("number", "a number"),
        ("copy", "a copy to the host"),
        ("tensor", "a tensor of the host's numbers"),
        ("pageable", "a copy from pageable memory"),
    ],
)
def test_what_waits_is_counted_with_its_line(pretended, way, noted):
    waits, copies, *_ = counted(config_of({}), objective=Asking(way))
    ((where, times),) = waits.items()
    assert where.startswith(f"{noted} at training.py: ") and "run.objective.weight(m)" in where
    assert (times, copies) == (4, 4)


def test_a_tensor_as_large_as_the_data_says_is_refused(pretended):
    with pytest.raises(AssertionError, match=r"aten\.index\.Tensor by a mask has the host wait"):
        counted(config_of({}), objective=Asking("masked"))


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(
    "switch", [name for name, (_, shape, _) in SWITCHES.items() if shape.world == 1] + ["bf16, split masters"]
)
def test_on_a_gpu_nothing_in_a_step_waits(switch, kernels):
    config = config_of(SWITCHES[switch][0])
    config = replace(config, train=replace(config.train, kernels=kernels))
    (samples, compose), train = random_source(config, 61), config.train
    with Loader(samples, train.global_batch_size, train.micro_batch_size, 0, 1, compose=compose) as loader:
        run = assemble(config, ParallelContext.single("cuda"), loader, 61)
        queue_step(run).report()
        torch.cuda.set_sync_debug_mode("error")
        try:
            queued = [queue_step(run) for _ in range(2)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [step.report().step for step in queued] == [2, 3]
