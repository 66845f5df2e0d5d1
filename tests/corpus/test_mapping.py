"""Documents go through the steps of a stage a few at a time, and what comes of them is what comes of each alone."""

import random

import pytest
from small_corpus import text

from megatrain.corpus import mapping
from megatrain.corpus.document import Document, Tally
from megatrain.corpus.mapping import BREAKS, staged
from megatrain.corpus.report.unit_audit import Audit


def shout(document: Document, tally: Tally) -> tuple[str, ...]:
    document.text = document.text.upper()
    tally.count("shouted")
    return ("loud.long",) if len(document.text) > 300 else ()


def short(document: Document, _tally: Tally) -> tuple[str, ...]:
    return ("short.capital",) if len(document.text) < 20 and document.text.isupper() else ()


def first_line_off(document: Document, _tally: Tally) -> tuple[str, ...]:
    document.text = document.text.partition("\n")[2]
    return ()


def passed(texts, stages, *, annotate=False):
    audit = Audit(seed=1)
    documents = (Document(text, "web", "a.jsonl", at) for at, text in enumerate(texts))
    kept = [(one.at, one.text, one.marks) for one in staged(documents, stages, audit, annotate=annotate)]
    return kept, dict(audit.tally.counts), audit.as_json()


def test_steps_are_asked_in_order_and_each_stage_counts():
    stages = [("clean", [shout]), ("filter", [short, first_line_off])]
    kept, counts, _ = passed(["a\nb", "Long enough for it\nhere", "x" * 301, "One line alone, of letters"], stages)
    assert kept == [(1, "HERE", {})]
    assert counts["shouted"] == 4
    assert counts["clean/in/documents/web"] == 4 and counts["filter/in/documents/web"] == 3
    assert counts["clean/refused/loud.long/documents/web"] == 1 and counts["clean/refused/loud.long/bytes/web"] == 301
    assert counts["filter/refused/short.capital/documents/web"] == 1 and counts["filter/refused/short.capital/bytes/web"] == 3
    assert counts["filter/refused/filter.empty/bytes/web"] == 26


@pytest.mark.parametrize("annotate", [False, True])
def test_however_many_at_a_time_all_is_the_same(monkeypatch, annotate):
    draw = random.Random(1)
    texts = [draw.choice(["a\nb", "", "x" * 400, text(seed, 12), text(seed, 240), f"{seed}\nword"]) for seed in range(200)]
    stages = [("clean", [shout]), ("filter", [short, first_line_off])]
    monkeypatch.setattr(mapping, "FEW", 1)
    alone = passed(texts, stages, annotate=annotate)
    assert any(BREAKS in marks for _, _, marks in alone[0]) == annotate
    for few, letters in ((3, 1 << 17), (64, 1 << 17), (1000, 500), (1000, 1 << 30)):
        monkeypatch.setattr(mapping, "FEW", few)
        monkeypatch.setattr(mapping, "LETTERS", letters)
        assert passed(texts, stages, annotate=annotate) == alone


def test_no_more_letters_wait_than_a_few_documents_have():
    taken = []

    def documents():
        for at in range(10):
            taken.append(at)
            yield Document("x" * 100_000, "web", "a.jsonl", at)

    kept = staged(documents(), [], Audit(), annotate=False)
    assert next(kept).at == 0 and taken == [0, 1]
