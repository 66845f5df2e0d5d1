"""The picture of a run: rendered, decoded and looked at, pixel by pixel."""

import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

from megatrain.records.plot import draw_loss, smooth


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(step, loss):
    return {"step": step, "loss": loss, "learning_rate": 1e-3, "tokens": step * 64}


def render(tmp_path, rows, references=None):
    png = tmp_path / "loss.png"
    draw_loss(write(tmp_path / "metrics.jsonl", rows), png, references)
    return imread(png)


def ink(picture):
    """Share of the pixels that are not white."""
    return float((picture[..., :3] < 0.98).any(axis=-1).mean())


def near(picture, rgb):
    """How many pixels have about this colour, 0..255."""
    return int((np.abs(picture[..., :3] * 255 - np.array(rgb)).max(axis=-1) < 12).sum())


TRAIN, VALID = (0x2F, 0x6F, 0xB5), (0xD9, 0x62, 0x2B)


def test_a_run_gives_a_picture_of_sane_size_with_all_its_curves(tmp_path):
    rows = [train(s, 9 - s / 50) for s in range(1, 101)] + [{"step": s, "valid_loss": 8.0, "tokens": 1} for s in (50, 100)]
    picture = render(tmp_path, rows)
    assert picture.shape[:2] == (720, 1080)
    assert 0.02 < ink(picture) < 0.5
    assert near(picture, TRAIN) > 300
    assert near(picture, VALID) > 300
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".jsonl"] == ["loss.png"]  # no half-made file is left


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [train(1, 9.0)],
        [train(1, None), train(2, None)],
        [train(s, None if 3 < s < 7 else 9.0 - s) for s in range(1, 9)],
        [{"step": 3, "valid_loss": 4.0}],
        [{"step": 3, "valid_loss": None}],
        [train(s, 5.0) for s in range(1, 9)],
    ],
    ids=["nothing", "one row", "all lost", "gap", "only validation", "validation lost", "flat"],
)
def test_any_run_can_be_drawn(tmp_path, rows):
    assert 0.005 < ink(render(tmp_path, rows)) < 0.5


def test_no_validation_curve_without_validation(tmp_path):
    assert near(render(tmp_path, [train(s, 9 - s / 50) for s in range(1, 101)]), VALID) == 0


def test_reference_lines_are_drawn_and_in_the_frame(tmp_path):
    rows = [train(s, 9 - s / 50) for s in range(1, 101)]
    purple = (0x8A, 0x63, 0xB8)
    assert near(render(tmp_path, rows), purple) == 0
    assert near(render(tmp_path, rows, {"unigram": 3.0}), purple) > 300


def test_one_spike_does_not_flatten_the_rest(tmp_path):
    calm = [train(s, 9 - s / 50) for s in range(1, 301)]
    spiked = [{**row, "loss": 1e4} if row["step"] == 150 else row for row in calm]

    def height(rows):
        return np.ptp(
            np.nonzero((np.abs(render(tmp_path, rows)[..., :3] * 255 - np.array(TRAIN)).max(axis=-1) < 12)[:, :500])[0]
        )

    assert height(spiked) > 0.5 * height(calm)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path):
    metrics = write(tmp_path / "metrics.jsonl", [train(1, 2.0)])
    (tmp_path / "loss.png").mkdir()
    (tmp_path / "loss.png" / "keep").touch()
    with pytest.raises(OSError, match="directory"):
        draw_loss(metrics, tmp_path / "loss.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_smoothing_does_not_lag_and_skips_what_is_not_finite():
    line = np.arange(100.0)
    assert smooth(line, 5.0)[40:60] == pytest.approx(line[40:60], abs=0.02)
    line[50] = math.nan
    smoothed = smooth(line, 5.0)
    assert math.isnan(smoothed[50])
    assert np.isfinite(np.delete(smoothed, 50)).all()
    assert smooth(np.array([3.0]), 1.0).tolist() == [3.0]
