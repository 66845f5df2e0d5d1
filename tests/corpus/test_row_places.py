"""Rows of units are told by file and place."""

from megatrain.corpus.document import Document
from megatrain.corpus.row_places import places_of, row_told, told_by_place
from megatrain.corpus.shards import writing


def test_rows_are_found_and_told(tmp_path):
    def shard(unit):
        return tmp_path / f"{unit}.zst"

    for unit, rows in ((0, 3), (1, 1200)):
        with writing(shard(unit)) as write:
            for row in range(rows):
                write(Document("x", "web", f"{unit}.jsonl", row * 10))
    texts = [f"97% of {row_told(0, 2)}", "row 1,100 of unit 1 stays for 7 removed copies", "row 9 of unit 0", "no row", ""]
    places = places_of(texts, shard)
    assert places == {(0, 2): "0.jsonl:20", (1, 1100): "1.jsonl:11000"}
    told = [told_by_place(text, places) for text in texts]
    assert told == ["97% of 0.jsonl:20", "1.jsonl:11000 stays for 7 removed copies", "row 9 of unit 0", "no row", ""]
    assert places_of(["nothing"], lambda unit: tmp_path / "none") == {}
