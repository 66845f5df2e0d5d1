"""A document's name, and tallies that add up whatever the units were."""

from megatrain.corpus.document import PLACES, Document, Sighting, Tally


def tally(*problems: str) -> Tally:
    made = Tally()
    for said in problems:
        made.problem("read.bad", "a.jsonl", "line 7", said)
    return made


def test_a_document_is_named_by_its_place():
    assert Document("text", "web", "data/a.jsonl", 4096).name == "data/a.jsonl:4096"


def test_all_problems_count_and_the_first_places_are_kept():
    whole = tally(*map(str, range(15)))
    whole.add(tally(*map(str, range(15, 40))))
    assert whole.counts == {"read.bad": 40}
    assert [place.said for place in whole.places["read.bad"]] == list(map(str, range(PLACES)))
    whole.count("read.bytes", 100)
    again = Tally.of_json(whole.as_json())
    assert again.counts == whole.counts and again.places == whole.places
    assert again.places["read.bad"][0] == Sighting("a.jsonl", "line 7", "0")
