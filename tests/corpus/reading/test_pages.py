"""HTML: main content and title; a page that breaks its extractor costs itself, and the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatrain.corpus.document import Tally
from megatrain.corpus.reading import pages as pages_module
from megatrain.corpus.reading.choices import ReadConfig, SourceConfig
from megatrain.corpus.reading.documents import read_unit
from megatrain.corpus.reading.pages import Extracted, Extractor
from megatrain.corpus.reading.units import cut_units
from megatrain.data.prepare.read import ReadError
from megatrain.extras import MissingPackageError

BROKEN = str(Path(__file__).parents[2] / "harness/broken_extractor.py")


def page(body, head="<title>A title</title>"):
    frame = "<nav><a href=/>Home</a> <a href=/b>Other</a></nav>"
    main = f"<main><h1>Head</h1><p>{body} and enough text to be the main content of this page, which has a frame around it.</p></main>"
    return f"<!DOCTYPE html><html><head>{head}<script>var x = 1</script></head><body>{frame}{main}<footer>Imprint</footer></body></html>"


TEXT = "Head\n\n{} and enough text to be the main content of this page, which has a frame around it."


def read(folder, files, **values):
    """(documents, counts, [(file, where, said)]) of pages by name."""
    for name, data in files.items():
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    source = values.pop("source", {})
    config = ReadConfig((SourceConfig("web", (f"{folder}/*",), **source),), **values)
    tally = Tally()
    documents = [document for unit in cut_units(config) for document in read_unit(unit, config, tally)]
    places = [(Path(place.file).name, place.where, place.said) for places in tally.places.values() for place in places]
    return documents, dict(tally.counts), places


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_main_content_and_title(tmp_path, extractor):
    body = "A paragraph of many words, none of which says a thing. " * 9
    documents, counts, _ = read(tmp_path, {"a.html": page(body), "b.HTM": "<p></p>"}, extractor=extractor)
    assert counts == {"read.documents": 1, "read.empty": 1}
    assert documents[0].marks == {"title": "A title"} and (documents[0].at, documents[0].kind) == (0, "text")
    lines = [line for line in documents[0].text.splitlines() if line]
    assert lines == [line for line in TEXT.format(body).replace("  ", " ").splitlines() if line]


def test_encodings_as_browsers_take_them(tmp_path):
    files = {
        "1.html": page("漢字", '<meta charset="gb2312">').encode("gb18030"),
        "2.html": page("漢字").encode(),
        "3.html": page("漢字", "<meta charset=gbk>").encode("utf-16"),
        "4.html": page("café“", '<META http-equiv="Content-Type" content="text/html; charset=ISO-8859-1">').encode("cp1252"),
        "5.html": page("漢字", '<meta charset="utf-16">').encode(),
        "6.html": page("漢字", '<meta charset="no-such">').encode("utf-8-sig"),
        "7.html": b'<?xml version="1.0" encoding="shift_jis"?>' + page("漢字①").encode("cp932"),
        "8.html": page("漢字\xe9", " " * 1100 + "<meta charset=latin-1>").encode("latin-1", "ignore"),
    }
    documents, counts, places = read(tmp_path, files)
    bodies = [document.text.split("\n")[2].split(" and ")[0] for document in documents]
    assert bodies == ["漢字", "漢字", "漢字", "café“", "漢字", "漢字", "漢字①", "\ufffd"]
    assert counts == {"read.documents": 8, "read.invalid_text": 1} and places[0][:2] == ("8.html", "line 1")
    declared, _, _ = read(tmp_path, {}, source={"encoding": "gb18030"})
    assert "漢字" in declared[0].text and "漢字" not in declared[1].text


def test_pages_that_break_the_extractor(tmp_path, monkeypatch):
    config = ReadConfig(page_seconds=0.3, page_memory_mib=64)
    with Extractor(config) as extractor:
        extractor.command[1:3] = [BROKEN]
        names = ["a", "segfault", "b", "loop", "memory", "raise", "exit", "c"]
        died = "the extractor breaks down on the page"
        assert list(extractor.extract([name.encode() for name in names])) == [
            Extracted("A", "title of a"),
            Extracted(problem="read.page_crash", said=f"{died} (SIGSEGV)."),
            Extracted("B", "title of b"),
            Extracted(problem="read.page_time", said="the page takes more than 0.3 s (read.page_seconds)."),
            Extracted(problem="read.page_memory", said="the page needs more than 64 MiB (read.page_memory_mib)."),
            Extracted(problem="read.page_error", said=r"the extractor fails on the page (ValueError: no\nsuch page)."),
            Extracted(problem="read.page_crash", said=f"{died} (exit code 7)."),
            Extracted("C", "title of c"),
        ]
        answers = extractor.extract([b"leak%d" % n for n in range(5)])  # the second is refused memory for the first's sake
        assert [answer.text for answer in answers] == [f"LEAK{n}" for n in range(5)]
        monkeypatch.setattr(pages_module, "PATIENCE", 1.0)
        assert next(extractor.extract([b"sleep"])) == Extracted(problem="read.page_time", said="no answer within 1.3 s.")


def test_the_process_ends_with_its_parent(tmp_path):
    program = f"""
import os, sys
from megatrain.corpus.reading.choices import ReadConfig
from megatrain.corpus.reading.pages import Extractor
extractor = Extractor(ReadConfig(page_seconds=1.0))
extractor.command[1:3] = [{BROKEN!r}]
print(next(extractor.extract([b"pid"])).text, flush=True)
os.dup2(extractor.process.stdin.fileno(), 100)
if os.fork() == 0:
    os.setsid(); sys.stdin.read(); os._exit(0)  # holds the pipe open
list(extractor.extract([b"loop"] if sys.argv[1] == "busy" else []))
sys.stdin.read()
"""
    for how in ("idle", "busy"):
        parent = subprocess.Popen([sys.executable, "-c", program, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{child}").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        parent.stdin.close()
        parent.stdout.close()


HOSTILE = {
    "attributes": b"<p " + b" ".join(b'a%d="x"' % n for n in range(1_000_000)) + b">text</p>",
    "deep": b"<div>" * 1_000_000 + b"x",
    "script": b"<p>text<script>" + b"x = 1;" * 1_000_000,
}


@pytest.mark.slow
def test_hostile_pages_end_and_the_run_goes_on(tmp_path):
    begun = time.monotonic()
    files = {f"{n}{name}.html": data for n, (name, data) in enumerate(HOSTILE.items())}
    documents, counts, places = read(tmp_path, {**files, "9.html": page("Good")}, page_seconds=2.0)
    assert [Path(document.file).name for document in documents] == ["2script.html", "9.html"]
    assert counts == {"read.documents": 2, "read.page_time": 2}
    assert [name for name, _, _ in places] == ["0attributes.html", "1deep.html"]
    assert time.monotonic() - begun < 60


def test_a_hostile_page_is_named(tmp_path):
    files = {
        "1.html": page("One"),
        "2.html": b"<p " + b" ".join(b"a%d=x" % n for n in range(150_000)) + b">",
        "3.html": page("Three"),
    }
    documents, counts, places = read(tmp_path, files, page_seconds=0.2)
    assert [document.text for document in documents] == [TEXT.format("One"), TEXT.format("Three")]
    assert counts == {"read.documents": 2, "read.page_time": 1}
    assert places == [("2.html", "", "the page takes more than 0.2 s (read.page_seconds).")]
    with pytest.raises(ReadError, match=r"2\.html: the page takes more than 0\.2 s"):
        read(tmp_path, {}, page_seconds=0.2, on_error="stop")


def test_a_reader_says_that_it_moves_where_it_gives_nothing(tmp_path):
    (tmp_path / "a.html").write_text("")
    (tmp_path / "b.jsonl").write_bytes(b"bad\n" * 7 + b" " * (3 << 20))
    config, moves = ReadConfig((SourceConfig("web", (f"{tmp_path}/*",)),), longest=99), []
    (unit,) = cut_units(config)
    assert list(read_unit(unit, config, Tally(), lambda: moves.append(1))) == []
    assert len(moves) == 1 + 7 + 4 + 1  # an empty file, bad rows, chunks, a long line


def test_pages_that_do_not_go_there(tmp_path):
    files = {"1.html": b"x" * 99, "2.html": page("a\0b\xe9").encode("latin-1"), "3.html": page("Good")}
    documents, counts, places = read(tmp_path, files, page_bytes=98)
    assert documents == [] and counts == {"read.too_long": 3}
    assert places[0] == ("1.html", "", "the document has more than 98 bytes. If it is meant, raise read.page_bytes.")
    documents, counts, _ = read(tmp_path, files, broken_text="refuse")
    assert len(documents) == 2 and counts == {"read.documents": 2, "read.invalid_text": 1}
    documents, counts, _ = read(tmp_path, files)
    assert documents[1].text == TEXT.format("ab\ufffd") and counts == {
        "read.documents": 3,
        "read.invalid_text": 1,
        "read.nul": 1,
    }


def test_an_extractor_that_is_not_installed_is_told_of(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['trafilatura'] = None\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with Extractor(ReadConfig(extractor="trafilatura")) as extractor:
        with pytest.raises(MissingPackageError) as error:
            next(extractor.extract([b"<p>text"]))
        assert str(error.value) == "read.extractor=trafilatura needs trafilatura: pip install 'megatrain[html]'"
        extractor.command[:] = [sys.executable, "-c", "1/0"]
        with pytest.raises(MissingPackageError, match="the process of its own does not start: "):
            next(extractor.extract([b"<p>text"]))
    assert signal.getsignal(signal.SIGPROF) == signal.SIG_DFL
