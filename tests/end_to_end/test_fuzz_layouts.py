"""Random legal configs under random layouts train in float64 to the numbers of one process."""

import random
from dataclasses import replace
from itertools import pairwise

import fuzzing
import pytest

from megatrain.config.load import from_dict
from megatrain.config.source import ConfigError
from megatrain.config.validate import validate
from megatrain.parallel.schedules import FAMILIES
from megatrain.testing.layouts import USUAL_CHUNKS, Layout, for_replicas
from megatrain.testing.trace import ANY_DATA
from megatrain.verbs.verify import Verifier

LARGEST_WORLD = 8
STEPS = 2


def maybe(draw: random.Random, probability: float, **keys):
    """The keys, or none of them."""
    return keys if draw.random() < probability else {}


def model_of(draw: random.Random, glm: bool) -> dict:
    heads = draw.choice([2, 3, 4, 6, 8])
    length = draw.choice([24, 32]) if glm else draw.choice([4, 6, 8, 12])
    if glm:
        position, placement = draw.choice(["learned_2d", "rope", "rope_2d"]), draw.choice(["pre", "deepnorm", "post"])
    else:
        position = draw.choice(["learned", "rope", "alibi", "none"])
        placement = draw.choice(["pre", "post", "sandwich", "deepnorm"])
    found = {
        "num_layers": draw.randint(1, 7),
        "hidden_size": heads * 4,
        "num_attention_heads": heads,
        "seq_length": length,
        "vocab_size": draw.randint(41, 70),
        "norm": draw.choice(["layernorm", "rmsnorm"]),
        "norm_placement": placement,
        "activation": draw.choice(["gelu_tanh", "gelu", "relu", "swiglu", "geglu"]),
        "position": position,
        "bias": draw.random() < 0.6,
        "tied_embeddings": draw.random() < 0.5,
        "init": draw.choice(["normal", "small", "fan_in", "xavier"]),
    }
    if glm:
        found["family"] = "glm"
    if found["init"] == "normal":
        found["init_std"] = draw.choice([0.02, 0.1, 0.5, 1.0, 3.0])
    found |= maybe(draw, 0.5, num_query_groups=draw.choice([g for g in range(1, heads + 1) if heads % g == 0]))
    found |= maybe(draw, 0.5, ffn_hidden_size=heads * draw.randint(1, 9))
    found |= maybe(draw, 0.2, head_dim=draw.choice([4, 8]))
    found |= maybe(draw, 0.2, qkv_bias=draw.random() < 0.5) | maybe(draw, 0.2, qk_norm=True)
    found |= maybe(draw, 0.2, embedding_norm=True) | maybe(draw, 0.2, scale_residual_init=False)
    found |= maybe(draw, 0.2, logit_softcap=draw.choice([0.5, 5.0])) | maybe(
        draw, 0.2, embedding_init_std=draw.choice([0.01, 1.0])
    )
    found |= (
        maybe(draw, 0.3, dropout=0.1)
        | maybe(draw, 0.2, attention_dropout=0.2)
        | maybe(draw, 0.3, norm_eps=draw.choice([1e-3, 1e-8]))
    )
    found |= maybe(draw, 0.2, embedding_grad_scale=0.1) | maybe(draw, 0.2, max_positions=length + draw.randint(0, 5))
    if position == "rope":
        found |= (
            maybe(draw, 0.3, rope_fraction=0.5) | maybe(draw, 0.3, rope_interleaved=True) | maybe(draw, 0.3, rope_theta=100.0)
        )
        found |= maybe(draw, 0.3, rope_scaling=draw.choice(["linear", "yarn"]), rope_factor=2.0)
    if not glm:
        found |= draw.choice([{}, {}, {"window": draw.randint(1, length)}, {"sparse_block": 2, "sparse_local_blocks": 2}])
    return found


def optim_of(draw: random.Random) -> dict:
    name = draw.choice(["adamw", "adamw", "adam", "sgd"])
    found = {"name": name, "lr": draw.choice([1e-3, 1e-2, 0.1, 1.0]), "warmup_steps": draw.randint(0, 1)}
    found |= maybe(draw, 0.3, clip_grad=draw.choice([0.0, 0.01, 100.0])) | maybe(
        draw, 0.3, weight_decay=draw.choice([0.0, 1.0])
    )
    found |= maybe(draw, 0.2, weight_decay_end=0.3) | maybe(draw, 0.3, lr_schedule=draw.choice(["linear", "wsd"]))
    return found | (
        maybe(draw, 0.3, momentum=0.5)
        if name == "sgd"
        else maybe(draw, 0.3, betas=[0.8, 0.99]) | maybe(draw, 0.2, eps=draw.choice([1e-12, 1e-3]))
    )


def train_of(draw: random.Random) -> dict:
    micro, parts = draw.randint(1, 3), draw.choice([1, 2, 4, 6])
    batch = micro * parts
    found = {
        "steps": 3,
        "global_batch_size": batch,
        "micro_batch_size": micro,
        "precision": "fp64",
        "seed": draw.randrange(1 << 31),
    }
    found |= maybe(draw, 0.3, recompute=draw.choice(["selective", "full"])) | maybe(draw, 0.2, loss_chunk=draw.randint(1, 9))
    found |= maybe(draw, 0.2, label_smoothing=0.1) | maybe(draw, 0.2, z_loss=0.01) | maybe(draw, 0.1, skip_steps=[2])
    if parts > 1:
        found |= maybe(draw, 0.3, batch_ramp=[batch // 2 if parts % 2 == 0 else micro, micro, draw.randint(1, 3) * batch])
    return found


def data_of(draw: random.Random, glm: bool) -> dict:
    if not glm:
        return maybe(draw, 0.3, isolate_documents=True)
    blank, sentence, document = draw.choice([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.4, 0.2, 0.4)])
    mix = {"blank": blank, "sentence": sentence, "document": document}
    glm = {"objective_mix": mix | maybe(draw, 0.4, mode="weighted")} | maybe(draw, 0.3, short_seq_prob=0.5)
    return {"objective": "glm", "tokenizer": "bytes", "glm": glm | maybe(draw, 0.2, loss_norm="microbatch")}


def config_of(draw: random.Random):
    """A legal config; those that a rule refuses are drawn again."""
    while True:
        glm = draw.random() < 0.25
        parallel = {"bucket_size": draw.choice([64, 700, 10**6]), "overlap": draw.random() < 0.8}
        tree = {"model": model_of(draw, glm), "optim": optim_of(draw), "train": train_of(draw), "data": data_of(draw, glm)}
        tree["data"]["train"] = ANY_DATA[0].path
        try:
            config = from_dict({**tree, "parallel": parallel})
            validate(config, 1)
        except ConfigError:
            continue
        return config


def layout_of(draw: random.Random, config) -> tuple:
    """(config, a layout of it on up to 8 ranks): sizes that are no powers of two too."""
    while True:
        tp, pp, dp = (draw.choice([1, 1, 2, 2, 3, 4, 6, 8]) for _ in range(3))
        if not 1 < tp * pp * dp <= LARGEST_WORLD:
            continue
        schedule = draw.choice(list(FAMILIES))
        chunks = draw.choice([USUAL_CHUNKS.get(schedule, 1), USUAL_CHUNKS.get(schedule, 1), 3])
        zero = draw.choice([0, 1, 2, 3]) if dp > 1 else 1
        ranks = draw.choice([None, *(n for n in range(1, dp + 1) if dp % n == 0)]) if zero else None
        layout = Layout(tp, tp > 1 and draw.random() < 0.5, pp, schedule, chunks, dp, zero, zero_ranks=ranks)
        shared, stages = for_replicas(config, dp), pp * chunks
        if stages <= config.model.num_layers and draw.random() < 0.3:
            cuts = [0, *sorted(draw.sample(range(1, config.model.num_layers), stages - 1)), config.model.num_layers]
            split = tuple(end - start for start, end in pairwise(cuts))
            shared = replace(shared, parallel=replace(shared.parallel, layer_split=split))
        if not layout.problem(shared):
            return shared, layout
        if draw.random() < 0.01:  # there may be none
            return shared, Layout()


def fuzz(seconds: float) -> int:
    """How many layouts agreed."""
    done = 0
    for name, draw in fuzzing.cases(seconds, "layouts"):
        config, layout = layout_of(draw, config_of(draw))
        try:
            Verifier(config, STEPS, "fp64").check(layout)
        except Exception as error:
            raise AssertionError(f"{name}: {layout} of {config}: {error}") from error
        done += 1
    return done


def test_random_configs_agree_under_random_layouts(one_thread):
    assert fuzz(fuzzing.seconds()) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_random_configs_agree_under_random_layouts(one_thread):
    assert fuzz(fuzzing.seconds(slow=True)) > 5
