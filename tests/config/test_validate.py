"""Each rule between knobs refuses with the numbers, the key and a value that works, and that value does work."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from megatrain.config.budget import warmup_of
from megatrain.config.keys import choices, knobs
from megatrain.config.load import ConfigError, from_dict
from megatrain.config.validate import validate
from megatrain.inference.trained import laid_out
from megatrain.program import require_memory, require_precision

ADVICE = re.compile(r" (Use|or) (?:for example )?([a-z_]+\.[a-z_.]+)=(\[[^\]]*\]|[^ ,]+?)(?=[,.:]? |\.$)")
"""A key and its value in the advice of an error."""
BASE = {"model": {"vocab_size": 101}, "data": {"train": "PREFIX"}}


def check(world_size=1, **values):
    """Validate the default config with `section__key=value` changed."""
    tree = {section: dict(keys) for section, keys in BASE.items()}
    for key, value in values.items():
        *groups, name = key.split("__")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    validate(from_dict(tree), world_size)


def refusal(world_size=1, **values):
    """The one-line message with which `check` fails."""
    with pytest.raises(ConfigError) as raised:
        check(world_size, **values)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "world_size, values",
    [
        (1, {}),
        (1, {"model__vocab_size": None, "data__tokenizer": "bytes"}),
        (8, {"parallel__tensor_parallel_size": 8}),
        (4, {"parallel__zero_ranks": 2}),
        (8, {"parallel__tensor_parallel_size": 2, "parallel__zero_ranks": 4, "parallel__zero_stage": 3}),
        (8, {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True}),
        (4, {"parallel__tensor_parallel_size": 4, "model__num_query_groups": 2}),
        (2, {"parallel__tensor_parallel_size": 2, "model__num_query_groups": 4}),
        (4, {"parallel__tensor_parallel_size": 4, "model__num_query_groups": 1}),
        (1, {"parallel__sequence_parallel": True, "model__seq_length": 7}),
        (2, {"parallel__tensor_parallel_size": 2, "model__seq_length": 7}),
        (2, {"parallel__tensor_parallel_size": 2, "model__vocab_size": 101}),
        (1, {"model__position": "rope"}),
        (1, {"model__preset": "gpt2_124m", "model__seq_length": 512}),
        (1, {"optim__name": "sgd", "train__precision": "fp64", "parallel__device": "cpu"}),
        (1, {"train__precision": "fp64"}),
        (1, {"optim__lr_schedule": "constant", "optim__lr": 1e-6}),
        (1, {"optim__lr_schedule": "wsd", "optim__warmup_steps": 900}),
        (1, {"train__steps": 3}),
        (1, {"train__steps": 10, "optim__lr_schedule": "wsd", "optim__decay_fraction": 1.0}),
        (1, {"train__steps": 1, "optim__warmup_steps": 0}),
        (1, {"train__steps": 11, "optim__lr_schedule": "wsd"}),
        (1, {"train__steps": 10, "train__skip_steps": [10]}),
        (1, {"model__embedding_grad_scale": 0.1, "model__embedding_grad_steps": [0, 1]}),
        (1, {"log__to": []}),
        (1, {"optim__clip_grad": 0, "train__eval_every": 0, "checkpoint__save_every": 0, "checkpoint__keep": 0}),
    ],
)
def test_what_is_accepted(world_size, values):
    check(world_size, **values)


@pytest.mark.parametrize(
    "world_size, values, expected",
    [
        (
            8,
            {"parallel__tensor_parallel_size": 8, "model__num_attention_heads": 12, "model__hidden_size": 768},
            "model.num_attention_heads=12 cannot be split over parallel.tensor_parallel_size=8. Use 1, 2, 3, 4, 6 or 12 "
            "(in a world of size 8: 1, 2 or 4).",
        ),
        (
            24,
            {"parallel__tensor_parallel_size": 8, "model__num_attention_heads": 12, "model__hidden_size": 768},
            "model.num_attention_heads=12 cannot be split over parallel.tensor_parallel_size=8. Use 1, 2, 3, 4, 6 or 12.",
        ),
        (
            4,
            {
                "parallel__tensor_parallel_size": 4,
                "model__num_attention_heads": 12,
                "model__hidden_size": 768,
                "model__num_query_groups": 3,
            },
            "model.num_query_groups=3 cannot be split over parallel.tensor_parallel_size=4. Use 1, 3, 6 or 12 "
            "(in a world of size 4: 1).",
        ),
        (
            4,
            {"parallel__tensor_parallel_size": 4, "model__ffn_hidden_size": 1366},
            "model.ffn_hidden_size=1366 cannot be split over parallel.tensor_parallel_size=4. Use 1 or 2.",
        ),
        (
            4,
            {"parallel__tensor_parallel_size": 4, "parallel__sequence_parallel": True, "model__seq_length": 130},
            "with parallel.sequence_parallel=true, model.seq_length=130 cannot be split over "
            "parallel.tensor_parallel_size=4. Use 1 or 2.",
        ),
        (
            3,
            {"parallel__tensor_parallel_size": 2},
            "a world of size 3 cannot be split over parallel.tensor_parallel_size=2 x parallel.pipeline_parallel_size=1 x "
            "parallel.context_parallel_size=1 = 2 ranks a replica. Start 2 or 4 processes, or parallel.tensor_parallel_size=1.",
        ),
        (
            2,
            {"parallel__tensor_parallel_size": 4},
            "a world of size 2 cannot be split over parallel.tensor_parallel_size=4 x parallel.pipeline_parallel_size=1 x "
            "parallel.context_parallel_size=1 = 4 ranks a replica. Start 4 processes, or parallel.tensor_parallel_size=1 or 2.",
        ),
        (
            4,
            {"parallel__zero_ranks": 3},
            "parallel.zero_ranks=3 does not divide the 4 data-parallel ranks of a world of size 4. "
            "Use parallel.zero_ranks=1, 2 or 4, or null: all of them.",
        ),
        (
            4,
            {"parallel__zero_ranks": 4, "parallel__tensor_parallel_size": 2},
            "parallel.zero_ranks=4 does not divide the 2 data-parallel ranks of a world of size 4. "
            "Use parallel.zero_ranks=1 or 2, or null: all of them.",
        ),
        (
            2,
            {"parallel__zero_ranks": 2, "parallel__zero_stage": 0},
            "parallel.zero_ranks=2 has no effect: it has one when parallel.zero_stage is 1, 2 or 3, and here parallel.zero_stage=0. "
            "Change that, or leave parallel.zero_ranks out (its default is null).",
        ),
        (4, {"parallel__zero_ranks": 0}, "parallel.zero_ranks=0 must be greater than 0. Use for example null."),
        (0, {}, "a world of 0 ranks cannot train anything. Start 1 process or more."),
        (
            4,
            {"parallel__pipeline_parallel_size": 4, "parallel__virtual_pipeline_size": 2, "model__num_layers": 6},
            "model.num_layers=6 cannot be split over parallel.pipeline_parallel_size=4 x parallel.virtual_pipeline_size=2 = "
            "8 virtual stages: each needs a layer. Use model.num_layers=8 or more, or parallel.pipeline_parallel_size=3.",
        ),
        (
            2,
            {"parallel__pipeline_parallel_size": 2, "parallel__layer_split": [4, 5], "model__num_layers": 8},
            "parallel.layer_split=[4, 5] has 9 layers on 2 virtual stages, but there are model.num_layers=8 and "
            "parallel.pipeline_parallel_size=2 x parallel.virtual_pipeline_size=1 = 2 virtual stages. "
            "Use for example parallel.layer_split=[4, 4].",
        ),
        (
            1,
            {"model__hidden_size": 500},
            "model.hidden_size=500 is not a multiple of model.num_attention_heads=8. Use model.hidden_size=496 or 504, "
            "or model.num_attention_heads=1, 2, 4, 5, 10, 20, 25 or 50.",
        ),
        (
            1,
            {"model__num_query_groups": 3},
            "model.num_query_groups=3 does not divide model.num_attention_heads=8. Use model.num_query_groups=1, 2, 4 or 8.",
        ),
        (
            1,
            {"model__num_query_groups": 16},
            "model.num_query_groups=16 does not divide model.num_attention_heads=8. Use model.num_query_groups=1, 2, 4 or 8.",
        ),
        (
            1,
            {"model__position": "rope", "model__hidden_size": 24},
            "model.position=rope turns pairs of numbers, but the head dimension is 3 (model.hidden_size=24 / "
            "model.num_attention_heads=8). Use model.num_attention_heads=1, 2, 3, 4, 6 or 12.",
        ),
        (
            1,
            {"model__position": "rope", "model__hidden_size": 15, "model__num_attention_heads": 5},
            "model.position=rope turns pairs of numbers, but the head dimension is 3 (model.hidden_size=15 / "
            "model.num_attention_heads=5). Use an even model.hidden_size.",
        ),
        (
            1,
            {"model__position": "rope", "model__head_dim": 5},
            "model.position=rope turns pairs of numbers, but model.head_dim=5. Use model.head_dim=4 or 6.",
        ),
        (
            2,
            {"train__global_batch_size": 30},
            "train.global_batch_size=30 is not a multiple of train.micro_batch_size=4 x 2 data-parallel replicas = 8. "
            "Use train.global_batch_size=24 or 32, or train.micro_batch_size=1, 3, 5 or 15.",
        ),
        (
            3,
            {"train__global_batch_size": 4},
            "train.global_batch_size=4 is not a multiple of train.micro_batch_size=4 x 3 data-parallel replicas = 12. "
            "Use train.global_batch_size=12.",
        ),
        (1, {"optim__lr": 1e-5}, "optim.min_lr=3e-05 is above optim.lr=1e-05. Use optim.min_lr=1e-06."),
        (
            1,
            {"train__steps": 100, "optim__warmup_steps": 100},
            "optim.warmup_steps=100 is not less than train.steps=100. Use optim.warmup_steps=10, or more steps.",
        ),
        (
            1,
            {"optim__lr_schedule": "wsd", "optim__warmup_steps": 901},
            "the last optim.decay_fraction=0.1 of train.steps=1000 begins before optim.warmup_steps=901 have passed. "
            "Use a smaller optim.decay_fraction, or optim.warmup_steps=900.",
        ),
        (
            1,
            {
                "optim__lr_schedule": "wsd",
                "optim__warmup_steps": 33,
                "train__tokens": 512.0 * 800,
                "train__batch_ramp": [8, 8, 200],
            },
            "the last optim.decay_fraction=0.1 of the 35 steps of train.tokens=409600 begins before optim.warmup_steps=33 have passed. "
            "Use a smaller optim.decay_fraction, or optim.warmup_steps=32.",
        ),
        (
            1,
            {"optim__lr_schedule": "wsd", "train__steps": 10},
            "the last optim.decay_fraction=0.1 of train.steps=10 has no update in it, so that optim.lr_schedule=wsd never decays. "
            "Use optim.decay_fraction=0.2, or train.steps=11 or more.",
        ),
        (
            1,
            {"optim__lr_schedule": "wsd", "train__steps": 3, "optim__warmup_steps": 1, "optim__decay_fraction": 0.3},
            "the last optim.decay_fraction=0.3 of train.steps=3 has no update in it, so that optim.lr_schedule=wsd never decays. "
            "Use train.steps=4 or more.",
        ),
        (
            1,
            {"optim__lr_schedule": "wsd", "train__tokens": 512.0 * 32 * 8, "optim__decay_fraction": 0.125},
            "the last optim.decay_fraction=0.125 of the 8 steps of train.tokens=131072 has no update in it, so that "
            "optim.lr_schedule=wsd never decays. Use optim.decay_fraction=0.25, or train.tokens=138000 or more.",
        ),
        (
            1,
            {"optim__lr_schedule": "wsd", "train__tokens": 512.0 * 32 * 2, "optim__decay_fraction": 0.25},
            "the last optim.decay_fraction=0.25 of the 2 steps of train.tokens=32768 has no update in it, so that "
            "optim.lr_schedule=wsd never decays. Use train.tokens=68800 or more.",
        ),
        (
            1,
            {"train__steps": 10, "train__skip_steps": [5, 11, 3]},
            "train.skip_steps=[5, 11, 3] goes beyond train.steps=10. Use train.skip_steps=[5, 3], or a longer run.",
        ),
        (
            1,
            {"train__tokens": 512.0 * 32 * 8, "train__skip_steps": [9]},
            "train.skip_steps=[9] goes beyond the 8 steps of train.tokens=131072. Use train.skip_steps=[], or a longer run.",
        ),
        (
            1,
            {"model__embedding_grad_scale": 0.1, "model__embedding_grad_steps": [0, 0]},
            "model.embedding_grad_steps=[0, 0] holds model.embedding_grad_scale=0.1 for no step, and lets it rise over none. "
            "Use for example model.embedding_grad_steps=[1000, 1000], or null: the scale holds for the whole run.",
        ),
        (
            1,
            {"train__precision": "fp64", "parallel__device": "cuda"},
            "train.precision=fp64 is for checks on CPU, but parallel.device=cuda. Use parallel.device=cpu, or fp32.",
        ),
        (
            1,
            {"parallel__backend": "nccl", "parallel__device": "cpu"},
            "parallel.backend=nccl needs GPUs, but parallel.device=cpu. Use parallel.backend=gloo or auto.",
        ),
        (
            1,
            {"data__train": []},
            "data.train is empty. Use the prefix of a .bin/.idx pair, as `megatrain data tokenize` writes it.",
        ),
        (
            1,
            {"data__train": ["a", ""]},
            "data.train[1].path='' must not be empty text. Use for example data/train.",
        ),
        (
            1,
            {"data__valid": [{"path": "a", "weight": 0}]},
            "data.valid[0].weight=0.0 must be greater than 0. Use for example 1.0.",
        ),
        (
            1,
            {"model__vocab_size": None},
            "model.vocab_size and data.tokenizer are both null, so the vocabulary is unknown. Use data.tokenizer=bytes, "
            "data.tokenizer=TOKENIZER.json or a number for model.vocab_size.",
        ),
        (
            1,
            {"log__to": ["tensorboard", "wandb"]},
            "log.to=[tensorboard, wandb] is not in this release: wandb and mlflow come in a later release. Use log.to=[tensorboard].",
        ),
        (
            1,
            {"log__to": ["tensorbord"]},
            "log.to[0] is the text 'tensorbord'; expected one of tensorboard, wandb, mlflow. Did you mean tensorboard?",
        ),
        (
            1,
            {"model__position": "rope", "model__rope_fraction": 0.01},
            "model.rope_fraction=0.01 of a head dimension of 64 is less than one pair. Use model.rope_fraction=0.03125 or more.",
        ),
        (
            1,
            {"model__position": "rope", "model__rope_low_freq_factor": 8.0},
            "model.rope_low_freq_factor=8.0 must be less than model.rope_high_freq_factor=4.0. "
            "Use model.rope_low_freq_factor=1.",
        ),
        (
            2,
            {"train__batch_ramp": [3, 2, 100]},
            "train.batch_ramp[0]=3 is not a multiple of train.micro_batch_size=4 x 2 data-parallel replicas = 8. "
            "Use train.batch_ramp[0]=8.",
        ),
        (
            1,
            {"train__batch_ramp": [64, 2, 100]},
            "train.batch_ramp=[64, 2, 100] begins above train.global_batch_size=32. Use train.batch_ramp=[4, 4, 100].",
        ),
        (
            1,
            {"train__batch_ramp": [32, 4, 100]},
            "train.batch_ramp=[32, 4, 100] begins at train.global_batch_size=32. Use train.batch_ramp=[4, 4, 100].",
        ),
        (
            8,
            {"train__batch_ramp": [32, 4, 100]},
            "train.batch_ramp=[32, 4, 100] cannot begin below train.global_batch_size=32, which is one micro-batch of "
            "train.micro_batch_size=4 for each of 8 data-parallel replicas. Use train.batch_ramp=null, or "
            "train.global_batch_size=64 or more.",
        ),
        (
            4,
            {"train__batch_ramp": [31, 16, 100]},
            "train.batch_ramp[0]=31 is not a multiple of train.micro_batch_size=4 x 4 data-parallel replicas = 16. "
            "Use train.batch_ramp[0]=16.",
        ),
        (
            2,
            {
                "data__objective": "glm",
                "data__tokenizer": "bytes",
                "data__glm__objective_mix__mode": "weighted",
                "train__micro_batch_size": 1,
                "train__batch_ramp": [2, 2, 100],
            },
            "data.glm.objective_mix.mode=weighted puts each of 3 objectives into every batch, but train.batch_ramp=[2, 2, 100] begins "
            "with 2. Use train.batch_ramp=[4, 2, 100].",
        ),
        (
            1,
            {"train__precision": "fp16", "optim__master": "split"},
            "optim.master=split keeps the 16 bits that a BF16 parameter lacks, but train.precision=fp16. "
            "Use optim.master=fp32, or train.precision=bf16.",
        ),
        (
            1,
            {"model__seq_length": 2048, "model__max_positions": 1024},
            "model.seq_length=2048 is more than model.max_positions=1024, the rows of the table of learned positions. "
            "Use model.seq_length=1024 or less, or model.max_positions=2048 for a model that is trained from the beginning.",
        ),
        (
            1,
            {"model__seq_length": 2048, "model__max_positions": 1024, "model__position": "rope"},
            "model.seq_length=2048 is more than model.max_positions=1024. Use model.max_positions=2048: model.position=rope has "
            "no table; or model.seq_length=1024 or less.",
        ),
    ],
)
def test_what_is_refused(world_size, values, expected):
    assert refusal(world_size, **values) == expected
    for how, key, value in re.findall(ADVICE, expected):
        try:
            check(world_size, **values | {key.replace(".", "__"): yaml.safe_load(value)})
        except ConfigError as error:
            assert how == "or" and str(error) != expected, error  # a second way may break another rule


@pytest.mark.parametrize(
    ("tokens", "more", "taken"),
    [
        (512.0 * 32 * 8, {"train": {"skip_steps": [9]}}, True),  # the batch may have been smaller: more steps
        (512.0 * 32 * 8, {"optim": {"lr_schedule": "wsd", "decay_fraction": 0.125}}, True),
        (None, {"train": {"skip_steps": [9], "steps": 8}}, False),
        (None, {"optim": {"lr_schedule": "wsd"}, "train": {"steps": 8}}, False),
    ],
)
def test_a_run_that_goes_on_in_tokens_may_have_other_steps(tokens, more, taken):
    train = {"tokens": tokens} if tokens else {}
    config = from_dict({**BASE, **more, "train": {**train, **more.get("train", {})}})
    asked = []
    with pytest.raises(ConfigError, match=r"goes beyond|never decays"):
        validate(config, 1, lambda: asked.append("begun"))
    assert len(asked) == taken  # asking is collective: only where the answer matters
    if taken:
        validate(config, 1, lambda: warmup_of(config))


LATER = [
    ("parallel.context_parallel_size", 2, "context parallelism"),
    ("parallel.expert_parallel_size", 2, "mixtures of experts"),
    ("optim.name", "muon", "Muon"),
    ("log.to", ["mlflow"], "wandb and mlflow"),
]


@pytest.mark.parametrize("key, value, reason", LATER)
def test_what_a_later_release_delivers_is_refused_with_the_reason(key, value, reason):
    said = refusal(8, **{key.replace(".", "__"): value})
    shown = "[mlflow]" if value == ["mlflow"] else value
    assert said.startswith(f"{key}={shown} is not in this release: {reason}")
    use = re.search(rf"Use {re.escape(key)}=(.*)\.$", said)[1]
    for word in re.split(", | or ", use):
        check(8, **{key.replace(".", "__"): yaml.safe_load(word)})


def test_every_deferred_knob_is_tested():
    assert {key for key, _, _ in LATER} == {knob.key for knob in knobs() if knob.deferred is not None}


sizes = st.integers(1, 24)


@given(
    heads=sizes,
    head_dim=sizes,
    group_size=sizes,
    ffn=st.integers(1, 96),
    seq=st.integers(1, 96),
    tp=sizes,
    copies=st.integers(1, 3),
)
def test_the_sizes_that_a_refusal_lists_are_accepted(heads, head_dim, group_size, ffn, seq, tp, copies):
    assume(heads % group_size == 0)
    values = {
        "model__num_attention_heads": heads,
        "model__hidden_size": heads * head_dim,
        "model__num_query_groups": heads // group_size,
        "model__ffn_hidden_size": ffn,
        "model__seq_length": seq,
        "parallel__sequence_parallel": True,
        "train__global_batch_size": 12 * 24 * 24,
        "train__micro_batch_size": 1,
    }
    splits = (
        heads % tp == 0 and ffn % tp == 0 and seq % tp == 0 and max(tp, heads // group_size) % min(tp, heads // group_size) == 0
    )
    if splits:
        check(tp * copies, parallel__tensor_parallel_size=tp, **values)
        return
    said = refusal(tp * copies, parallel__tensor_parallel_size=tp, **values)
    listed = [int(word) for word in re.findall(r"\d+", re.search(r"Use ([^(]*)", said)[1])]
    assert listed[0] == 1
    for size in listed:
        check(size * copies, parallel__tensor_parallel_size=size, **{**values, "train__global_batch_size": size * copies})


def test_choices():
    assert [choices(values) for values in ([1], [1, 2], [1, 2, 3])] == ["1", "1 or 2", "1, 2 or 3"]


def test_a_config_is_left_as_it_was():
    config = from_dict(BASE)
    before = dataclasses.asdict(config)
    validate(config, 1)
    assert dataclasses.asdict(config) == before


def test_a_model_whose_weights_do_not_fit_is_refused_before_it_is_built():
    config = from_dict({"model": {"hidden_size": 1 << 20, "num_attention_heads": 8}, "train": {"precision": "bf16"}})
    with pytest.raises(ConfigError) as raised:
        require_memory(config, 4096, 1, 16 << 30)
    assert str(raised.value).startswith(
        "the model has 105,"
    ) and "GiB of weights a rank in bf16, of 16 GiB that there are. Use" in str(raised.value)
    require_memory(from_dict({"model": {"preset": "gpt2_124m"}}), 50257, 1, 1 << 30)


def test_float64_is_refused_where_auto_takes_a_gpu():
    with pytest.raises(ConfigError) as raised:
        require_precision("fp64", torch.device("cuda", 1))
    assert (
        str(raised.value) == "train.precision=fp64 is for checks on CPU, and there is a GPU. Use parallel.device=cpu, or fp32."
    )
    require_precision("fp64", torch.device("cpu"))
    require_precision("fp32", torch.device("cuda", 1))


def test_what_cannot_be_is_told_before_torch_is_there(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {vocab_size: 101}\ndata: {train: PREFIX}\ntrain: {precision: fp64}\n")
    code = "import sys; from megatrain.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    for override, message in (
        ("model.hidden_size=2147483648", "model.hidden_size=2147483648 must be at most 16777216."),
        ("parallel.tensor_parallel_size=3", "model.num_attention_heads=8 cannot be split over"),
        ("parallel.device=cuda", "train.precision=fp64 is for checks on CPU"),
    ):
        words = [sys.executable, "-c", code, "train", str(file), override]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert ended.stdout == "1 False\n" and message in ended.stderr


@pytest.mark.parametrize(
    ("override", "rule"), [("0", "greater than 0"), ("-2", "greater than 0"), ("2147483648", "at most 16777216")]
)
def test_a_layout_to_decode_under_has_bounds_too(override, rule):
    with pytest.raises(ConfigError, match=rf"^parallel\.pipeline_parallel_size={override} must be {rule}\."):
        laid_out(from_dict({}), [f"parallel.pipeline_parallel_size={override}"], 1)
