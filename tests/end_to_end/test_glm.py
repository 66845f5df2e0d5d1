"""GLM-1 and ChatGLM-6B against independent models: logits, loss, gradients, five AdamW steps; their files in both directions."""

import dataclasses
import json

import pytest
import torch
from reference_glm import GLM1, ChatGLM, spread, values
from safetensors.torch import load_file, save_file

import megatrain
from megatrain.assembly import assemble
from megatrain.checkpoint.together import ContentError
from megatrain.config.load import from_dict
from megatrain.config.schema import ModelConfig
from megatrain.data.loader import Loader
from megatrain.inference.engine import EngineSettings
from megatrain.inference.glm_positions import Marks, places_of
from megatrain.inference.opening import opened
from megatrain.inference.requests import Request, Sampling
from megatrain.init_from import shapes_of, start_from
from megatrain.kernels.attention_mask import AttentionMask
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.models.position import _angles
from megatrain.parallel.mesh import MeshShape, ParallelContext, Rows
from megatrain.testing import simulate
from megatrain.testing.trace import random_source
from megatrain.training import train_step
from megatrain.verbs.exchange import export_hf, import_hf

V, H, HEADS, LAYERS, LENGTH = 101, 32, 4, 3, 40
GLM1_CONFIG = {
    "model_type": "glm",
    "architectures": ["GLMModel"],
    "num_layers": LAYERS,
    "hidden_size": H,
    "num_attention_heads": HEADS,
    "max_sequence_length": LENGTH,
    "vocab_size": V,
    "block_position_encoding": True,
    "relative_encoding": False,
    "embedding_dropout_prob": 0.0,
    "attention_dropout_prob": 0.0,
    "output_dropout_prob": 0.0,
    "torch_dtype": "float32",
}
CHATGLM_CONFIG = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "num_layers": LAYERS,
    "hidden_size": H,
    "inner_hidden_size": 4 * H,
    "num_attention_heads": HEADS,
    "max_sequence_length": LENGTH,
    "vocab_size": V,
    "layernorm_epsilon": 1e-5,
    "position_encoding_2d": True,
    "bos_token_id": 99,
    "eos_token_id": 100,
    "mask_token_id": 97,
    "gmask_token_id": 98,
    "torch_dtype": "float32",
}
MODELS = {
    "glm-1": (lambda: spread(GLM1(LAYERS, H, HEADS, V, LENGTH)), GLM1_CONFIG),
    "chatglm-6b": (lambda: spread(ChatGLM(LAYERS, H, HEADS, V)), CHATGLM_CONFIG),
}


def directory(case, path):
    """(the reference, a directory of its files)."""
    make, config = MODELS[case]
    model = make()
    path.mkdir()
    save_file(model.state_dict(), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return model, path


def prompts(b=3, s=30):
    """tokens [b, s], positions [b, 2, s], sep [b], drawn."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, V, (b, s), generator=generator)
    positions = torch.randint(0, LENGTH, (b, 2, s), generator=generator)
    return tokens, positions, torch.tensor([0, 11, s])[:b]


@pytest.mark.parametrize("case", MODELS)
def test_logits_and_gradients(tmp_path, case):
    reference, path = directory(case, tmp_path / "hf")
    reference.double()
    ours = megatrain.load(path, dtype=torch.float64)
    given = prompts()
    want, got = reference(*given), ours(*given)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    scale = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (want * scale).sum().backward()
    (got * scale).sum().backward()
    gradients = values(reference.logical(), lambda p: p.grad)
    mine = {p.spec.name: p.grad for p in ours.gpt.logical_parameters()}
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-8, atol=1e-8, msg=name)


def config_of(path, layout=None, **glm):
    mix = {"blank": 1.0, "sentence": 0.0, "document": 1.0}
    return from_dict(
        {
            "model": {"init_from": str(path)},
            "data": {"train": "random", "objective": "glm", "glm": {"objective_mix": mix, **glm}},
            "optim": {"lr": 1e-3, "min_lr": 1e-3, "lr_schedule": "constant", "warmup_steps": 0, "weight_decay": 0.1},
            "train": {"steps": 5, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp64"},
            "parallel": layout or {},
        },
        shapes_of,
    )


def our_training(ctx, config, path):
    """(losses and gradient norms of five steps, weights where they are whole)."""
    samples, compose = random_source(config, V)
    with Loader(samples, 8, 2, ctx.dp.rank, ctx.dp.size, compose=compose) as loader:
        run = assemble(config, ctx, loader, V)
        start_from(run, path)
        reports = [train_step(run) for _ in range(5)]
    weights = {p.spec.name: p.detach().clone() for p in run.flat.parameters} if ctx.world.size == 1 else {}
    return [(r.loss, r.grad_norm) for r in reports], weights


def their_training(reference, config):
    """The same with the reference and torch.optim.AdamW, on the same batches."""
    norms = [p for p in reference.parameters() if p.dim() < 2]
    matrices = [p for p in reference.parameters() if p.dim() >= 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    samples, compose = random_source(config, V)
    loader, found = Loader(samples, 8, 2, 0, 1, compose=compose), []
    per_micro_batch = config.data.glm.loss_norm == "microbatch"
    for step in range(5):
        batch = loader.build(8 * step)
        arrays = (batch.tokens, batch.labels, batch.loss_weights, batch.positions, batch.block_positions, batch.prefix)
        micro_batches = [tuple(torch.from_numpy(a[m]) for a in arrays) for m in range(len(batch.tokens))]
        optimizer.zero_grad()
        losses, weights = [], []
        for tokens, labels, weight, positions, inside, sep in micro_batches:
            logits = reference(tokens, torch.stack([positions, inside], 1), sep)
            each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            losses.append((each.view_as(weight) * (weight > 0)).sum())
            weights.append((weight > 0).sum())
        means = [a / b.clamp_min(1) for a, b in zip(losses, weights, strict=True)]
        counted = sum(w > 0 for w in weights)
        loss = sum(means) / counted if per_micro_batch else sum(losses) / sum(weights)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


LAYOUTS = {
    "one": (MeshShape(), {}),
    "tp2": (MeshShape(tp=2), {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "pp3": (MeshShape(pp=3), {"pipeline_parallel_size": 3}),
    "zero3": (MeshShape(dp=2), {"zero_stage": 3}),
}


@pytest.mark.parametrize("glm", [{}, {"loss_norm": "microbatch"}], ids=["global", "microbatch"])
@pytest.mark.parametrize("case", MODELS)
def test_five_steps_under_every_layout(tmp_path, case, glm, one_thread):
    reference, path = directory(case, tmp_path / "hf")
    want = their_training(reference.double(), config_of(path, **glm))
    assert want[0][1] > 1, "clipping is to be at work"
    after = values(reference.logical())
    for name, (shape, layout) in LAYOUTS.items():
        config = config_of(path, layout, **glm)
        config = dataclasses.replace(config, log=dataclasses.replace(config.log, dir=str(tmp_path / name)))
        for got, weights in simulate(shape, our_training, config, path):
            for mine, theirs in zip(got, want, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-6 if glm else 1e-9), name  # weights of the loss are float32
            for key, weight in weights.items():
                torch.testing.assert_close(weight, after[key].detach(), rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("case", MODELS)
def test_files_in_both_directions(tmp_path, case):
    _, source = directory(case, tmp_path / "hf")
    import_hf(source, tmp_path / "run")
    given = prompts()
    assert torch.equal(megatrain.load(tmp_path / "run")(*given), megatrain.load(source)(*given))
    export_hf(tmp_path / "run", tmp_path / "back", None, None)
    want, got = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())
    (tmp_path / "run/checkpoints/hf/config.json").unlink()
    export_hf(tmp_path / "run", tmp_path / "anew", None, None)
    assert torch.equal(megatrain.load(tmp_path / "anew")(*given), megatrain.load(source)(*given))


def test_a_tied_chatglm_is_stored_with_its_head(tmp_path):
    reference, source = directory("chatglm-6b", tmp_path / "hf")
    state = {**reference.state_dict(), "lm_head.weight": reference.transformer.word_embeddings.weight.detach().clone()}
    save_file(state, source / "model.safetensors")
    change(source, tie_word_embeddings=True)
    import_hf(source, tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "back", None, None)
    back = load_file(tmp_path / "back/model.safetensors")
    assert torch.equal(back["lm_head.weight"], back["transformer.word_embeddings.weight"])
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    save_file(state, source / "model.safetensors")
    with pytest.raises(ContentError, match="is not its embedding, and the model ties the two"):
        megatrain.load(source)


def test_names_of_the_hub(tmp_path):
    reference, source = directory("glm-1", tmp_path / "hf")
    want = megatrain.load(source)(*prompts())
    save_file({f"glm.{name}": tensor for name, tensor in reference.state_dict().items()}, source / "model.safetensors")
    assert torch.equal(megatrain.load(source)(*prompts()), want)
    change(source, output_dropout_prob=0.1)
    with pytest.raises(ContentError, match="embedding_dropout_prob and output_dropout_prob of"):
        megatrain.load(source)


def change(path, **keys):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **keys}))


def test_chatglm_reads_places_off_its_ids(tmp_path):
    reference, path = directory("chatglm-6b", tmp_path / "hf")
    tokens = torch.tensor([[5, 6, 7, 98, 99, 8, 9], [5, 97, 7, 8, 9, 99, 3]])  # text [gMASK] <sop>, and text with a [MASK]
    positions = torch.tensor(
        [
            [[0, 1, 2, 3, 3, 3, 3], [0, 0, 0, 0, 1, 2, 3]],
            [[0, 1, 2, 3, 4, 1, 1], [0, 0, 0, 0, 0, 1, 2]],
        ]
    )
    want = reference.double()(tokens, positions, torch.tensor([4, 5]))
    torch.testing.assert_close(megatrain.load(path, dtype=torch.float64)(tokens), want, rtol=1e-9, atol=1e-9)


def test_an_opened_chatglm_answers_at_its_blank(tmp_path):
    _, path = directory("chatglm-6b", tmp_path / "hf")
    model, prompts = megatrain.load(path), [(5, 6, 7, 98, 99), (5, 97, 7, 8, 9, 99)]
    with opened(path, settings=EngineSettings(block=4, cache_tokens=256)) as found:
        asked = [Request(prompt, 6, Sampling(greedy=True), score_from=1, places=found.places(prompt)) for prompt in prompts]
        answers = found.engine.run(asked)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt, *(scored.token for scored in answer.tokens)]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([ids])), -1)[0]
        wanted = [float(logprobs[n - 1, token]) for n, token in enumerate(ids) if n]
        assert [scored.logprob for scored in (*answer.prompt, *answer.tokens)] == pytest.approx(wanted, abs=1e-4)


def test_places_in_one_dimension():
    marks = Marks(sop=99, gmask=98, mask=97)
    tokens = torch.tensor([[5, 6, 98, 99, 8, 9], [5, 97, 7, 99, 3, 4], [1, 2, 3, 4, 5, 6]])
    places = places_of(tokens, marks, two_dimensional=False)
    assert places.positions.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 1, 1, 1], [0, 1, 2, 3, 4, 5]]
    assert places.sep.tolist() == [3, 3, 6]


def test_angles_of_the_released_weights():
    tables = []
    for kind in ("fp32", "fp16"):
        model = ModelConfig(position="rope_2d", head_dim=128, seq_length=2048, rope_angle_dtype=kind)
        tables.append(_angles(model).cos())
    off = (tables[0] - tables[1]).abs().amax(1)
    assert [round(float(off[place]), 3) for place in (24, 512, 2047)] == [0.003, 0.071, 0.157]


def test_causal_is_the_special_case_without_a_prefix():
    def logits(position, prefix):
        model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=20, position=position, init_std=0.3)
        ctx = ParallelContext.single()
        (gpt,) = build_gpt(Build(Rows(ctx.tp), torch.float64, ctx.device, model, V, seed=3))
        tokens = prompts()[0][:, :20].t()
        if position == "learned_2d":
            with torch.no_grad():
                gpt.embedding.positions.weight[:20] = plain.embedding.positions.weight
                gpt.embedding.block_positions.weight.zero_()
        places = torch.arange(20)[:, None].expand_as(tokens)
        batch = MicroBatch(tokens, tokens, torch.ones(20, 3), places, torch.arange(3), mask=AttentionMask(prefix=prefix))
        return gpt, gpt.head.logits(gpt(None, batch))

    plain, want = logits("learned", None)
    _, got = logits("learned_2d", torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
