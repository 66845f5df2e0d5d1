"""Rows of padding behind a rank's vocabulary: where there are any, and that nothing sees them, in training and after it."""

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

from megatrain.checkpoint.save import Contents, save
from megatrain.cli import main as cli
from megatrain.config.load import dump, from_dict
from megatrain.inference.plain import load
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.parallel import param, vocabulary
from megatrain.parallel.mesh import Axis, MeshShape, ParallelContext, Rows
from megatrain.parallel.param import Init, Parameter, ParamSpec, Place, Split, initialise, padded
from megatrain.parallel.portion import Portion
from megatrain.parallel.vocabulary import Target, VocabParallelHead, vocab_parameter
from megatrain.testing import simulate
from megatrain.testing.agree import agree
from megatrain.testing.control import last_steps
from megatrain.testing.layouts import Layout
from megatrain.testing.resumed import continued, interrupted
from megatrain.testing.trace import trace_run

V, H = 497, 16
"""497 rows have 15 of padding, the 249 and 248 of two ranks 7 and 8, the 125 and the last 122 of four ranks 3 and 6."""
SINGLE = ParallelContext.single()


@pytest.mark.parametrize(
    ("rows", "there"),
    [
        (1, 1), (101, 101), (128, 128), (261, 261), (124, 124), (125, 128), (1000, 1024), (3969, 3969), (4065, 4096), (4097, 4224),
        (12565, 12672), (32000, 32000), (50257, 50304), (50304, 50304),
    ],
)  # fmt: skip
def test_rows_are_padded_to_whole_tiles_where_that_is_cheap(rows, there):
    assert padded(rows) == there


@pytest.mark.parametrize(("ranks", "there", "last"), [(1, 50304, 50257), (2, 25216, 25128), (4, 12672, 12562), (8, 6400, 6276)])
def test_which_rows_gpt2_has_on_each_rank(ranks, there, last):
    """The ids of a rank are those it had without padding, ceil(v / t) each."""
    spec = ParamSpec("embedding.tokens", (50257, 768), Split(0, 50257, pad=True))
    assert spec.local_shape(ranks) == (there, 768) and spec.numel == 50257 * 768
    rows = [spec.slices(ranks, rank)[0] for rank in range(ranks)]
    most = -(-50257 // ranks)
    assert [r.start for r in rows] == [most * rank for rank in range(ranks)]
    assert rows[-1].stop == 50257 and rows[-1].stop - rows[-1].start == last


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_products_of_a_head_are_whole_tiles(monkeypatch, chunk):
    shapes = []
    for name in ("linear", "matmul", "add_matmul"):
        plain = getattr(vocabulary, name)
        monkeypatch.setattr(
            vocabulary, name, lambda *of, plain=plain, name=name: (shapes.append((name, *of[1].shape)), plain(*of))[1]
        )
    weight = vocab_parameter(ParamSpec("head", (50257, 8)), Place(Rows(SINGLE.tp), torch.float32, SINGLE.device))
    x = torch.ones(3, 1, 8).requires_grad_()
    loss, _ = VocabParallelHead(weight, Rows(SINGLE.tp), chunk=chunk).loss(x, torch.tensor([[0], [5], [50256]]))
    loss.sum().backward()
    assert {("linear", 50304, 8), ("matmul", 50304, 8)} == {shape for shape in shapes if shape[0] != "add_matmul"}
    torch.testing.assert_close(
        loss.detach(), torch.full((3, 1), 10.82490), rtol=0, atol=1e-4
    )  # log 50257; log 50304 is 10.8258
    assert weight.grad.shape == (50304, 8) and (weight.grad[50257:] == 0).all() and (weight.grad[:50257] != 0).any()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("chunk", [0, 5])
def test_a_zero_is_no_logit(ranks, chunk):
    """Where all logits are negative, those of padding would be the largest."""

    def on(ctx):
        weight = vocab_parameter(
            ParamSpec("head", (V, H), init=Init("constant", -1.0)), Place(Rows(ctx.tp), torch.float64, ctx.device)
        )
        initialise(weight, ctx.tp, 0)
        x, labels = torch.ones(6, 1, H, dtype=torch.float64), torch.arange(V - 6, V).view(6, 1)
        target = Target(label_smoothing=0.1, z_loss=0.01)
        loss, correct = VocabParallelHead(weight, Rows(ctx.tp), 30.0, chunk).loss(x.requires_grad_(), labels, target)
        loss.sum().backward()
        return loss.detach(), correct, x.grad, weight.grad, weight.spec.slices(ctx.tp.size, ctx.tp.rank)[0]

    logits = (30 * torch.tanh(torch.full((6, V), -float(H), dtype=torch.float64) / 30)).requires_grad_()
    total = logits.logsumexp(-1)
    expected = functional.cross_entropy(logits, torch.arange(V - 6, V), reduction="none", label_smoothing=0.1) + 0.01 * total**2
    for loss, correct, _, gradient, rows in simulate(MeshShape(tp=ranks), on):
        torch.testing.assert_close(loss.flatten(), expected.detach())
        assert correct.all(), "all ids tie"
        assert (gradient[rows.stop - rows.start :] == 0).all() and (gradient[: rows.stop - rows.start] != 0).all()


# --- runs -------------------------------------------------------------------------------------------------------------


def config_of(tied=True, chunk=0, precision="fp64", steps=20, **optim):
    return from_dict(
        {
            "model": {
                "num_layers": 2, "hidden_size": H, "num_attention_heads": 4, "seq_length": 6, "vocab_size": V, "init_std": 0.2,
                "tied_embeddings": tied, "logit_softcap": 5.0,
            },
            "optim": {"lr": 1e-2, "warmup_steps": 1, "weight_decay": 0.1, "clip_grad": 0.5, **optim},
            "train": {
                "steps": steps, "global_batch_size": 4, "micro_batch_size": 2 if steps > 8 else 1, "precision": precision, "z_loss": 0.01,
                "label_smoothing": 0.1, "loss_chunk": chunk,
            },
            "parallel": {"bucket_size": 3000},
        }
    )  # fmt: skip


def traced(name, config, work=trace_run, *more, **options):
    """The trace of the first rank of a layout."""
    layout = Layout.parse(name)
    return simulate(layout.shape, lambda ctx: work(ctx, layout.apply(config), config.train.steps, *more, **options))[0]


def padding_of(named, ctx):
    """Rows behind the ids in each tensor of a vocabulary: name -> [padding, h]."""
    found = {}
    for name, (spec, tensor) in named.items():
        if spec.split is not None and spec.split.pad:
            rows = spec.slices(ctx.tp.size, ctx.tp.rank)[0]
            found[name] = tensor[rows.stop - rows.start :]
    return found


@pytest.mark.parametrize(
    ("layout", "tied", "options"),
    [
        ("single", True, {}),
        ("single", False, {"chunk": 5, "precision": "bf16"}),
        ("tp2-sp-dp2-zero2", True, {"chunk": 4, "steps": 10}),
        ("tp4-pp2", True, {"name": "sgd", "steps": 5}),
        ("tp2-dp2-zero3-split", False, {"precision": "bf16", "steps": 10}),
    ],
    ids=str,
)
def test_padding_is_zero_after_many_steps(layout, tied, options, one_thread):
    """Its weights, gradients, masters and moments; buffers of gradients hold NaN before they are written."""
    parsed, seen = Layout.parse(layout), []
    config = parsed.apply(config_of(tied, **options))

    def rank(ctx):
        runs, gradients = [], []

        def prepare(run):
            runs.append(run)
            plain, forget = run.optimizer.step, run.flat._forget

            def step(*given):
                flat = run.flat
                of = [(local, local.own_grads) for local in flat.trained]
                gradients.append({name: rows.clone() for name, rows in padding_of(flat.whole(of), ctx).items()})
                plain(*given)

            def poisoned(local, grads):
                grads.fill_(torch.nan)
                forget(local, grads)

            run.optimizer.step, run.flat._forget = step, poisoned

        trace_run(ctx, config, config.train.steps, prepare=prepare)
        kinds = {kind: padding_of(named, ctx) for kind, named in runs[0].optimizer.tensors().items()}
        weights = {p.spec.name: (p.spec, p.detach()) for chunk in runs[0].chunks for p in chunk.logical_parameters()}
        if config.parallel.zero_stage < 3:
            kinds["parameters"] = padding_of(weights, ctx)
        return kinds, gradients

    for kinds, gradients in simulate(parsed.shape, rank):
        assert len(gradients) == config.train.steps
        for named in (*kinds.values(), *gradients):
            for rows in named.values():
                assert len(rows) in {3, 6, 7, 8, 15} and torch.equal(rows, torch.zeros_like(rows))
                seen.append(len(rows))
    assert len(seen) >= config.train.steps + 2


@pytest.fixture(scope="module")
def unpadded(tmp_path_factory):
    """A run without padding, as all were once, and its checkpoint after two of four steps."""
    folder = tmp_path_factory.mktemp("unpadded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(param, "padded", lambda rows: rows)
        trace = interrupted(SINGLE, config_of(steps=4), 4, 2, folder)
        assert Parameter(torch.zeros(0), ParamSpec("e", (V, H), Split(0, V, pad=True))).spec.local_shape(1) == (V, H)
    return trace, folder / "step_00000002"


@pytest.mark.parametrize("layout", ["single", "tp2-sp", "tp4-dp2-zero3"])
def test_a_run_has_the_numbers_of_one_without_padding_and_goes_on_from_its_checkpoint(unpadded, layout, tmp_path, one_thread):
    """And one process goes on from the checkpoint of either."""
    trace, path = unpadded
    agree(trace, traced(layout, config_of(steps=4), interrupted, 2, tmp_path))
    agree(last_steps(trace, 2), traced(layout, config_of(steps=4), continued, 2, path))
    agree(last_steps(trace, 2), traced("single", config_of(steps=4), continued, 2, tmp_path / "step_00000002"))


# --- after training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_whole_logits_are_those_of_the_vocabulary(ranks):
    tokens = torch.tensor([[3], [V - 1], [250]])
    batch = MicroBatch(tokens, tokens, torch.ones(3, 1), torch.arange(3)[:, None], torch.arange(1))

    def on(ctx):
        config = config_of().model
        model = build_gpt(Build(Rows(ctx.tp), torch.float64, ctx.device, config, V, seed=1))[0]
        return model.head.logits(model(None, batch))

    alone = simulate(MeshShape(), on)[0]
    assert alone.shape == (3, 1, V) and alone.isfinite().all() and (alone != 0).all()
    for logits in simulate(MeshShape(tp=ranks), on):
        torch.testing.assert_close(logits, alone)


def test_nothing_of_it_is_in_a_checkpoint_or_an_export(tmp_path):
    config = config_of()
    config = from_dict({"model": {**vars(config.model), "logit_softcap": 0.0, "preset": None}})
    model = build_gpt(Build(Rows(SINGLE.tp), torch.float32, SINGLE.device, config.model, V, seed=3))[0]
    weights = {p.spec.name: Portion.whole(p.spec, p.detach()) for p in model.logical_parameters()}
    saved = save(tmp_path / "run/checkpoints", Contents(1, {}, dump(config)), {"weights": weights}, SINGLE)
    rows = [len(p) for p in model.parameters() if p.spec.name == "embedding.tokens"]
    assert rows == [512]
    stored = {
        name: tuple(file.get_slice(name).get_shape())
        for path in saved.glob("*.safetensors")
        for file in [safe_open(path, "pt")]
        for name in file.keys()  # noqa: SIM118
    }
    assert stored["embedding.tokens"] == (V * H,)
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as file:
        exported = file.get_tensor("transformer.wte.weight")
    assert torch.equal(exported, model.embedding.tokens.weight[:V]) and exported.shape == (V, H)
    logits = load(tmp_path / "hf")(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, V)
    torch.testing.assert_close(logits, load(tmp_path / "run")(torch.tensor([[1, 2, 3]])))


def test_an_id_of_the_next_rank_is_not_looked_up_in_the_padding():
    spec = ParamSpec("e", (V, 1), Split(0, V, pad=True))
    weight = Parameter(torch.ones(spec.local_shape(4)), spec)
    axis = Axis("tp", 4, 1, (0, 1, 2, 3))
    assert list(vocabulary.ids_of(weight, axis)) == list(range(125, 250)) and len(weight) == 128
