"""Documents with passages of evaluation sets are refused, and no others."""

import gzip
import json
import random

import pytest

from megatrain.corpus.document import Document, Tally
from megatrain.corpus.duplicates.leaks import LeakError, leaks_step
from megatrain.corpus.duplicates.parameters import LeakConfig, LeakSet

QUESTION = "A train leaves the station at noon and travels 60 miles an hour; how far is it by 3 o'clock?"
SHORT = "Natalia sold 48 clips to her friends in April"
TINY = "the capital of France"
CHINESE = "一列火车中午离开车站，以每小时六十公里的速度行驶，下午三点时它走了多远？"


def step_of(tmp_path, rows, **changes):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return leaks_step(LeakConfig(sets=(LeakSet(name="math", files=(str(path),), **changes.pop("of", {})),), **changes))


def refused(step, text):
    document = Document(text, "web", "file", 0)
    return list(step(document, Tally())), document.scores


def filled(text, draw):
    """A text amid others."""
    return " ".join([*(f"w{draw.randrange(9999)}" for _ in range(50)), text, *(f"w{draw.randrange(9999)}" for _ in range(50))])


@pytest.mark.parametrize("example", [QUESTION, SHORT, CHINESE])
def test_a_document_with_an_example_is_refused(tmp_path, example):
    step, draw = step_of(tmp_path, [{"question": example, "answer": TINY}]), random.Random(1)
    rules, scores = refused(step, filled(example.upper().replace(" ", "\n "), draw))
    assert rules == ["leaks.math"]
    assert scores["leaks.math"] >= 1
    for text in (filled("", draw), TINY, example[: len(example) // 2], "", "汉"):
        assert refused(step, text) == ([], {})


def test_part_of_an_example_is_enough_if_it_is_a_passage(tmp_path):
    step = step_of(tmp_path, [{"question": QUESTION}])
    assert refused(step, "x " + " ".join(QUESTION.split()[2:15]) + " x")[1] == {"leaks.math": 1.0}
    assert refused(step, "x " + " ".join(QUESTION.split()[2:14]) + " x") == ([], {})
    chinese = step_of(tmp_path, [{"question": CHINESE}])
    assert refused(chinese, "问：" + CHINESE[2:24])[0] == ["leaks.math"]
    assert refused(chinese, "问：" + CHINESE[2:20])[0] == []


def test_short_examples_are_compared_as_a_whole(tmp_path):
    step = step_of(tmp_path, [{"question": SHORT}])
    assert refused(step, "x " + SHORT + " y")[0] == ["leaks.math"]
    assert refused(step, SHORT.replace("April", "May"))[0] == []  # its first 8 words alone
    assert refused(step_of(tmp_path, [{"question": SHORT}], shortest=9), SHORT)[0] == ["leaks.math"]
    with pytest.raises(
        LeakError, match=r"math of dedup.leaks.sets has no text of 10 words and more, .* in .*set.jsonl: nothing"
    ):
        step_of(tmp_path, [{"question": SHORT}], shortest=10)


def test_how_much_makes_a_leak(tmp_path):
    text = "x " * 100 + QUESTION
    assert refused(step_of(tmp_path, [QUESTION], matches=9), text) == (["leaks.math"], {"leaks.math": 9.0})
    assert refused(step_of(tmp_path, [QUESTION], matches=10), text) == ([], {"leaks.math": 9.0})
    assert refused(step_of(tmp_path, [QUESTION], share=0.08), text)[0] == ["leaks.math"]
    assert refused(step_of(tmp_path, [QUESTION], share=0.09), text)[0] == []
    assert refused(step_of(tmp_path, [QUESTION], share=1.0), QUESTION)[0] == ["leaks.math"]


def test_rows_of_numbers_and_repeated_words_are_no_passages(tmp_path):
    rows = [QUESTION, "0 " * 40, "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", "one two " * 20, "no no no no no no no no", "一" * 30]
    step = step_of(tmp_path, rows)
    assert [refused(step, row)[0] for row in rows] == [["leaks.math"], [], [], [], [], []]
    with pytest.raises(LeakError, match="half of them different ones with a letter"):
        step_of(tmp_path, rows[1:])


def test_sets_are_told_apart_and_fields_chosen(tmp_path):
    rows = [{"q": QUESTION, "choices": [SHORT, {"c": CHINESE}], "n": 3}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=1))
    wrapped = QUESTION.replace(" travels", "\ntravels")
    other = tmp_path / "b.txt.gz"
    other.write_bytes(gzip.compress(f"intro\n{SHORT}\n\n{wrapped}\n".encode()))
    step = leaks_step(
        LeakConfig(
            sets=(
                LeakSet("all", (str(path),)),
                LeakSet("questions", (str(path),), ("q",)),
                LeakSet("choices", (str(path),), ("choices",)),
                LeakSet("text", (str(other),)),
            )
        )
    )
    assert refused(step, QUESTION)[0] == ["leaks.all", "leaks.questions", "leaks.text"]
    assert refused(step, SHORT)[0] == ["leaks.all", "leaks.choices", "leaks.text"]
    assert refused(step, CHINESE)[0] == ["leaks.all", "leaks.choices"]
    assert refused(leaks_step(LeakConfig()), QUESTION) == ([], {})


@pytest.mark.parametrize(
    ("name", "content", "fields", "said"),
    [
        ("a.jsonl", b'{"q": 1}\n{broken', (), r"a\.jsonl:2: not JSON .*one object a line"),
        ("a.jsonl", b'["x"]', ("q",), r"a\.jsonl:1: a JSON list, not an object"),
        ("a.jsonl", b'{"question": "x"}', ("q",), r"a\.jsonl: no row has the field 'q' of the set math"),
        ("a.txt", b"\xff\xfea\0b\0", (), r"a\.txt: this is UTF-16, not UTF-8"),
        ("a.txt.gz", b"\x1f\x8b\x08broken", (), r"a\.txt\.gz: "),
        ("a.txt", b"", (), r"math of dedup.leaks.sets has no text of 8 words and more"),
    ],
)
def test_sets_that_cannot_be_used_are_named(tmp_path, name, content, fields, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LeakError, match=said):
        leaks_step(LeakConfig(sets=(LeakSet("math", (str(tmp_path / name),), fields),)))


def test_a_set_without_files_and_two_of_one_name(tmp_path):
    with pytest.raises(LeakError, match=r"math of dedup.leaks.sets has no files. Give them: files: \[eval/math.jsonl\]"):
        leaks_step(LeakConfig(sets=(LeakSet("math"),)))
    with pytest.raises(LeakError, match=r"two of dedup.leaks.sets have one name, among math, math"):
        leaks_step(LeakConfig(sets=(LeakSet("math"), LeakSet("math"))))
    with pytest.raises(FileNotFoundError):
        leaks_step(LeakConfig(sets=(LeakSet("math", (str(tmp_path / "none.txt"),)),)))


def test_halves_of_surrogate_pairs_do_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "one \\ud83d two three four five six seven eight"}')
    step = leaks_step(LeakConfig(sets=(LeakSet("math", (str(tmp_path / "a.jsonl"),)),)))
    assert refused(step, "one two three four five six seven eight")[0] == ["leaks.math"]
