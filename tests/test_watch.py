"""What the start-up lines say of a GPU, and of shards that go between nodes; what is told of a spike and an evaluation."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from megatrain import watch
from megatrain.config.schema import ParallelConfig
from megatrain.duties import Pause
from megatrain.evaluate import Evaluation
from megatrain.lifecycle.spikes import Bad, Diverged
from megatrain.parallel.mesh import MeshShape
from megatrain.records.log import RunLog
from megatrain.testing import simulate


@pytest.mark.parametrize(
    ("device", "dtype", "inside", "said"),
    [
        ("cuda", torch.bfloat16, True, " | weight gradients: added inside the matmul"),
        ("cuda", torch.float16, False, " | weight gradients: added after the matmul"),
        ("cuda", torch.float32, False, ""),
        ("cpu", torch.bfloat16, False, ""),
    ],
    ids=str,
)
def test_where_weight_gradients_are_added_is_told(monkeypatch, device, dtype, inside, said):
    monkeypatch.setattr(watch, "adds_inside", lambda *_: inside)
    assert watch.summing_note(torch.device(device), dtype) == said


@pytest.mark.parametrize(
    ("tp", "dp", "zero_ranks", "of_node", "said"),
    [
        (2, 4, 2, 4, []),
        (2, 4, 2, 8, []),
        (2, 4, 4, 8, []),
        (2, 4, None, 4, []),
        (
            2, 4, 4, 4,
            ["parallel.zero_ranks=4: 8 neighbouring ranks have the shards, and a node has 4, so that shards go between nodes: "
             "parallel.zero_ranks=2 stays within one"],
        ),
        (1, 6, 2, 3, ["parallel.zero_ranks=2: 2 neighbouring ranks have the shards, and a node has 3, so that shards go between nodes: "
                      "parallel.zero_ranks=3 stays within one"]),
        (2, 4, 4, 2, ["parallel.zero_ranks=4: 8 neighbouring ranks have the shards, and a node has 2, so that shards go between nodes"]),
    ],
)  # fmt: skip
def test_shards_that_go_between_nodes_are_told(tp, dp, zero_ranks, of_node, said):
    parallel = ParallelConfig(tensor_parallel_size=tp, zero_ranks=zero_ranks)
    shape = MeshShape(tp=tp, dp=dp, zero_ranks=zero_ranks)
    assert simulate(shape, lambda ctx: watch.between_nodes(parallel, ctx, of_node))[0] == said


def test_rank_0_alone_looks_up_documents_and_all_ranks_end_with_the_same_words(tmp_path, monkeypatch):
    """On a node of its own too."""
    asked = []

    def documents(samples, window):
        asked.append((samples.rank, window))
        return [{"file": "data.bin", "document": 30, "offset": 1200, "tokens": 9}]

    monkeypatch.setattr(watch, "documents", documents)

    def rank(ctx):
        number, folder = ctx.world.rank, tmp_path / f"node{ctx.world.rank}"
        launch = SimpleNamespace(rank=number, local_rank=0, job="7")
        left_out = SimpleNamespace(rank=number, window=lambda first, end: (first, end))
        job = SimpleNamespace(session=SimpleNamespace(rank=number, launch=launch), ctx=ctx, left_out=left_out, step=9)
        job.spikes = SimpleNamespace(bad=None)
        of = watch.Watch.__new__(watch.Watch)
        of.job, of.config = job, SimpleNamespace(log=SimpleNamespace(dir=str(folder)), checkpoint_dir=str(folder))
        folder.mkdir()
        (folder / "latest").write_text("step_00000004")
        with RunLog(folder, total_steps=20, sequence_length=4, rank=number) as of.log:
            of._spiked(SimpleNamespace(step=8, consumed_samples=32, samples=4), [])
            bad = Bad(first=7, last=9, consumed=36, samples=4, why="nan")
            error = of._ended(bad, Diverged("step 9: nan"))
        return str(error), json.loads((folder / "diverged").read_text())["why"]

    (said, marked), (other, same) = simulate(2, rank)
    assert asked == [(0, (28, 32)), (0, (32, 36)), (0, (24, 36))]
    assert said == other == marked == same
    assert said.startswith(
        "step 9: nan. Look at document 30 of data.bin, its 9 tokens from token 1200 of the file and what else"
    )
    assert [json.loads(line)["event"] for line in (tmp_path / "node0/events.jsonl").read_text().splitlines()] == [
        "spike",
        "diverged",
    ]
    assert not (tmp_path / "node1/events.jsonl").exists() and not (tmp_path / "node1/spikes").exists()


@pytest.mark.parametrize("loss", [24.0, math.nan, math.inf])
def test_an_evaluation_that_is_not_finite_is_an_event(monkeypatch, loss):
    sets = {"news": Evaluation(12.0, 4.0, {}), "code": Evaluation(loss, 4.0, {})}
    monkeypatch.setattr(watch, "evaluate", lambda *_: Evaluation(12.0 + loss, 8.0, {}, sets))
    config = SimpleNamespace(train=SimpleNamespace(eval_batches=0))
    run = Mock(
        job=SimpleNamespace(step=7, stop_requested=bool), guard=Mock(section=lambda _: nullcontext()), config=config, tokens=0
    )
    watch.Watch.evaluate(run, Pause(7, last=False, stop=False))
    message = f"the evaluation after step 7 gave a loss of {loss:g}, by code"
    told = [] if loss == 24.0 else [(("bad_evaluation",), {"sets": ["code"], "message": message})]
    assert run._event.call_args_list == told
    assert run.log.say.call_args_list == [((message,), {})][: len(told)]
    assert run.log.evaluation.call_count == 1
