"""What a blend may not say, each with what would work."""

import pytest

from megatrain.config.load import from_dict
from megatrain.config.source import ConfigError
from megatrain.config.validate import validate, validate_data

SHARE = {"from_share": 0.9}


def config(train=("web", "code"), schedule=(), run=None, **data):
    run = {"steps": 100, "global_batch_size": 8, **(run or {})}
    data = {"train": list(train), "schedule": list(schedule), **data}
    return from_dict({"model": {"seq_length": 16, "vocab_size": 9}, "data": data, "train": run})


def refusal(of):
    """The error of a config, the same as of a run."""
    with pytest.raises(ConfigError) as raised:
        validate_data(of)
    with pytest.raises(ConfigError) as again:
        validate(of, 1)
    assert str(raised.value) == str(again.value)
    return str(raised.value)


def weights(at, *given, **named):
    return {**at, "weights": dict(given) | named}


CASES = [
    (
        {"schedule": [weights(SHARE, web=1, wiki=2)]},
        "data.schedule[0].weights names wiki, and no corpus of data.train has that name or path. There are web or code.",
    ),
    (
        {"schedule": [weights(SHARE, web=1, cod=2)]},
        "data.schedule[0].weights names cod, and no corpus of data.train has that name or path. Did you mean code?",
    ),
    (
        {"schedule": [weights(SHARE, web=1)], "train": ["web", {"path": "code", "weight": 3}, "wiki"]},
        "data.schedule[0].weights does not name code, a corpus of data.train. Write {web: 1, code: 3, wiki: 1}, or 0 for what is left out.",
    ),
    (
        {"schedule": [weights(SHARE, web=0, code=0)]},
        "data.schedule[0].weights has no weight above 0, so nothing would be read. Give one corpus a weight of 1.",
    ),
    (
        {"schedule": [weights({}, web=1, code=1)]},
        "data.schedule[0] begins at no place. Give one of from_share: 0.9 (a share of the run), from_step: 900 (steps done) and "
        "from_tokens: 9.0e+8 (tokens consumed).",
    ),
    (
        {"schedule": [weights({"from_share": 0.5, "from_step": 50}, web=1, code=1)]},
        "data.schedule[0] begins at from_share: 0.5, from_step: 50. Give one of from_share: 0.9 (a share",
    ),
    (
        {"schedule": [weights({"from_step": 50}, web=1, code=1), weights({"from_share": 0.5}, web=1, code=2)]},
        "data.schedule[1] begins at from_share: 0.5 (token 6400), and the one before it at from_step: 50 (token 6400). List them in the "
        "order of the run, each at a place of its own.",
    ),
    (
        {"schedule": [weights(SHARE, web=1, code=1), weights({"from_tokens": 640}, web=1, code=2)]},
        "data.schedule[1] begins at from_tokens: 640 (token 640), and the one before it at from_share: 0.9 (token 11520).",
    ),
    (
        {"schedule": [weights({"from_step": 100}, web=1, code=1)]},
        "data.schedule[0] begins at from_step: 100, where the run of 100 steps and 12800 tokens is over. Use a place before, such as "
        "from_share: 0.9, or a longer run.",
    ),
    (
        {"schedule": [weights(SHARE, web=-1, code=1)]},
        "data.schedule[0].weights.web=-1.0 must be 0 or more. Use for example 1.0.",
    ),
    (
        {"schedule": [weights({"from_step": 0}, web=2, code=1)], "train": [{"path": "web", "weight": 3}, "code"]},
        "data.train[0].weight=3.0 has no effect: data.schedule[0] has other weights from the first step on. Leave it out.",
    ),
    (
        {"train": [{"path": "web", "weight": 3, "epochs": 2}, "code"]},
        "data.train[0].weight=3.0 has no effect: its share of the samples follows from epochs=2.0. Leave it out, or use max_epochs=2.0 in "
        "the place of epochs.",
    ),
    (
        {"train": [{"path": "web", "max_epochs": 3, "epochs": 2}, "code"]},
        "data.train[0] has epochs=2.0 and max_epochs=3.0: the first says how often it is seen, the second how often at most. Leave one "
        "out.",
    ),
    ({"train": [{"path": "web", "epochs": 0}]}, "data.train[0].epochs=0.0 must be greater than 0. Use for example 2.0."),
    (
        {"train": [{"path": "web", "epochs": 2}, "code"], "schedule": [weights(SHARE, web=1, code=1)]},
        "data.schedule[0].weights names web, whose share of the samples follows from epochs=2.0. Leave it out of the weights, or use "
        "max_epochs=2.0 in the place of epochs.",
    ),
    (
        {"train": [{"path": "web", "epochs": 2}], "schedule": [weights(SHARE)]},
        "data.schedule has no effect: every corpus of data.train has `epochs`, from which its share of the samples follows. Leave it out, "
        "or use max_epochs in the place of epochs.",
    ),
    (
        {"train": ["a/web", "a/web"], "schedule": [weights(SHARE, ("a/web", 1))]},
        "data.train has 2 corpora of the name a/web. Give each a `name` of its own, as {path: PREFIX, name: web2}.",
    ),
    (
        {"train": [{"path": "a", "name": "b"}, "b"]},
        "data.train has 2 corpora of the name b. Give each a `name` of its own, as {path: PREFIX, name: b2}.",
    ),
    (
        {"replay": 0.05},
        "data.replay=0.05 is the share of old corpora beside new ones, and data.train has 0 with old: true among 2. Mark those of the "
        "earlier training, as [{path: data/web, old: true}, {path: data/law}].",
    ),
    (
        {"train": [{"path": "web", "old": True}, "code"]},
        "data.train[0].old=true has no effect: it has one when data.replay is given. Use for example data.replay=0.05, or leave it out.",
    ),
    (
        {"train": [{"path": "web", "old": True}, {"path": "code", "epochs": 2}], "replay": 0.05},
        "data.train[1].epochs and data.replay=0.05 both say what share of the samples corpora have. Use data.train[1].max_epochs in the "
        "place of epochs, or leave one out.",
    ),
    (
        {"valid": [{"path": "v", "max_epochs": 2}]},
        "data.valid[0].max_epochs=2.0 has no effect: it is for data.train alone. Leave it out.",
    ),
    ({"valid": [{"path": "v", "name": "x"}]}, "data.valid[0].name=x has no effect: it is for data.train alone. Leave it out."),
]


@pytest.mark.parametrize(("given", "what"), CASES, ids=[what[:40] for _, what in CASES])
def test_what_is_refused(given, what):
    assert refusal(config(**given)).startswith(what)


def test_the_same_corpus_twice_in_one_mapping_of_weights():
    """YAML refuses it; a config made in Python can have it, and so can two names of one path."""
    twice = config(schedule=[{**SHARE, "weights": [["web", 1], ["web", 2], ["code", 1]]}])
    assert refusal(twice) == "data.schedule[0].weights names web 2 times. Keep one of them."


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"train": ["web", "web"]},
        {"schedule": [weights(SHARE, web=0, code=3)]},
        {
            "schedule": [
                weights({"from_step": 0}, web=1, code=0),
                weights({"from_tokens": 640}, web=1, code=1),
                weights(SHARE, web=0, code=1),
            ]
        },
        {
            "train": [{"path": "web", "max_epochs": 4, "weight": 0.3}, {"path": "code", "epochs": 0.5}],
            "schedule": [weights(SHARE, web=1)],
        },
        {"train": [{"path": "web", "epochs": 1}, {"path": "code", "epochs": 3}]},
        {"train": [{"path": "web", "old": True}, "code"], "replay": 0.05},
    ],
)
def test_what_is_taken(given):
    validate(config(**given), 1)
