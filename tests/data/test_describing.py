"""`data inspect` goes back from a token to document, file and line."""

from pathlib import Path

import numpy as np

from megatrain.cli.main import main
from megatrain.data.describing import describe_document
from megatrain.data.indexed import TokenStoreWriter
from megatrain.data.origins import FilePlace
from megatrain.data.prepare.text_store import TextStoreWriter
from megatrain.data.prepare.tokenize import tokenize_files
from megatrain.data.tokenizer import load_tokenizer


def test_inspect_goes_back_from_a_token_to_file_and_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "first"}\n\n{"text": ""}\n{"text": "the \\u00fcber"}\n')
    tokenize_files(["a.jsonl"], "bytes", "s", append_eod=True)
    assert main(["data", "inspect", "s", "--token", "6"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "document 1 of s: tokens 6 to 15 (10)",
        "  from a.jsonl, line 4",
        "  token 6 of the store, 0 of the document: 116 '<0x74>'",
        "  text 'the über<|endoftext|>'",
    ]
    assert main(["data", "inspect", "s", "--document", "0"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "document 0 of s: tokens 0 to 5 (6)",
        "  from a.jsonl, line 1",
        "  text 'first<|endoftext|>'",
    ]
    for option, said in (
        ("--token", "s has tokens 0..15, and no token 16."),
        ("--document", "s has documents 0..1, and no document 16."),
    ):
        assert main(["data", "inspect", "s", option, "16"]) == 1
        assert said in capsys.readouterr().err


def test_inspect_shows_ids_where_the_tokenizer_is_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with TokenStoreWriter("s", "u1") as writer:
        writer.add_documents(np.array([1, 2, 3], "u1"), [1, 2])
    assert main(["data", "inspect", "s", "--token", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "document 1 of s: tokens 1 to 2 (2)",
        "  from where is not known: there is no s.documents",
        "  token 1 of the store, 0 of the document: 2",
        "  ids [2, 3]",
    ]


def test_a_byte_has_its_line_where_the_file_is_at_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("{}\n{}\n\n{}\n")
    Path("a.gz").write_bytes(b"..\n")
    rows = {
        FilePlace("a.jsonl", 0, "byte"): "from a.jsonl, byte 0, line 1",
        FilePlace("a.jsonl", 7, "byte"): "from a.jsonl, byte 7, line 4",
        FilePlace("a.jsonl", 4, "byte"): "from a.jsonl, byte 4",  # another file by now
        FilePlace("a.jsonl", 11, "byte"): "from a.jsonl, byte 11",
        FilePlace("a.gz", 3, "byte"): "from a.gz, byte 3",
        FilePlace("gone.jsonl", 3, "byte"): "from gone.jsonl, byte 3",
        FilePlace("a.parquet", 3, "row"): "from a.parquet, row 3",
    }
    with TextStoreWriter("s", load_tokenizer("bytes")) as store:
        for place in rows:
            store.add_document("x", place)
    assert [describe_document("s", number).splitlines()[1].strip() for number in range(len(rows))] == list(rows.values())
