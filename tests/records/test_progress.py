"""The bar, seen as a terminal would see it (a pseudo-terminal), and its absence elsewhere."""

import io
import os
import sys

import pytest

from megatrain.records.progress import StepBar, person_watching, short


@pytest.fixture
def terminal(monkeypatch):
    """A pseudo-terminal: (text stream to write to, function that closes it and returns what was shown)."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    master, slave = os.openpty()
    stream = os.fdopen(slave, "w")

    def shown():
        stream.close()
        seen = b""
        try:
            while chunk := os.read(master, 65536):
                seen += chunk
        except OSError:  # Linux says EIO once the other end is closed
            pass
        return seen.decode()

    yield stream, shown
    if not stream.closed:
        stream.close()
    os.close(master)


def test_a_terminal_is_watched_a_file_is_not(terminal, monkeypatch):
    stream, _ = terminal
    assert person_watching(stream)
    assert not person_watching(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not person_watching(stream)


def test_bar_shows_steps_loss_speed_and_lines_above_it(terminal):
    stream, shown = terminal
    bar = StepBar(1000, start_step=200, stream=stream)
    bar.update(500, 4.83124, 12345.6)
    bar.print("step 500/1000 | loss: 4.8312E+00 | [not markup] |")
    bar.close()
    bar.close()
    text = shown()
    for piece in ("500/1000", "loss 4.8312", "12.3k tokens/s", "50%", "left"):
        assert piece in text, piece
    assert "step 500/1000 | loss: 4.8312E+00 | [not markup] |\r\n" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


def test_time_left_counts_only_the_steps_done_here(terminal):
    """After a resume at 900 of 1000, ten steps in ten seconds leave 90 seconds, not one."""
    stream, shown = terminal
    bar = StepBar(1000, start_step=900, stream=stream)
    now = iter(range(0, 100000, 1))
    bar._progress.get_time = lambda: float(next(now))
    for step in range(901, 911):
        bar.update(step, 1.0, 1.0)
    left = bar._progress.tasks[0].time_remaining
    bar.close()
    shown()
    assert left is not None
    assert 60 <= left <= 300


def test_streams_are_given_back(terminal, monkeypatch):
    stream, shown = terminal
    monkeypatch.setattr(sys, "stderr", stream)
    before = sys.stdout
    bar = StepBar(10)
    sys.stderr.write("warning: something\n")
    bar.close()
    assert sys.stderr is stream
    assert sys.stdout is before
    assert "warning: something" in shown()


@pytest.mark.parametrize(
    ("value", "text"), [(0.4, "0"), (873, "873"), (12345.6, "12.3k"), (999.7, "1000"), (1.25e6, "1.25M"), (3.021e9, "3.02G")]
)
def test_short_numbers(value, text):
    assert short(value) == text
