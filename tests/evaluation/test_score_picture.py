"""The picture of scores: rendered, decoded and looked at, pixel by pixel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from megatrain.evaluation.score_picture import ROWS, draw_scores

FIRST, SECOND = (0x2F, 0x6F, 0xB5), (0xD9, 0x62, 0x2B)


def score(value: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "stderr": 0.1, "units": 9, "interval": "Wilson"}


def tasks(**metrics: dict[str, Any]) -> dict[str, Any]:
    return {"capitals 首都 $x$": {"metrics": metrics}}


def columns(picture: np.ndarray, rgb: tuple[int, int, int]) -> np.ndarray:
    """Columns that have this colour: the dots, whose intervals are paler."""
    return np.flatnonzero((np.abs(picture[..., :3] * 255 - np.array(rgb)).max(axis=-1) < 12).any(axis=0))


def test_two_models_are_at_their_values(tmp_path: Path) -> None:
    png = tmp_path / "scores.png"
    one = tasks(acc=score(0.2, 0.1, 0.3), acc_norm=score(0.4, 0.3, 0.5))
    two = tasks(acc=score(0.8, 0.7, 0.9), acc_norm=score(0.6, 0.5, 0.7))
    assert draw_scores({"old": one, "new": two}, png) == 0
    picture = imread(png)
    assert picture.shape[1] == 990
    below_legend = picture[40:]
    assert columns(below_legend, FIRST).max() < columns(below_legend, SECOND).min()
    assert [file.name for file in tmp_path.iterdir()] == ["scores.png"]


def test_a_wider_interval_is_drawn_wider(tmp_path: Path) -> None:
    pale = []
    for low in (0.48, 0.1):
        draw_scores({"m": tasks(acc=score(0.5, low, 0.52), f1=score(0.9, 0.1, 0.9))}, tmp_path / "s.png")
        top = imread(tmp_path / "s.png")[:60]
        pale.append(len(columns(top, (0xB6, 0xCC, 0xE5))))
    assert pale[1] > 5 * pale[0] > 0


def test_perplexity_has_its_own_axis(tmp_path: Path) -> None:
    heights = []
    for metrics in ({"acc": score(0.5, 0.4, 0.6)}, {"acc": score(0.5, 0.4, 0.6), "perplexity": score(300.0, 200.0, 450.0)}):
        draw_scores({"m": tasks(**metrics)}, tmp_path / "s.png")
        heights.append(imread(tmp_path / "s.png").shape[0])
    assert heights[1] > 1.6 * heights[0]


def test_what_is_missing_leaves_a_gap(tmp_path: Path) -> None:
    png = tmp_path / "s.png"
    assert draw_scores({"a": tasks(acc=score(None, None, None), bleu=score(30.0, None, None)), "b": {}}, png) == 0
    assert len(columns(imread(png)[40:], FIRST)) < 40


def test_many_rows_are_the_first_metrics(tmp_path: Path) -> None:
    many = {
        f"task{number}": {"metrics": {"acc": score(0.5, 0.4, 0.6), "acc_norm": score(0.5, 0.4, 0.6)}} for number in range(30)
    }
    assert draw_scores({"m": many}, tmp_path / "s.png") == 30
    more = {f"task{number}": {"metrics": {"acc": score(0.5, 0.4, 0.6)}} for number in range(ROWS + 5)}
    assert draw_scores({"m": more}, tmp_path / "s.png") == 5


@pytest.mark.parametrize("models", [{}, {"m": {}}, {"m": {"t": {"metrics": {}}}}])
def test_without_scores_there_is_no_picture(models: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no scores to draw"):
        draw_scores(models, tmp_path / "s.png")
