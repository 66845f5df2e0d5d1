"""Examples are the documents of the smallest ranks, whatever the order and the number of workers."""

import json
import random
from dataclasses import dataclass

import pytest

from megatrain.corpus.report.examples import Example, Examples, rank_of


@dataclass
class Page:
    text: str
    source: str
    file: str
    at: int


PAGES = [Page(f"page {n} " * 9, "web", f"crawl/{n % 7}.jsonl", n * 100) for n in range(300)]


def gathered(pages, workers=1, **how):
    parts = [Examples(**how) for _ in range(workers)]
    for n, page in enumerate(pages):
        parts[n % workers].offer("gopher.words", page, f"{page.at} words")
        if page.at % 300 == 0:
            parts[n % workers].offer("c4.brace", page)
    for part in parts[1:]:
        parts[0].add(part)
    return parts[0]


def test_a_rank_is_the_same_for_ever():
    assert rank_of(0, "c4.brace", PAGES[0]) == "30d2fb15ef72b0c5"
    assert rank_of(1, "c4.brace", PAGES[0]) != rank_of(0, "c4.brace", PAGES[0])


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_order_and_number_of_workers_keep_the_documents_of_the_smallest_ranks(workers):
    shuffled = random.Random(workers).sample(PAGES, len(PAGES))
    found = gathered(shuffled, workers, most=4, letters=10)
    smallest = sorted(PAGES, key=lambda page: rank_of(0, "gopher.words", page))[:4]
    assert [row.at for row in found.of("gopher.words")] == [page.at for page in smallest]
    assert [row.said for row in found.of("gopher.words")] == [f"{page.at} words" for page in smallest]
    assert found.as_json() == gathered(PAGES, most=4, letters=10).as_json()
    assert found.names() == ["c4.brace", "gopher.words"]


def test_another_seed_shows_others():
    assert gathered(PAGES, seed=1).of("c4.brace") != gathered(PAGES, seed=2).of("c4.brace")


def test_what_is_kept_is_bounded():
    found = gathered(PAGES, letters=5)
    assert [len(found.of(name)) for name in found.names()] == [20, 20]
    row = found.of("gopher.words")[0]
    assert (row.text, row.letters) == ("page ", len(next(page.text for page in PAGES if page.at == row.at)))
    assert gathered(PAGES, most=0).names() == []
    assert found.of("no.such") == ()


def test_a_document_seen_twice_counts_once():
    once = gathered(PAGES, most=4)
    again = gathered(PAGES, most=4)
    again.add(once)
    assert again.as_json() == once.as_json()


def test_details_are_put_in_other_words():
    found = gathered(PAGES, most=2)
    before = found.said()
    found.retell(str.upper)
    assert found.said() == [said.upper() for said in before] and "0 WORDS" in found.said()[-1]
    assert [row.text for row in found.of("c4.brace")] == [row.text for row in gathered(PAGES, most=2).of("c4.brace")]


def test_json_and_back():
    found = gathered(PAGES, seed=3, most=2)
    assert Examples.from_json(json.loads(json.dumps(found.as_json()))).as_json() == found.as_json()


def test_a_name_of_a_file_is_made_printable_and_a_text_given_is_shown():
    found = Examples()
    found.offer("clean", Page("new", "web", "a\nb\udc80", 7), text="as it was")
    assert found.of("clean") == (Example(found.of("clean")[0].rank, "web", "a\\nb\\udc80", 7, "", 9, "as it was"),)


def test_examples_chosen_in_different_ways_do_not_merge():
    with pytest.raises(ValueError, match=r"of seed 0 \(at most 20 of 400 characters\) and of seed 1 \(at most 20 of 400\)"):
        Examples().add(Examples(seed=1))
