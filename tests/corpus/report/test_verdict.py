"""The table of `megatrain data agree` (megatrain.cli.label_agreement), and its lists."""

import json

import pytest

from megatrain.cli.main import main
from megatrain.corpus.report.labelled import read_labels
from megatrain.corpus.report.verdict import disagreement_lines, verdict

# 50 proposals of two readers: the example of Cohen's kappa in textbooks, 0.4.
TWO = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15


@pytest.fixture
def two(tmp_path):
    path = tmp_path / "two.csv"
    rows = [f"{n},{ann},{bob}\n" for n, (ann, bob) in enumerate(TWO)]
    path.write_text("item,label_ann,label_bob\n" + "".join(rows))
    return path


def test_the_table_of_two_raters(two, capsys):
    assert main(["data", "agree", str(two)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "50 items, 2 raters, 100 labels (0 missing): no 45, yes 55",
        "  percent agreement     70.0%  of the pairs of labels of 50 items",
        "  Cohen's kappa         0.400",
        "  Fleiss' kappa         0.394  of the 50 items with 2 labels",
        "  Krippendorff's alpha  0.400  nominal",
        "  disagreements         15 items, 15 of them without a majority",
        "items by label of ann (rows) and bob (columns)",
        "               no     yes",
        "  no           15      10",
        "  yes           5      20",
        "alpha is below 0.667: too low to rely on. Read the disagreements, sharpen the instructions, and label anew.",
    ]


@pytest.fixture
def three(tmp_path):
    path = tmp_path / "three.jsonl"
    rows = {"a": (3, 3, 3), "b": (1, 1, 2), "c": (1, 2, 3), "d": (2, 2, None), "e": (None, None, 1)}
    lines = [
        {"item": item, "rater": rater, "label": label}
        for item, row in rows.items()
        for rater, label in zip(("ann", "bob", "eve"), row, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_table_of_three_raters(three, tmp_path, capsys):
    output, majority = tmp_path / "differ.jsonl", tmp_path / "majority.jsonl"
    command = ["data", "agree", str(three), "--level", "ordinal", "--output", str(output), "--majority", str(majority)]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        "5 items, 3 raters, 12 labels (3 missing): 1 4, 2 4, 3 4",
        "  percent agreement     50.0%  of the pairs of labels of 4 items",
        "  Cohen's kappa         0.260  mean of 3 pairs; the lowest: bob and eve 0.000, ann and eve 0.143, ann and bob 0.636",
        "  Fleiss' kappa         0.135  of the 3 items with 3 labels",
        "  Krippendorff's alpha  0.494  ordinal",
        "  disagreements         2 items, 1 of them without a majority",
        "pairs of labels of one item, counted both ways",
        "                1       2       3",
        "  1             2       3       1",
        "  2             3       2       1",
        "  3             1       1       6",
        "alpha is below 0.667: too low to rely on. Read the disagreements, sharpen the instructions, and label anew.",
    ]
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"item": "c", "majority": None, "labels": {"ann": "1", "bob": "2", "eve": "3"}},
        {"item": "b", "majority": "1", "labels": {"ann": "1", "bob": "1", "eve": "2"}},
    ]
    assert [json.loads(line)["majority"] for line in majority.read_text().splitlines()] == ["3", "1", None, "2", "1"]


def test_where_all_labels_are_the_same_no_measure_is_made_up(tmp_path):
    path = tmp_path / "same.csv"
    path.write_text("item,label_a,label_b\n1,x,x\n2,x,x\n")
    said = verdict(read_labels([path]))
    assert said.count("undefined") == 3
    assert "percent agreement     100.0%" in said
    assert said.endswith("no measure but percent agreement.")


def test_names_of_a_file_are_printed_harmlessly(tmp_path):
    path = tmp_path / "odd.jsonl"
    rows = [{"item": n, "rater": rater, "label": f"\x1b[2J\ud800{n}{rater}"} for n in range(20) for rater in "ab"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = read_labels([path])
    said = verdict(given)
    assert "\x1b" not in said and "and 28 labels more" in said
    assert max(map(len, said.splitlines())) < 400
    disagreement_lines(given).encode()


def test_wrong_use_is_said(two, capsys):
    assert main(["data", "agree", str(two), "--raters", "ann,"]) == 2
    assert "'ann,' has an empty name. Use for example ann,bob" in capsys.readouterr().err
    assert main(["data", "agree", str(two), "--item", "id"]) == 1
    assert "there is no column 'id'; there are item, label_ann, label_bob" in capsys.readouterr().err
    assert main(["data", "agree", str(two.parent / "none.csv")]) == 1
    assert "No such file" in capsys.readouterr().err
