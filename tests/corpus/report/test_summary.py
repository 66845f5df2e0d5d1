"""Counts become stages, rules and sources, and what is suspicious is said."""

from collections import Counter

from megatrain.corpus.report.summary import AlarmLimits, alarms, summary_of


def flow(stage, way, **sources):
    """The counts of a flow, of 10 bytes a document."""
    return {
        f"{stage}/{way}/{what}/{source}": number * times
        for source, number in sources.items()
        for what, times in (("documents", 1), ("bytes", 10))
    }


COUNTS = {
    **flow("filter", "in", web=100, books=50, few=19),
    **flow("filter", "refused/c4.brace", web=10, books=26, few=19),
    **flow("filter", "alone/c4.brace", web=5),
    **flow("filter", "out", web=90, books=24),
    **flow("near", "in", web=90, books=24),
    **flow("near", "out", web=70, books=24),
    "filter/in/letters/13": 169,
    "filter/language/en": 60,
    "filter/language/?": 54,
    "tokens/web": 350,
    "tokenized/web": 700,
    "perplexity/en/33": 7,
    "cluster/near/2": 8,
    "cluster/near/1000": 3,
    "clean.email": 5,
}


def test_counts_find_their_places():
    summary = summary_of(COUNTS, ["read", "filter", "near"])
    assert [stage.name for stage in summary.stages] == ["filter", "near"]
    stage = summary.stages[0]
    assert stage.into.documents == {"web": 100, "books": 50, "few": 19}
    assert stage.into.letters == {13: 169}
    assert stage.out.bytes == {"web": 900, "books": 240}
    assert stage.rules["c4.brace"].refused.documents.total() == 55
    assert stage.rules["c4.brace"].alone.documents == {"web": 5}
    assert stage.languages == {"en": 60, "?": 54}
    assert summary.perplexities == {"en": {33: 7}}
    assert summary.clusters == {"near": {2: 8, 1000: 3}}
    assert summary.others == {"clean.email": 5}


def test_tokens_before_tokenizing_are_bytes_at_the_rate_of_their_source():
    summary = summary_of({**COUNTS, "tokens/books": 60, "tokenized/books": 240}, ["filter", "near"])
    assert (summary.rate("web"), summary.rate("books"), summary.rate("few")) == (0.5, 0.25, 410 / 940)
    assert summary.about(summary.stages[1].out) == 350 + 60
    assert summary_of({}, []).rate("web") == 0.0


def test_stages_that_nobody_named_come_last():
    assert [stage.name for stage in summary_of(COUNTS, ["near"]).stages] == ["near", "filter"]


def test_alarms():
    """A source that loses more than 30%, a rule that refuses more than half of a source, a cluster above 1,000; few lost ones are none."""
    assert alarms(summary_of(COUNTS, ["filter", "near"])) == [
        "source books loses 52% of its documents (26 of 50), most of them in filter (26)",
        "source few loses 100% of its documents (19 of 19), most of them in filter (19)",
        "rule c4.brace of filter refuses 52% of source books (26 of 50 documents)",
    ]
    more = {**COUNTS, **flow("near", "out", web=69, books=24, few=1), "cluster/near/1001": 2, "cluster/near/5000": 1}
    assert alarms(summary_of(more, ["filter", "near"])) == [
        "source books loses 52% of its documents (26 of 50), most of them in filter (26)",
        "source web loses 31% of its documents (31 of 100), most of them in near (21)",
        "rule c4.brace of filter refuses 52% of source books (26 of 50 documents)",
        "clusters of near duplicates with more than 1,000 documents: 3, the largest of 5,000",
    ]
    half = {**COUNTS, **flow("filter", "refused/c4.brace", books=25), **flow("near", "out", web=70, books=35, few=1)}
    assert alarms(summary_of(half, ["filter", "near"])) == []
    assert alarms(summary_of(Counter(), [])) == []
    assert alarms(summary_of(more, ["filter", "near"], AlarmLimits(0.6, 0.6, 5000))) == []
    assert alarms(summary_of(more, ["filter", "near"], AlarmLimits(0.6, 0.6, None))) == []
    assert len(alarms(summary_of(more, ["filter", "near"], AlarmLimits(0.6, 0.6, 4999)))) == 1
