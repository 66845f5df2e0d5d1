"""`data inspect` goes back from a token to document, file and line."""

from pathlib import Path

import numpy as np

from megatrain.cli.main import main
from megatrain.data.indexed import TokenStoreWriter
from megatrain.data.prepare.tokenize import tokenize_files


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
