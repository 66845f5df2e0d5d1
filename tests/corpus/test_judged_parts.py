"""A preparation with n-gram models: thresholds that no cut into units changes, written down, and taken again by a later preparation."""

import json
import random

import pytest
import yaml

from megatrain.cli.main import main
from megatrain.corpus.shards import documents_of

PROSE = "the house and garden of a town that have been with us to be seen by people in every season of its long years"
WORDS = PROSE.split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    drawn = random.Random(1)
    pages = [" ".join(drawn.choices(WORDS[: 4 + n % 16], k=60)) for n in range(100)]
    rows = [{"text": page, "language": "en"} for page in pages]
    (folder / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "french.jsonl").write_text(json.dumps({"text": "une maison et un jardin dans une ville " * 9}) + "\n")
    (folder / "text").write_text("\n".join(pages[::3]))
    words = ["--order", "2", "--input", str(folder / "text"), "--arpa", str(folder / "en.arpa"), "--discount-fallback"]
    assert main(["ngram", "fit", *words, "--memory", "64M", "--workers", "1"]) == 0
    return folder


def prepare(folder, name, **sections):
    """The thresholds, the report, and the documents that are kept."""
    sources = [
        {"name": source, "paths": [f"{folder}/{source}.jsonl"], "language": language, "rules": []}
        for source, language in (("web", "en"), ("french", "fr"))
    ]
    tree = {
        "read": {"sources": sources, **sections.pop("read", {})},
        "dedup": {"parts": 1},
        "perplexity": {"models": [{"language": "en", "path": f"{folder}/en.arpa"}], **sections.pop("perplexity", {})},
        "tokenize": {"held_out": 0.0},
        "output": {"dir": f"{folder}/{name}"},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["data", "prepare", str(path), "--worker"]) == 0
    out = folder / name
    kept = [document for shard in sorted(out.glob("documents/*")) for document in documents_of(shard)]
    return (out / "thresholds.json").read_text(), (out / "REPORT.md").read_text(), kept


@pytest.fixture(scope="module")
def whole(folder):
    return prepare(folder, "whole")


def test_the_tail_goes_and_other_languages_stay(whole):
    thresholds, report, kept = whole
    found = json.loads(thresholds)["languages"]["en"]
    assert found["documents"] == 100
    english = [document for document in kept if document.language == "en"]
    assert len(english) == 60 and len(kept) == 61
    assert max(document.scores["perplexity"] for document in english) < found["tail"]
    assert {document.marks["perplexity_part"] for document in english} == {"head", "middle"}
    assert "| perplexity.tail | 40 |" in report and "| perplexity.no_model/fr | 1 |" in report
    assert f"The middle and the tail begin at: en {found['middle']:.1f} and {found['tail']:.1f}." in report


def test_no_cut_into_units_changes_thresholds(folder, whole):
    thresholds, _, kept = prepare(folder, "units", read={"unit_bytes": 5000})
    assert thresholds == whole[0]
    assert [document.text for document in kept] == [document.text for document in whole[2]]


def test_a_later_preparation_takes_them(folder, whole):
    given = {"thresholds": f"{folder}/whole/thresholds.json", "keep": ["tail"], "percentiles": [1.0, 2.0]}
    thresholds, _, kept = prepare(folder, "later", perplexity=given)
    assert thresholds == whole[0]
    assert len(kept) == 41 and {document.marks.get("perplexity_part") for document in kept} == {"tail", None}
