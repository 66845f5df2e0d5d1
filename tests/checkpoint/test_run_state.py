"""A run goes on with nothing that no run can have saved: each value of `progress` with its kind and range."""

import json

import pytest

from megatrain.checkpoint.manifest import Manifest
from megatrain.checkpoint.run_state import check_progress, check_resumable
from megatrain.checkpoint.together import DamagedCheckpointError
from megatrain.parallel.mesh import MeshShape
from megatrain.resuming.resume import require_progress

GOOD = {
    "samples": 32,
    "step": 4,
    "tokens": 512,
    "updates": 4,
    "loss_scale": [65536.0, 4.0, -2.0],
    "gauge": {"first": 128, "full": 128, "warmup_steps": 2, "warmup": 256},
    "finished": True,
    "identity": {
        "data": [["88-512-ab-cd", 1.0], ["88-512-ab-cd", 2, "9-7-ab-cd"]],
        "valid": [["valid", "88-512-ab-cd"]],
        "tokenizer": None,
        "special": {"eod": 7},
    },
    "program": {"torch": "2.7"},
    "began": {"from": "never", "job": "none "},
    "spikes": {
        "history": {"loss": [[1, 4.5], [2, -1e300]]},
        "before": {"loss": [[5, 4.25]]},
        "skipped": 0,
        "recent": [0, 3],
        "settled": False,
        "spiking": True,
        "eased": {"from": 2, "steps": 5, "shrink": 1},
        "retries": 1,
        "gone": [3, 2],
    },
    "deal": {
        "pieces": [{"first": 0, "weights": [0.7, 0]}, {"first": 90, "weights": [1, 3.0]}],
        "end": 100,
        "most": [None, 20],
        "even": [False, True],
        "first": 32,
        "before": [20, 12],
        "seq_length": 16,
    },
    "left_out": [[32, 64]],
}
BAD = {
    "samples": [-1, 2**53, True, None, "4", 4.0],
    "step": ["4", -3, 10**30, 2**53],
    "tokens": ["x", -5000, 2**70, 640.5, [], 2**62],
    "updates": ["x", 2**80, -1],
    "loss_scale": [
        "abc",
        [1.0, 0.0],
        [0.0, 0.0, 0.0],
        [1.0, -1.0, 0.0],
        [float("nan"), 0.0, 0.0],
        ["1", 0.0, 0.0],
        1.0,
        [1.0] * 4,
    ],
    "gauge": [{"a": 1}, [1], {**GOOD["gauge"], "first": "1"}, {**GOOD["gauge"], "warmup": -1}, None],
    "finished": ["yes", 1],
    "identity": [5, {"data": 5}, {"data": [5]}, {"data": [[5, 1.0]]}, {"valid": [["a"]]}, {"tokenizer": 5}, {"special": []}],
    "program": ["x", ["x"], {"torch": 5}],
    "began": [
        [1],
        {},
        {"from": "nowhere"},
        {"from": "never"},
        {"from": "checkpoint", "path": "/x"},
        {"from": ["auto"]},
        {"from": 1},
    ],
    "spikes": [
        [],
        *(
            {key: wrong}
            for key in ("history", "before")
            for wrong in ([], {"loss": 5}, {"loss": [[1, "a"]]}, {"loss": [[1]]}, {"loss": [[1, float("inf")]]})
        ),
        *({key: -1} for key in ("skipped", "recent", "settled", "spiking", "eased", "retries", "gone")),
        {"eased": {"from": 1}},
        {"gone": [1, 2, 3]},
    ],
    "deal": [
        None,
        [],
        {},
        *({**GOOD["deal"], key: -1} for key in ("pieces", "end", "most", "even", "first", "before", "seq_length")),
        *(
            {**GOOD["deal"], "pieces": [{"first": first, "weights": weights}]}
            for first, weights in ((1, [1, 1]), (0, [1]), (0, [1, -1]))
        ),
        {**GOOD["deal"], "pieces": GOOD["deal"]["pieces"][::-1]},
        {**GOOD["deal"], "pieces": []},
        {**GOOD["deal"], "pieces": [], "most": [], "even": []},
        {**GOOD["deal"], "most": [None, 2.5]},
        {**GOOD["deal"], "even": [False]},
        {**GOOD["deal"], "before": [1]},
        {**GOOD["deal"], "seq_length": 0},
    ],
    "left_out": [[[0, 2**62]], [[-100, 16]], "abc", [[64, 32]], [[0, 1]] * 10_001, [[0, 1, 2]], None],
}


def test_what_a_run_saves_and_what_earlier_and_later_ones_do_is_taken():
    assert BAD.keys() == GOOD.keys()
    for progress in ({}, GOOD, {"later": object()}, {"identity": {}, "spikes": {}, "began": {"from": "auto"}}):
        check_progress(progress)
    check_progress(json.loads(json.dumps(GOOD)))
    check_resumable(GOOD, 4)
    with pytest.raises(ValueError, match=r"progress\.deal is of 2 corpora, and progress\.identity of 1"):
        check_progress(GOOD | {"identity": {"data": [["88-512-ab-cd", 1.0]]}})


@pytest.mark.parametrize(
    ("key", "value"), [pytest.param(k, v, id=f"{k}{i}") for k, vs in BAD.items() for i, v in enumerate(vs)]
)
def test_what_no_run_saves_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"^progress.{key} is ") as refused:
        check_progress({**GOOD, key: value})
    assert len(str(refused.value)) < 250


def test_the_message_says_what_was_found_and_what_should_be():
    with pytest.raises(ValueError, match=r"^progress\.tokens is '-5000', and not a whole number from 0 to 2\^53$"):
        check_progress({"tokens": -5000})


@pytest.mark.parametrize(
    ("progress", "said"),
    [
        ({"step": 4}, "its progress has no tokens, updates"),
        ({"step": 3, "tokens": 1, "updates": 1}, "its progress is of step 3, and its step is 4"),
    ],
)
def test_what_a_run_cannot_go_on_from_is_damaged(tmp_path, progress, said):
    with pytest.raises(DamagedCheckpointError, match=f"^{tmp_path}/manifest.json cannot be used: {said}$"):
        require_progress(tmp_path, Manifest(4, 0.0, progress, MeshShape(), (), {}, ""))
