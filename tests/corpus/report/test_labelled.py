"""Labels are read in each of their forms, and what cannot be compared is said with file, line and remedy."""

import json

import numpy as np
import pytest

from megatrain.corpus.report.labelled import Columns, LabelError, read_labels

LONG = "item,rater,label\n7,ann,good\n7,bob,good\n8,ann,bad\n8,bob,good\n9,bob,bad\n"
WIDE = "item,text,label_ann,label_bob\n7,x,good,good\n8,y,bad,good\n9,z,,bad\n"


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(folder, name, rows):
    return write(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def the_same(found):
    assert (found.items, found.raters, found.labels) == (("7", "8", "9"), ("ann", "bob"), ("bad", "good"))
    assert found.codes.tolist() == [[1, 1], [0, 1], [-1, 0]]


def test_every_form_gives_the_same_labels(tmp_path):
    the_same(read_labels([write(tmp_path, "long.csv", LONG)]))
    the_same(read_labels([write(tmp_path, "bom.csv", b"\xef\xbb\xbf" + LONG.replace("\n", "\r\n").encode())]))
    the_same(read_labels([write(tmp_path, "long.tsv", LONG.replace(",", "\t"))]))
    the_same(read_labels([write(tmp_path, "wide.csv", WIDE)]))
    named = write(tmp_path, "named.csv", WIDE.replace("label_", ""))
    the_same(read_labels([named], Columns(raters=("ann", "bob"))))
    ann = jsonl(tmp_path, "ann.jsonl", [{"item": 7, "label": "good"}, {"item": 8, "label": "bad"}, {"item": 9, "label": None}])
    bob = jsonl(tmp_path, "bob.jsonl", [{"item": n, "label": label} for n, label in ((7, "good "), (8, "good"), (9, "bad"))])
    the_same(read_labels([ann, bob]))
    renamed = write(tmp_path, "renamed.csv", LONG.replace("item,rater,label", "id,who,verdict"))
    the_same(read_labels([renamed], Columns("id", "who", "verdict")))


def test_files_of_one_name_are_raters_by_their_paths(tmp_path):
    rows = [{"item": n, "label": n % 2} for n in range(3)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [jsonl(tmp_path, f"{folder}/sheet.jsonl", rows) for folder in "ab"]
    assert read_labels(paths).raters == tuple(map(str, paths))


def test_numbers_are_put_in_order_and_have_their_values(tmp_path):
    rows = [{"item": n % 3, "rater": n // 3, "label": label} for n, label in enumerate(["10", "9", 2.5, "10.0", 9, 2.5])]
    path = jsonl(tmp_path, "n.jsonl", rows)
    found = read_labels([path], Columns(level="interval"))
    assert (found.labels, found.values.tolist()) == (("2.5", "9", "10"), [2.5, 9.0, 10.0])
    assert read_labels([path]).labels == ("2.5", "9", "10", "10.0")
    flags = read_labels([jsonl(tmp_path, "b.jsonl", [{"item": n % 2, "rater": n // 2, "label": n == 1} for n in range(4)])])
    assert flags.labels == ("false", "true")


def test_an_order_is_as_given(tmp_path):
    found = read_labels([write(tmp_path, "long.csv", LONG)], Columns(level="ordinal", order=("good", "fair", "bad")))
    assert found.labels == ("good", "fair", "bad")
    assert np.array_equal(found.values, [0, 1, 2])


REFUSED = [
    ("item,rater,label\n1,ann,x\n2,ann,y\n", {}, "all labels are of one rater, 'ann', and agreement is between two"),
    ("item,rater,label\n1,ann,x\n1,bob,y\n", {}, "1 of 1 items has labels of two raters, and agreement takes 2 or more"),
    ("item,rater,label\n1,ann,x\n2,bob,y\n", {}, "0 of 2 items have labels of two raters.* The first are '1', '2'"),
    ("item,rater,label\n1,ann,\n", {}, "no row has a label, and agreement"),
    ("item,rater,label\n", {}, "there is no row with a label"),
    ("", {}, "there is no row with a label"),
    (LONG, {"item": "id"}, "there is no column 'id'; there are item, rater, label. Name one by --item"),
    (LONG, {"label": "verdict"}, "there is no column 'verdict'; .* Name one by --label"),
    (LONG, {"raters": ("ann", "eve")}, "there is no column 'ann'; .* Name one by --raters"),
    ("item,ann,bob\n1,x,y\n", {}, r"a.csv: who gave which label\? Its columns are item, ann, bob. .*--raters ann,bob"),
    (LONG + "7,ann,bad\n", {}, "a.csv:7: rater 'ann' gives item '7' the label 'bad', and gave it 'good' at .*a.csv:2"),
    (LONG + ",ann,bad\n", {}, "a.csv:7: the column 'item' is empty"),
    (LONG + "7,,bad\n", {}, "a.csv:7: the column 'rater' is empty: whose label is it"),
    (LONG + "7,ann,bad,3\n", {}, r"a.csv:7: 4 values for 3 columns \(item, rater, label\)"),
    (LONG + '7,"ann', {}, "a.csv:7: unexpected end of data"),
    ("item,item\n1,2\n", {}, "a.csv:1: two columns are named 'item'"),
    (LONG, {"level": "interval"}, "a.csv:2: the label 'good' is no number, which the level interval takes"),
    (LONG, {"level": "ordinal"}, "--level ordinal: --order bad,fair,good"),
    (LONG, {"level": "ordinal", "order": ("bad",)}, "a.csv:2: the label 'good' is not in --order bad"),
    (LONG, {"level": "ordinal", "order": ("bad", "good", "bad")}, "a label is there twice in --order bad,good,bad"),
    (LONG, {"level": "interval", "order": ("bad", "good")}, "--order gives no distances"),
    (LONG.encode() + b"9,ann,\xff\n", {}, "a.csv: not UTF-8 .byte 0xff, line 7"),
]


@pytest.mark.parametrize(("text", "columns", "said"), REFUSED)
def test_what_cannot_be_compared_is_said(tmp_path, text, columns, said):
    with pytest.raises(LabelError, match=said):
        read_labels([write(tmp_path, "a.csv", text)], Columns(**columns))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"item": 1, "rater": "ann", "label": ["x"]}', "a.jsonl:1: 'label' is a list, not one label"),
        ('{"item": 1}\nx', "a.jsonl:2: this is no JSON"),
        ('\n["x"]', "a.jsonl:2: a line must be an object"),
        ("[" * 100_000, "a.jsonl:1: this is no JSON"),
    ],
)
def test_broken_lines_are_said(tmp_path, text, said):
    with pytest.raises(LabelError, match=said):
        read_labels([write(tmp_path, "a.jsonl", text)])


def test_numbers_that_are_no_labels_are_refused(tmp_path):
    rows = [{"item": n // 2, "rater": n % 2, "label": n / 3} for n in range(257)]
    with pytest.raises(LabelError, match=r"there are 257 different labels, such as '0', .* Round numbers to fewer"):
        read_labels([jsonl(tmp_path, "n.jsonl", rows)])


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(LabelError, match=r"a.xlsx: what kind of file is this\?.* \.jsonl, \.csv or \.tsv"):
        read_labels([write(tmp_path, "a.xlsx", "x")])


def test_a_blank_quoted_line_break_and_a_form_feed_stay_in_their_cell(tmp_path):
    text = 'item,text,label_a,label_b\n1,"two\nlines",x,x\n2,form\x0cfeed\u2028here,x,y\n'
    found = read_labels([write(tmp_path, "a.csv", text)])
    assert (found.items, found.codes.tolist()) == (("1", "2"), [[0, 0], [0, 1]])
