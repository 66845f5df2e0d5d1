"""A whole report: its files, the same bytes again, and no harm by what documents are named."""

import hashlib

import pytest

from megatrain.corpus.document import Document
from megatrain.corpus.report.compose import write_report
from megatrain.corpus.report.unit_audit import Audit


@pytest.fixture(scope="module")
def audit():
    audit = Audit()
    for number in range(40):
        page = Document(f"text {number} \x1b[2J\n# title", "书|<b>", f"dir\n/`{number % 3}`.jsonl", number)
        audit.enter("filter", page)
        audit.leave("filter", page, ["c4.brace"] if number % 4 else [])
        if number % 4 == 0:
            audit.show(page)
    audit.tally.problem("read.broken", "a\nb", "line 3", "no \x1b[2J")
    return audit


def test_a_report_is_the_same_bytes_again(tmp_path, audit):
    hashes = []
    for name in ("one", "two"):
        said = write_report(tmp_path / name, audit, ["filter"], title="T", note="Nothing was removed.", found=["more"])
        starts = ["source 书|<b> loses 75% of its documents ", "rule c4.brace of filter refuses 75% of s", "more"]
        assert [line[:40] for line in said] == starts
        assert "\n- more\n" in (tmp_path / name / "REPORT.md").read_text()
        hashes.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()})
    assert hashes[0] == hashes[1]
    assert sorted(hashes[0]) == [
        *("REPORT.md", "lengths.png", "removed.md", "rules.png"),
        *("sheet.jsonl", "sheet.md", "sources.png", "stages.png"),
    ]


def test_what_documents_hold_cannot_leave_its_line(tmp_path, audit):
    write_report(tmp_path, audit, ["filter"])
    for name in ("REPORT.md", "removed.md", "sheet.md"):
        text = (tmp_path / name).read_text()
        assert "\x1b" not in text and "<b>" not in text.replace("\\<b\\>", "").replace("    书|<b>", "")
    assert (tmp_path / "removed.md").read_text().count("\n- `") == 20
    assert (tmp_path / "sheet.md").read_text().count("\n## ") == 10


def test_a_report_that_cannot_be_written_names_the_file(tmp_path, audit):
    (tmp_path / "REPORT.md").mkdir()
    with pytest.raises(OSError, match=r"REPORT\.md"):
        write_report(tmp_path, audit, ["filter"])
