"""Training from a Hugging Face directory, under every kind of layout, against transformers with torch's own AdamW."""

import copy
import dataclasses

import pytest
import torch

from megatrain.assembly import assemble
from megatrain.checkpoint.together import ContentError
from megatrain.config.load import from_dict
from megatrain.data.loader import Loader
from megatrain.init_from import shapes_of, start_from
from megatrain.parallel.mesh import MeshShape
from megatrain.testing import simulate
from megatrain.testing.trace import RandomSamples
from megatrain.training import train_step

pytest.importorskip("transformers", reason="pip install 'megatrain[test]'")
from hf_models import V, made, write, write_chatglm

LAYOUTS = {
    "one": {},
    "tp2": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel_size": 2},
    "zero3": {"zero_stage": 3},
}
CASES = [
    "gpt2",
    "llama 3.1, tied, wide heads",
    "mistral, window, multi-query",
    "qwen2",
    "qwen3",
    "bloom",
    "glm",
    "glm4",
    "chatglm",
]
LR, CLIP = 1e-3, 1.0


def config_of(path, layout):
    train = {"steps": 5, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"}
    optim = {"lr": LR, "min_lr": LR, "lr_schedule": "constant", "warmup_steps": 0, "weight_decay": 0.1, "clip_grad": CLIP}
    sections = {
        "model": {"init_from": str(path), "seq_length": 32},  # of 64 positions
        "parallel": layout,
        "train": train,
        "optim": optim,
    }
    return from_dict(sections, shapes_of)


def our_losses(ctx, config, path):
    """(loss, gradient norm) of five steps."""
    samples = RandomSamples(V, config.model.seq_length)
    with Loader(samples, 4, 2, ctx.dp.rank, ctx.dp.size) as loader:
        run = assemble(config, ctx, loader, V)
        start_from(run, path)
        reports = [train_step(run) for _ in range(5)]
    return [(r.loss, r.grad_norm) for r in reports]


def their_losses(case):
    """The same with transformers and torch.optim.AdamW; matrices decay, as ours do."""
    model = copy.deepcopy(made("glm" if case == "chatglm" else case))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    samples, found = RandomSamples(V, 32), []
    for step in range(5):
        tokens = torch.stack([torch.from_numpy(samples.sample(4 * step + n)) for n in range(4)])
        optimizer.zero_grad()
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


@pytest.mark.parametrize("case", CASES)
def test_five_steps_follow_transformers_under_every_layout(tmp_path, case, one_thread):
    path = write_chatglm(tmp_path / "hf") if case == "chatglm" else write(case, tmp_path / "hf")
    want = their_losses(case)
    assert want[0][1] > CLIP, "clipping is to be at work"
    for name, layout in LAYOUTS.items():
        config = config_of(path, layout)
        shape = MeshShape(
            tp=config.parallel.tensor_parallel_size, pp=config.parallel.pipeline_parallel_size, dp=2 if name == "zero3" else 1
        )
        config = dataclasses.replace(config, log=dataclasses.replace(config.log, dir=str(tmp_path / name)))
        for got in simulate(shape, our_losses, config, path):
            for (loss, norm), (their_loss, their_norm) in zip(got, want, strict=True):
                assert loss == pytest.approx(their_loss, rel=1e-5), name
                assert norm == pytest.approx(their_norm, rel=1e-5), name


def test_ranks_that_find_other_weights_in_their_directories_start_from_none(tmp_path, one_thread):
    """One number of one tensor differs; or one of them is no Hugging Face directory."""
    paths = [write("gpt2", tmp_path / name) for name in ("0", "1")]
    weights = bytearray((paths[1] / "model.safetensors").read_bytes())
    weights[-4] ^= 1
    (paths[1] / "model.safetensors").write_bytes(weights)
    config = config_of(paths[0], {})
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, dir=str(tmp_path / "run")))

    def attempt(ctx, paths):
        with pytest.raises(ContentError) as error:
            our_losses(ctx, config, paths[ctx.world.rank])
        return str(error.value)

    size = len(weights)
    for said in simulate(MeshShape(dp=2), attempt, paths):
        assert "than rank 0: [1]. On rank 0 it is model.safetensors of" in said
        assert said.count(f"model.safetensors of {size} bytes with the hash ") == 2
    for said in simulate(MeshShape(dp=2), attempt, [paths[0], tmp_path]):
        assert "On rank 0 it is config.json of" in said and "; on rank 1, a checkpoint. Copy the one" in said
