"""The pictures of a report: rendered, decoded and looked at, pixel by pixel."""

import numpy as np
import pytest
from matplotlib.image import imread

from megatrain.corpus.report.charts import draw
from megatrain.corpus.report.summary import summary_of

LEFT, ALONE, REFUSED = (0x2F, 0x6F, 0xB5), (0xD9, 0x62, 0x2B), (0xF0, 0xB5, 0x95)
SECOND, LIMIT = (0xD9, 0x62, 0x2B), (0xB0, 0x5A, 0x7A)
COUNTS = {
    "filter/in/documents/web": 100,
    "filter/in/documents/$x^": 10,
    "filter/in/letters/12": 60,
    "filter/in/letters/20": 50,
    "filter/refused/c4.brace/documents/web": 60,
    "filter/alone/c4.brace/documents/web": 30,
    "filter/out/documents/web": 40,
    "filter/out/documents/$x^": 10,
    "filter/out/letters/20": 50,
    "perplexity/en/30": 40,
    "perplexity/en/34": 20,
    "perplexity/zh/36": 30,
    "cluster/near/2": 90,
    "cluster/near/1500": 1,
}


def drawn(folder, counts, **more):
    names = draw(summary_of(counts, ["filter"]), folder, **more)
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)  # no half-made file is left
    return {name.removesuffix(".png"): imread(folder / name) for name in names}


def near(picture, rgb):
    """How many pixels have about this colour, 0..255."""
    return int((np.abs(picture[..., :3] * 255 - np.array(rgb)).max(axis=-1) < 12).sum())


def test_a_report_has_its_pictures(tmp_path):
    pictures = drawn(tmp_path, COUNTS, cutoffs={"en": (190.0, 380.0)})
    assert list(pictures) == ["stages", "rules", "sources", "lengths", "perplexities", "clusters"]
    for picture in pictures.values():
        assert picture.shape[1] == 900 and 150 <= picture.shape[0] <= 460
        assert 0.01 < (picture[..., :3] < 0.98).any(axis=-1).mean() < 0.7
    # the rule refuses 60 of 110 documents, 30 of them alone: the bars have their areas
    assert near(pictures["rules"], REFUSED) / near(pictures["rules"], ALONE) == pytest.approx(1.0, rel=0.1)
    assert near(pictures["rules"], LIMIT) > 10  # more than half of the documents
    assert near(pictures["perplexities"], LEFT) > 500 and near(pictures["perplexities"], SECOND) > 300
    assert near(pictures["clusters"], LIMIT) > 50


def test_cutoffs_are_drawn(tmp_path):
    without = near(drawn(tmp_path, COUNTS)["perplexities"], LEFT)
    assert near(drawn(tmp_path, COUNTS, cutoffs={"en": (240.0, 300.0)})["perplexities"], LEFT) > without + 300


@pytest.mark.parametrize(
    ("counts", "names"),
    [
        ({}, []),
        ({"filter/in/documents/web": 0}, ["stages", "sources"]),
        ({"filter/in/documents/web": 3, "filter/in/letters/-64": 3}, ["stages", "sources", "lengths"]),
        ({"perplexity/en/-64": 1}, ["perplexities"]),
        ({"cluster/near/2": 1}, ["clusters"]),
        ({"perplexity/$x^/33": 1, "cluster/\x1b/2": 1}, ["perplexities", "clusters"]),
        ({"$\\frac/in/documents/中文\x1b": 3, "$\\frac/refused/$/documents/中文\x1b": 3}, ["stages", "rules", "sources"]),
    ],
)
def test_any_counts_can_be_drawn(tmp_path, counts, names):
    assert list(drawn(tmp_path, counts)) == names


def test_many_rules_and_sources_stay_one_picture(tmp_path):
    counts = {f"filter/in/documents/source {n} {'x' * 99}": 10 + n for n in range(90)}
    counts |= {f"filter/refused/rule{n}/documents/source 1": n for n in range(90)}
    assert {picture.shape[:2] for name, picture in drawn(tmp_path, counts).items() if name in ("rules", "sources")} == {
        (1060, 900)
    }
