"""The loss guard: spikes found within a step, no false alarms on healthy curves, and what is decided after them."""

import json
import math

import numpy as np
import pytest

from megatrain.config.schema import TrainConfig
from megatrain.lifecycle.spikes import Bad, History, Spikes, usual
from megatrain.runtime.reports import Caution, StepReport

INF = math.inf


def report(step, loss=3.0, grad_norm=1.0, *, skipped=False, overflow=False, scale=1.0):
    return StepReport(step, loss, {}, grad_norm, 1e-3, 8, skipped or overflow, overflow, False, scale, 8 * step, 0.0)


def seen(losses, norms=None, **keys):
    """The guard after steps with these losses, and what it told of, by step."""
    spikes, told = Spikes(TrainConfig(**keys)), {}
    for step, loss in enumerate(losses, 1):
        norm = 1.0 if norms is None else norms[step - 1]
        found = spikes.see(report(step, float(loss), float(norm), overflow=not math.isfinite(loss + norm)))
        if found:
            told[step] = found
    return spikes, told


# --- what is usual -----------------------------------------------------------------------------------------------------------


def test_the_spread_is_a_standard_deviation_where_values_are_normal():
    values = np.random.default_rng(1).normal(3.0, 0.2, 20_000)
    assert usual(values) == (pytest.approx(3.0, abs=0.01), pytest.approx(0.2, rel=0.05))
    wild = [*values[:100], *[1e6] * 9]
    assert usual(wild)[1] < 0.5, "a few wild values change nothing"
    assert usual([2.0] * 9) == (2.0, 0.0)
    assert usual([1.0, 2.0, 3.0, 10.0])[0] == 2.5


def test_the_limit_is_made_of_steps_that_came_two_before():
    history = History(16, norm=False)
    for step in range(1, 21):
        history.add(step, 3.0 + step / 100)
    before = history.limit(21, 10.0)
    late = History(16, norm=False)
    for step in range(1, 20):
        late.add(step, 3.0 + step / 100)
    assert late.limit(21, 10.0) == before, "whether or not step 20 is reported already"
    assert history.limit(22, 10.0) != before
    few = History(16, norm=False)
    for step in range(1, 9):
        few.add(step, 3.0)
    assert few.limit(9, 10.0) == (3.0, 33.0), "seven values say too little of how far they stray"
    assert few.limit(10, 10.0) == (3.0, pytest.approx(3.0 + 10 * 2 * 0.03))


def test_a_jump_in_the_first_steps_is_a_spike():
    told = seen([4.6, 4.7, 4.5, 5.2, 50.0, 341.0, 4.6])[1]
    assert {step: [str(spike) for spike in spikes] for step, spikes in told.items()} == {
        6: ["loss 341, usually 4.65, is beyond 51.15"]
    }
    assert list(seen([341.0, 4.6, 45.0, 4.6])[1]) == [], "nothing is known of the loss of this objective"
    assert list(seen([4.6] * 5, [1.0, 1.0, 22_000.0, 1.0, 22_100.0])[1]) == [5]
    assert seen([1e-3] * 3 + [9.0] * 3)[1] == {}, "of small losses multiples say nothing"
    for step in (1, 2):
        spikes = Spikes(TrainConfig(), guess=math.log(101))
        assert all(spikes.see(report(n, 50.7)) == [] for n in range(1, step))
        assert [str(spike) for spike in spikes.see(report(step, 341.0))] == ["loss 341, usually 4.615, is beyond 50.77"]
    assert seen([341.0])[0].caution(3) == Caution(), "only skip has limits"


def healthy(kind, steps):
    """A loss and a gradient norm of a healthy run: warm-up, decay, noise of some kind."""
    rng, t = np.random.default_rng(kind), np.arange(steps)

    def noise():
        return rng.standard_t(5, steps) / 1.29 if kind % 2 else rng.standard_normal(steps)

    loss = 1.8 + 9.0 * (1 + t / 20) ** -0.45 + rng.choice([0.01, 0.05, 0.15]) * noise()
    if kind % 3 == 1:
        loss += np.where(rng.random(steps) < 0.2, 1.0, 0.0)  # batches of two kinds
    if kind % 3 == 2:
        loss -= 0.3 * np.maximum(0, (t - 0.8 * steps) / (0.2 * steps))  # the learning rate goes down
    if kind % 5 == 4:
        loss = np.round(loss, 1)  # plateaus
    wander, shocks = np.zeros(steps), rng.choice([0.05, 0.15, 0.25]) * noise()
    for i in range(1, steps):
        wander[i] = 0.5 * wander[i - 1] + shocks[i]
    return loss, (4 * np.exp(-t / 40) + 0.4 + 0.6 * np.exp(-(((t - 150) / 60.0) ** 2))) * np.exp(wander)


def test_healthy_runs_raise_no_alarm_and_a_spike_in_them_is_found_at_once():
    alarms, found = {}, 0
    for kind in range(20):
        loss, norm = healthy(kind, 1000)
        where = 400 + 20 * kind
        (loss if kind % 2 else norm)[where] *= 10 if kind % 2 else 100  # norms stray more
        told = seen(loss, norm)[1]
        found += where + 1 in told
        alarms |= {(kind, step): spikes for step, spikes in told.items() if step != where + 1}
    assert found == 20 and not alarms, "20,000 healthy steps"


def test_a_plateau_without_any_spread_has_a_limit():
    calm = [2.0] * 40
    assert not seen([*calm, 2.1, 2.0])[1]
    assert [str(spike) for spike in seen([*calm, 2.6])[1][41]] == ["loss 2.6, usually 2, is beyond 2.241"]
    assert not seen(calm, [*[0.0] * 30, 1e-3, *[0.0] * 9])[1], "gradients of 0 say nothing"
    assert list(seen(calm, [1.0] * 39 + [9.0])[1]) == [40]


def test_what_jumps_and_stays_is_told_once_and_grows_usual():
    told = seen([3.0] * 30 + [341.0] * 120)[1]
    assert {step: [spike.what for spike in spikes] for step, spikes in told.items()} == {31: ["loss"]}
    assert not seen([3.0] * 30 + [0.1] * 30)[1], "better is no spike"


# --- what is decided -----------------------------------------------------------------------------------------------------------


def test_only_skip_has_limits_on_the_device():
    calm = [3.0 + 0.01 * (n % 5) for n in range(30)]
    assert seen(calm)[0].caution(31) == seen(calm, on_spike="rollback")[0].caution(31) == Caution(1.0, 1.0, INF, INF)
    careful = seen(calm, on_spike="skip")[0].caution(31)
    assert 3.2 < careful.most_loss < 3.6 and 4.0 < careful.most_grad_norm < 8.0
    told = seen([*calm, careful.most_loss, careful.most_loss + 1e-9], on_spike="skip")[1]
    assert list(told) == [32], "the host judges as the device does"


def test_a_part_may_spike_alone():
    spikes = Spikes(TrainConfig(on_spike="skip", skip_steps=(50,)))
    for step in range(1, 40):
        spikes.see_parts(step, {"mlp": 1.0, "head": 0.1})
        assert spikes.caution(step).most_loss > 0
        assert spikes.see(report(step)) == []
    spikes.see_parts(40, {"mlp": 1.0, "head": 5.0})
    assert spikes.caution(40).most_loss == -INF, "nothing is applied"
    (spike,) = spikes.see(report(40, skipped=True))
    assert (spike.what, spike.value) == ("gradient norm of head", 5.0)


@pytest.mark.parametrize(
    ("keys", "steps", "bad"),
    [
        ({}, [report(n, overflow=n > 3) for n in range(1, 14)], (4, 13)),
        ({}, [report(n, overflow=n > 3 and n != 9) for n in range(1, 15)], None),
        ({}, [report(n, overflow=n % 10 > 0) for n in range(1, 24)], (1, 23)),
        ({}, [report(n, overflow=n % 10 > 0) for n in range(1, 23)], None),
        ({}, [report(n, overflow=n % 2 == 0) for n in range(1, 400)], None),
        ({"max_skipped_in_row": 0}, [report(n, overflow=n % 10 > 0) for n in range(1, 90)], None),
        ({"skip_steps": tuple(range(1, 90))}, [report(n, skipped=n % 10 > 0) for n in range(1, 90)], None),
        # fp16: the scale falls to 1 and stays; where a right one grows at each update, two of three steps overflow for good
        ({"precision": "fp16"}, [report(n, overflow=n % 10 > 0, scale=max(1.0, 2.0 ** (9 - n))) for n in range(1, 60)], (9, 32)),
        ({"precision": "fp16", "loss_scale_window": 1}, [report(n, overflow=n % 3 > 0, scale=2.0**9) for n in range(1, 400)], None),
        ({"max_skipped_in_row": 0}, [report(n, overflow=True) for n in range(1, 60)], None),
        ({"max_skipped_in_row": 2}, [report(n, overflow=n > 3) for n in range(1, 6)], (4, 5)),
        ({"skip_steps": tuple(range(2, 30))}, [report(n, skipped=n in range(2, 30)) for n in range(1, 31)], None),
        # the scale falls from its start: 16 overflows; once it has been found, ten are too many
        ({"precision": "fp16"}, [report(n, overflow=n < 17, scale=2.0 ** (17 - n)) for n in range(1, 18)], None),
        ({"precision": "fp16"}, [report(n, overflow=n > 1, scale=2.0**30) for n in range(1, 12)], (2, 11)),
        ({"precision": "fp16"}, [report(n, overflow=True, scale=max(1.0, 2.0 ** (5 - n))) for n in range(1, 15)], (5, 14)),
    ],
)  # fmt: skip
def test_skipped_steps_in_a_row_end_the_run(keys, steps, bad):
    spikes = Spikes(TrainConfig(**keys))
    for step in steps:
        spikes.see(step)
    assert (None if spikes.bad is None else (spikes.bad.first, spikes.bad.last)) == bad
    if spikes.bad:
        count, of = bad[1] - bad[0] + 1, sum(step.overflow for step in steps[bad[0] - 1 : bad[1]])
        assert spikes.bad.why == (
            f"{count} steps in a row were skipped" if of == count else f"{of} of the last {bad[1]} steps were skipped"
        )


def test_steps_skipped_before_a_stop_or_a_rollback_count_as_they_should():
    spikes = seen([math.nan if n % 10 else 3.0 for n in range(1, 21)], on_spike="rollback")[0]
    again = Spikes(TrainConfig(on_spike="rollback"))
    again.restore(json.loads(json.dumps(spikes.state())))
    for step in (21, 22, 23):
        again.see(report(step, overflow=True))
    assert again.bad.why == "21 of the last 23 steps were skipped"
    again.go_back(again.bad, 20, spikes.state())
    assert not again.recent and again.bad is None


def gone_back(to=20, spike=31, **keys):
    spikes, _ = seen([3.0] * (spike - 1) + [50.0], on_spike="rollback", **keys)
    assert spikes.bad == Bad(spike, spike, 8 * spike, 8, "loss 50, usually 3, is beyond 3.383")
    assert spikes.see(report(spike + 1, 60.0)) == [], "it will not have been"
    spikes.go_back(spikes.bad, to, seen([3.0] * to)[0].state())
    return spikes


def test_a_rollback_warms_up_again_and_shrinks_where_asked():
    spikes = gone_back(spike_warmup_steps=4)
    assert [spikes.caution(step) for step in (21, 22, 24, 25)] == [Caution(0.25), Caution(0.5), Caution(1.0), Caution()]
    shrunk = gone_back(spike_warmup_steps=2, spike_remedy="shrink_embedding_gradient")
    assert [shrunk.caution(step) for step in (21, 22, 23)] == [Caution(0.5, 0.1), Caution(1.0, 0.1), Caution()]
    assert gone_back(spike_warmup_steps=0).caution(21) == Caution()


def test_the_second_try_goes_further_back_where_the_first_was_in_vain():
    spikes = gone_back()
    assert (spikes.tries(20), spikes.tries(31)) == (1, 0), "31 lies behind the spike"
    for step in range(21, 25):
        spikes.see(report(step))
    spikes.see(report(25, 70.0))
    assert spikes.bad.first == 25 and spikes.bound() == 20, "the checkpoint of step 20 is not good"
    further = gone_back()
    for step in range(21, 40):
        further.see(report(step))
    further.see(report(40, 70.0))
    assert further.bound() == 40
    further.go_back(further.bad, 35, further.state())
    assert further.retries == 1
    spikes.go_back(spikes.bad, 10, {})
    assert spikes.retries == 2


def falling(step):
    """A loss that falls from 11 to 4, and 6 at step 16."""
    return 4.0 + 7.0 * 0.92**step


@pytest.mark.parametrize(("to", "limit"), [(0, 40.29), (5, 23.22)])
def test_first_steps_after_a_rollback_are_judged_by_what_they_were_before(to, limit):
    losses = [falling(step) for step in range(1, 18)]
    spikes = seen([*losses, 133.0], on_spike="rollback")[0]
    spikes.go_back(spikes.bad, to, seen(losses[:to])[0].state() if to else {})
    resumed = Spikes(TrainConfig(on_spike="rollback"))
    resumed.restore(json.loads(json.dumps(spikes.state())))
    for of in (spikes, resumed):
        for step in range(to + 1, to + 5):  # warmed up anew, the loss falls later
            assert of.see(report(step, falling(step - to // 2))) == [] and of.bad is None
        (spike,) = of.see(report(to + 5, 45.0))
        assert spike.what == "loss" and of.bad.last == to + 5
        assert spike.limit == pytest.approx(limit, abs=0.01), "not 11 times what is usual"
    assert resumed.limits(to + 6) == spikes.limits(to + 6)
    assert spikes.state() == resumed.state()


def test_after_eight_new_values_those_from_before_a_rollback_are_forgotten():
    spikes = seen([9.0] * 17 + [133.0], on_spike="rollback")[0]
    spikes.go_back(spikes.bad, 0, {})
    assert spikes.limits(1)["loss"] == (9.0, pytest.approx(9.0 + 10 * (1 + 8 / 16) * 0.09))
    for step in range(1, 10):
        assert spikes.see(report(step, 3.0)) == []
    assert spikes.limits(10)["loss"] == (3.0, pytest.approx(3.6))
    late = seen([9.0] * 17 + [133.0], on_spike="rollback")[0]
    late.go_back(late.bad, 12, seen([9.0] * 12)[0].state())
    assert late.state()["before"] == {}, "twelve values are enough"
    soon = seen([9.0] * 5 + [133.0], on_spike="rollback")[0]
    soon.go_back(soon.bad, 0, {})
    assert soon.state()["before"] == {} and soon.limits(1)["loss"] == (pytest.approx(math.nan, nan_ok=True), INF)


def test_a_run_that_resumes_decides_as_it_would_have():
    rng = np.random.default_rng(5)
    losses = rng.normal(3, 0.1, 60)
    losses[45] = 9.0
    for at in (20, 44, 46):
        whole = seen(losses[:at], on_spike="skip", spike_history=16)[0]
        again = Spikes(TrainConfig(on_spike="skip", spike_history=16))
        again.restore(json.loads(json.dumps(whole.state())))
        for step in range(at + 1, 61):
            assert again.caution(step) == whole.caution(step)
            assert again.see(report(step, losses[step - 1])) == whole.see(report(step, losses[step - 1]))
        assert again.state() == whole.state()
    fresh = Spikes(TrainConfig())
    fresh.restore({})
    assert fresh.state() == Spikes(TrainConfig()).state(), "a checkpoint of an earlier release has none"
