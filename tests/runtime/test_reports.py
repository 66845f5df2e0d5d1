"""Steps are told of in order, each when the next one is queued or when somebody must know."""

import pytest
import torch

from megatrain.runtime.reports import Queued, Reports
from megatrain.transport.host import Moment, Reading

CPU = torch.device("cpu")


class At(Moment):
    """A moment that comes when it is told to."""

    def __init__(self, at, passed=True):
        super().__init__(CPU)
        self._at, self.passed = at, passed

    def reached(self):
        return self.passed


class Numbers(Reading):
    """Numbers that notice when they are read."""

    def __init__(self, events, step, ended, values):
        super().__init__(torch.tensor(values, dtype=torch.float64))
        self.copied, self.events, self.step = ended, events, step

    def wait(self):
        self.events.append(f"read {self.step}")
        return super().wait()


class Device:
    """Steps of one second, with one second between them; and what happens."""

    def __init__(self):
        self.events, self.told = [], []

    def queue(self, step, stop=0.0, there=True, overflow=0.0, left_out=0.0):
        self.events.append(f"queue {step}")
        values = [2.0, overflow, max(overflow, left_out), stop, 8.0, 3.5, 0.25, 0.5]
        numbers = Numbers(self.events, step, At(2.0 * step + 1, there), values)
        return Queued(step, 0.1, 4, 4 * step, 0.5, At(2.0 * step), ("correct", "entropy"), numbers)

    def tell(self, report, seconds):
        self.events.append(f"tell {report.step}")
        self.told.append((report.step, seconds))


def test_a_step_is_read_when_the_next_is_queued():
    device = Device()
    with Reports(device.tell) as reports:
        for step in (1, 2, 3):
            reports.follow(device.queue(step))
        reports.catch_up()
        reports.catch_up()
        reports.follow(device.queue(4))
        reports.catch_up()
    between = ["queue 1", "queue 2", "read 1", "tell 1", "queue 3", "read 2", "tell 2", "read 3", "tell 3"]
    assert device.events == [*between, "queue 4", "read 4", "tell 4"]
    # From end to end; a step that comes after a pause counts from its own beginning.
    assert device.told == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 1.0)]


def test_a_report_says_what_the_step_did():
    report = Device().queue(3, stop=2.0).report()
    assert (report.step, report.loss, report.accuracy, report.grad_norm, report.learning_rate) == (3, 3.5, 0.25, 2.0, 0.1)
    assert (report.samples, report.consumed_samples, report.loss_scale, report.wait_seconds) == (4, 12, 8.0, 0.5)
    assert (report.skipped, report.overflow, report.stop) == (False, False, True)
    overflowed, left_out = Device().queue(1, overflow=1.0).report(), Device().queue(1, left_out=1.0).report()
    assert (overflowed.skipped, overflowed.overflow, overflowed.stop) == (True, True, False)
    assert (left_out.skipped, left_out.overflow) == (True, False)


def test_a_wish_to_stop_is_known_once_its_step_is_told():
    device, known = Device(), []
    with Reports(device.tell) as reports:
        for step in (1, 2, 3, 4):
            reports.follow(device.queue(step, stop=float(step == 2)))
            known.append(reports.stop)
        reports.catch_up()
    assert known == [False, False, True, True]


@pytest.mark.parametrize(("there", "told"), [(True, [1, 2]), (False, [1])])
def test_an_error_leaves_out_what_the_device_has_not_done(there, told):
    """Waiting might last for ever: another rank may have gone."""
    device = Device()
    with pytest.raises(ValueError, match="bad sample"), Reports(device.tell) as reports:
        reports.follow(device.queue(1))
        reports.follow(device.queue(2, there=there))
        raise ValueError("bad sample")
    assert [step for step, _ in device.told] == told
