"""Nothing in a step of decoding has the host wait for a GPU, but the one copy of what was chosen."""

from types import SimpleNamespace

import pytest
import torch
from engines import weights_of
from pretended_gpu import PretendedGpu

from megatrain.inference.engine import Engine, EngineSettings
from megatrain.inference.requests import Request, Sampling
from megatrain.kernels import dispatch
from megatrain.models import gpt
from megatrain.parallel.mesh import ParallelContext
from megatrain.transport import host

WAYS = [
    Sampling(greedy=True),
    Sampling(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1),
    Sampling(repetition_penalty=1.2, presence_penalty=0.1, logit_bias=((3, 1.0),), never=(4,)),
]


def test_a_step_waits_once(monkeypatch):
    pytest.importorskip("triton")
    gpu, waits = PretendedGpu(), []
    monkeypatch.setattr(type(dispatch.jit(test_a_step_waits_once)), "__getitem__", lambda *_: lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(gpt, "initialise", lambda *_: None)
    monkeypatch.setattr(host, "Moment", lambda _device: type("Moment", (), {"wait": lambda _self: waits.append(1)})())
    with gpu.here():
        engine = Engine(weights_of(ParallelContext.single("cuda"), vocab_size=11), None, EngineSettings(cache_tokens=512))
        for number, sampling in enumerate(WAYS):
            engine.add(Request((1, 2, 3 + number), 3, sampling, top=2 if number else None, score_from=1))
        gpu.waits.clear()
        steps = 0
        while engine.busy:
            engine.step()
            steps += 1
    assert steps == 3 == len(waits) and gpu.waits == {} and gpu.copies > 9
