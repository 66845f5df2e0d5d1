"""What a unit tells the report adds up to the same for any division of the documents."""

import json
import random

import pytest

from megatrain.corpus.document import Document
from megatrain.corpus.report.unit_audit import KEPT, Audit


def document(number, source="web", text="some text "):
    return Document(text * (1 + number % 3), source, f"{source}.jsonl", number, language="en" if number % 2 else "")


def through(audit, number):
    """One document through a pipeline of two stages."""
    page = document(number, source="a/b" if number % 5 == 0 else "web")
    audit.enter("filter", page)
    refusals = [name for name, n in (("gopher.words", 3), ("list/x", 4)) if number % n == 0]
    audit.leave("filter", page, refusals)
    if not refusals:
        audit.enter("near", page)
        audit.leave("near", page, ["near"] if number % 7 == 0 else [], said="near web.jsonl:1")
        if number % 7:
            audit.tokenized(page.source, len(page.text), 2)
            audit.show(page)


def audited(numbers, workers=1):
    parts = [Audit(examples=3, sheet=4) for _ in range(workers)]
    for place, number in enumerate(numbers):
        through(parts[place % workers], number)
    parts[0].cluster("near", 4)
    for part in parts[1:]:
        parts[0].add(part)
    return parts[0]


def test_every_division_adds_up_to_the_same():
    numbers = list(range(200))
    one = audited(numbers).as_json()
    for workers in (2, 3):
        assert audited(random.Random(workers).sample(numbers, 200), workers).as_json() == one
    assert Audit.from_json(json.loads(json.dumps(one))).as_json() == one


def test_the_counts_of_a_stage():
    audit = Audit()
    refused = (["gopher.words", "list/x", "gopher.words"], ["list/x"], [], ["gopher.words"])
    for number, rules in enumerate(refused):
        audit.enter("filter", document(number))
        audit.leave("filter", document(number), rules, keep=True if number == 3 else None)  # the last is noted, not removed
    assert dict(audit.tally.counts) == {
        "filter/in/documents/web": 4,
        "filter/in/bytes/web": 70,
        "filter/in/letters/13": 2,
        "filter/in/letters/17": 1,
        "filter/in/letters/19": 1,
        "filter/refused/gopher.words/documents/web": 2,
        "filter/refused/gopher.words/bytes/web": 20,
        "filter/refused/list_x/documents/web": 2,
        "filter/refused/list_x/bytes/web": 30,
        "filter/alone/list_x/documents/web": 1,
        "filter/alone/list_x/bytes/web": 20,
        "filter/alone/gopher.words/documents/web": 1,
        "filter/alone/gopher.words/bytes/web": 10,
        "filter/out/documents/web": 2,
        "filter/out/bytes/web": 40,
        "filter/out/letters/13": 1,
        "filter/out/letters/19": 1,
        "filter/language/?": 1,
        "filter/language/en": 1,
    }
    assert audit.removed.names() == ["filter/gopher.words", "filter/list_x"]


def test_what_a_rule_refuses_is_counted_and_shown_as_it_entered():
    """A rule of lines may leave nothing of a document; cleaning shows what it has masked."""
    audit = Audit()
    for stage, text in (("clean", "me@x.org"), ("filter", "all of it")):
        page = document(0, text=text)
        audit.enter(stage, page)
        page.text = "" if stage == "filter" else "<EMAIL>"
        audit.leave(stage, page, ["rule"])
    assert audit.tally.counts["filter/refused/rule/bytes/web"] == audit.tally.counts["filter/alone/rule/bytes/web"] == 9
    shown = {name: [(row.text, row.letters) for row in audit.removed.of(name)] for name in audit.removed.names()}
    assert shown == {"clean/rule": [("<EMAIL>", 7)], "filter/rule": [("all of it", 9)]}


def test_bytes_are_those_of_utf8_and_lengths_are_characters():
    audit = Audit()
    audit.enter("read", Document("中文", "zh", "f", 0))
    assert dict(audit.tally.counts) == {"read/in/documents/zh": 1, "read/in/bytes/zh": 6, "read/in/letters/4": 1}


def test_tokens_clusters_and_the_sheet():
    audit = Audit()
    audit.tokenized("web", 3, 5)
    audit.cluster("near", 3)
    audit.cluster("near", 3)
    audit.show(document(0, text="kept"))
    assert dict(audit.tally.counts) == {"tokens/web": 5, "tokenized/web": 3, "cluster/near/3": 2}
    assert [(row.file, row.at, row.text) for row in audit.sheet.of(KEPT)] == [("web.jsonl", 0, "kept")]


def test_units_of_other_settings_do_not_add_up():
    with pytest.raises(ValueError, match=r"of seed 0 .* and of seed 1 .* cannot be merged"):
        Audit().add(Audit(seed=1))
