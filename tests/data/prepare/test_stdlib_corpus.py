"""The corpus that every Python brings along, and the users' own texts in its place."""

import json

import pytest

from megatrain.data.prepare import stdlib_corpus
from megatrain.data.prepare.read import ReadError
from megatrain.data.prepare.stdlib_corpus import build


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 300 small modules and what should be left out of it."""
    root = tmp_path / "lib"
    for i in range(300):
        path = root / (f"m{i}.py" if i % 2 else f"package/m{i}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Module {i}: naïve."""\n', encoding="utf-8")
    for name in (
        "site-packages/other.py",
        "lib2to3/tests/data/bad.py",
        "encodings/cp037.py",
        "pydoc_data/topics.py",
        "test/test_this.py",
        "empty.py",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("" if name == "empty.py" else "x = 1")
    (root / "latin.py").write_bytes(b"# \xe9\n")
    (root / "notes.txt").write_text("not a module")
    monkeypatch.setattr(stdlib_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_each_module_is_a_document_of_one_of_the_two(library, tmp_path):
    counts = build(tmp_path / "out")
    train, valid = rows(counts.train), rows(counts.valid)
    paths = [row["path"] for row in train + valid]
    assert sorted(paths) == sorted(p.relative_to(library).as_posix() for p in library.rglob("m*.py"))
    assert (len(train), len(valid)) == (counts.train_documents, counts.valid_documents)
    assert 3 <= len(valid) <= 30
    assert counts.valid_bytes == sum(len(row["text"].encode()) for row in valid)
    assert all(row["text"] == (library / row["path"]).read_text(encoding="utf-8") for row in train)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["train.jsonl", "valid.jsonl"]


def test_the_split_follows_the_path_alone(library, tmp_path):
    first = {row["path"] for row in rows(build(tmp_path / "one").valid)}
    for path in sorted(library.rglob("m*.py"))[::3]:
        path.unlink()
    left = {p.relative_to(library).as_posix() for p in library.rglob("m*.py")}
    assert {row["path"] for row in rows(build(tmp_path / "two").valid)} == first & left


def test_the_real_library_is_there(tmp_path):
    counts = build(tmp_path)
    assert counts.train_documents > 300 and counts.valid_documents > 10
    assert counts.train_bytes > 3_000_000
    assert {"argparse.py", "json/decoder.py"} <= {row["path"] for path in (counts.train, counts.valid) for row in rows(path)}


def test_an_interpreter_without_sources_is_explained(tmp_path, monkeypatch):
    (tmp_path / "only.py").write_text("x = 1")
    monkeypatch.setattr(stdlib_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ReadError, match=r"only 1 modules.*--text"):
        build(tmp_path / "out")


def test_users_files_and_directories(tmp_path):
    for i in range(30):
        (tmp_path / "texts" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / str(i % 3) / f"{i}.md").write_text(f"document {i}")
    (tmp_path / "texts" / "image.png").write_bytes(b"\xff")
    (tmp_path / "more.jsonl").write_text('{"text": "line one"}\n{"text": " "}\n{"text": "line two"}\n')
    counts = build(tmp_path / "out", held_out=0.2, text=[tmp_path / "texts", tmp_path / "more.jsonl"])
    everything = rows(counts.train) + rows(counts.valid)
    assert sorted(row["text"] for row in everything) == sorted([f"document {i}" for i in range(30)] + ["line one", "line two"])
    assert {"more.jsonl:1", "more.jsonl:3", "0/0.md"} <= {row["path"] for row in everything}
    assert counts.valid_documents > 0


@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_one_file_is_divided_at_paragraphs(tmp_path, separator):
    text = separator.join(f"paragraph {i} " + "word " * 60 for i in range(100))
    (tmp_path / "novel.txt").write_text(text)
    counts = build(tmp_path / "out", text=[tmp_path / "novel.txt"])
    pieces = sorted(rows(counts.train) + rows(counts.valid), key=lambda row: int(row["path"].split("#")[1]))
    assert separator.join(row["text"] for row in pieces) == text
    assert counts.valid_documents >= 1 and counts.train_documents > 5


def test_two_files_of_one_name_stay_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(f"text {name}")
    counts = build(tmp_path / "out", text=[tmp_path / "a", tmp_path / "b"])
    assert (counts.train_documents, counts.valid_documents) == (1, 1)


@pytest.mark.parametrize("share", [0.0, 1.0, -1])
def test_the_share_must_be_one(tmp_path, share):
    with pytest.raises(ValueError, match="held_out"):
        build(tmp_path, held_out=share)


def test_too_little_text_is_explained(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ReadError, match="too few to hold one out"):
        build(tmp_path / "out", text=[tmp_path / "a.txt"])
    with pytest.raises(ReadError, match="cannot be read"):
        build(tmp_path / "out", text=[tmp_path / "none.txt"])


def test_the_split_is_the_same_on_every_machine(library, tmp_path):
    """Pinned: Python's own hash of a string differs from process to process, this must not."""
    valid = [row["path"] for row in rows(build(tmp_path / "out").valid)]
    assert valid[:6] == ["m101.py", "m131.py", "m141.py", "m15.py", "m167.py", "m185.py"]
