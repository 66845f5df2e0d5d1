"""What a store was made with: told, kept beside it, and held against the run that trains on it."""

import json

import pytest
from tokenizer_models import sentencepiece

from megatrain.config.load import from_dict
from megatrain.config.source import ConfigError
from megatrain.config.validate import validate
from megatrain.data.indexed import TokenStore, TokenStoreError, TokenStoreWriter
from megatrain.data.prepare.tokenize import tokenize_files
from megatrain.data.sources import open_sources
from megatrain.data.store_record import describe
from megatrain.data.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.jsonl").write_text('{"text": "once"}\n{"text": ""}\n{"text": "once once"}\n')
    return tmp_path


def made(folder, name="store", eod=None, bos=None, append_eod=False):
    tokenizer = load_tokenizer(folder / "tokenizer.json", eod, bos)
    append_eod = append_eod or eod not in (None, "none")
    report = tokenize_files([folder / "text.jsonl"], tokenizer, folder / name, append_eod=append_eod, engine="tokenizers")
    store = TokenStore(folder / name)
    return [store.document(n).tolist() for n in range(store.documents)], str(report).split("MB/s)")[1]


def test_documents_end_and_begin_with_what_was_found_or_asked_for(folder):
    (once,), _ = load_tokenizer(folder / "tokenizer.json").encode("once"), None
    assert made(folder) == ([[once], [once, once]], "")
    assert made(folder, append_eod=True) == ([[once, 2], [once, once, 2]], "; each document ends in '</s>' (2), by its name")
    said = "; each document begins with '<s>' (1), by bos=1, and ends in '<unk>' (0), by eod=<unk>"
    assert made(folder, eod="<unk>", bos="1") == ([[1, once, 0], [1, once, once, 0]], said)
    sentencepiece(template=True).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
    said = "; each document begins with '<s>' (1), by the tokenizer.json, which puts it first, "
    said += "and ends in '<unk>' (0), by tokenizer_config.json"
    assert made(folder, append_eod=True) == ([[1, once, 0], [1, once, once, 0]], said)
    assert made(folder, bos="none", eod="none") == ([[once], [once, once]], "")


def test_a_beginning_stands_only_before_the_first_piece_of_a_document(tmp_path, monkeypatch):
    monkeypatch.setattr("megatrain.data.prepare.read.PIECE_CHARACTERS", 8)
    (tmp_path / "a.txt").write_text("word " * 20)
    tokenize_files([tmp_path / "a.txt"], load_tokenizer("bytes", 0, "<|endoftext|>"), tmp_path / "s", append_eod=True)
    assert TokenStore(tmp_path / "s").document(0).tolist() == [256, *("word " * 20).encode(), 0]


def test_what_was_taken_is_kept_and_shown(folder):
    made(folder, append_eod=True, bos="<s>")
    record = json.loads((folder / "store.meta.json").read_text())
    identity = load_tokenizer(folder / "tokenizer.json").identity
    assert record == {
        "tokenizer": str(folder / "tokenizer.json"),
        "identity": identity,
        "vocab_size": 289,
        "eod": 2,
        "eod_token": "</s>",
        "bos": 1,
        "bos_token": "<s>",
        "documents": 2,
        "tokens": 7,
    }
    assert describe(str(folder / "store")).endswith(
        f"  made with {folder / 'tokenizer.json'} (289 tokens); each document begins with '<s>' (1), ends in '</s>' (2)"
    )
    forged = {"tokenizer": "t\x1b[2J\n", "eod_token": "e" * 1000, "bos_token": "\r"}
    (folder / "store.meta.json").write_text(json.dumps({**record, **forged}))
    assert describe(str(folder / "store")).endswith(
        r"  made with t\x1b[2J\n (289 tokens); each document begins with '\r' (1), ends in "
        + f"'{'e' * 600} ... (1,000 characters)' (2)"
    )
    with TokenStoreWriter(folder / "store", "<u2") as writer:  # a store of another maker in its place
        writer.add_document([1])
    assert not (folder / "store.meta.json").exists() and "made with" not in describe(str(folder / "store"))


def opened(folder, name="store", **data):
    sections = {"train": str(folder / name), "tokenizer": str(folder / "tokenizer.json"), **data}
    config = from_dict({"data": sections, "model": {"seq_length": 2}})
    data = config.data
    tokenizer = None if data.tokenizer is None else load_tokenizer(data.tokenizer, data.eod, data.bos)
    return open_sources(config, 400, tokenizer)


def test_stores_that_fit_are_opened(folder):
    made(folder, append_eod=True)
    opened(folder)
    opened(folder, eod="</s>")
    opened(folder, eod=2, bos="none")
    made(folder)
    opened(folder)
    made(folder, bos="<s>", eod="<unk>")
    opened(folder, bos=1, eod="<unk>")
    opened(folder, tokenizer=None)
    (folder / "store.meta.json").unlink()
    opened(folder)
    opened(folder, eod="<unk>")


REFUSED = {
    "another end": (
        {"append_eod": True},
        {"eod": "<unk>"},
        r"the documents of .*store end in the token '</s>' \(2\), and by data\.eod of this run they would end in the token '<unk>' \(0\)\. "
        r"Use data\.eod=2, or tokenize the text again with --eod '<unk>'\.",
    ),
    "made with another": (
        {"eod": "<unk>"},
        {},
        r"end in the token '<unk>' \(0\).* '</s>' \(2\)\. Use data\.eod=0, or .* --eod '</s>'",
    ),
    "no end": ({}, {"eod": "</s>"}, r"end in no token of their own, .* '</s>' \(2\)\. Use data\.eod=none, or .* --eod '</s>'"),
    "no beginning": (
        {},
        {"bos": "<s>"},
        r"begin with no token of their own, .* '<s>' \(1\)\. Use data\.bos=none, or",
    ),
    "a beginning": (
        {"bos": "<s>"},
        {},
        r"begin with the token '<s>' \(1\), .* no token of their own\. Use data\.bos=1, or .* 'none'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_stores_with_other_tokens_around_documents_are_refused(folder, case):
    options, data, message = REFUSED[case]
    made(folder, **options)
    with pytest.raises(TokenStoreError, match=message) as error:
        opened(folder, **data)
    key, value = str(error.value).split("Use data.")[1].split(", ")[0].split("=")
    opened(folder, **{key: int(value) if value.isdigit() else value})  # the advice works


def test_a_store_of_another_tokenizer_is_refused(folder):
    made(folder)
    sentencepiece("metaspace").save(str(folder / "other.json"))
    message = r"store was made with the tokenizer .*tokenizer\.json of 289 tokens, and data\.tokenizer=.*other\.json is another one, of 289"
    with pytest.raises(TokenStoreError, match=message):
        opened(folder, tokenizer=str(folder / "other.json"))
    with pytest.raises(TokenStoreError, match=r"data\.tokenizer=bytes is another one, of 257"):
        opened(folder, tokenizer="bytes")


def test_a_record_that_is_not_of_the_store_is_told(folder):
    made(folder)
    path = folder / "store.meta.json"
    good = path.read_text()
    path.write_text(good.replace('"tokens": 3', '"tokens": 4'))
    with pytest.raises(TokenStoreError, match=r"is of a store of 2 documents and 4 tokens, and .*store has 2 and 3"):
        opened(folder)
    rows = (good.replace('"tokens": 3', '"tokens": null'), good.replace('"eod": ', '"eod": true, "x": '))
    for bad in ("{", "[]", "{}", *rows):
        path.write_text(bad)
        with pytest.raises(TokenStoreError, match=r"store\.meta\.json, which says how the store was made, cannot be read"):
            opened(folder)


def test_glm_ends_documents_with_its_own(folder):
    made(folder, append_eod=True)
    config = {"objective": "glm", "glm": {"objective_mix": {"sentence": 0.0}, "tokens": {"eos": 1}}}
    with pytest.raises(TokenStoreError, match=r"by data\.glm\.tokens\.eos of this run .* Use data\.glm\.tokens\.eos=2"):
        opened(folder, **config)


def test_tokens_are_named_only_where_there_is_a_tokenizer():
    validate(from_dict({"data": {"train": "x", "eod": 0, "tokenizer": "bytes"}}), 1)
    config = from_dict({"data": {"train": "x", "eod": "</s>"}, "model": {"vocab_size": 100}})
    with pytest.raises(ConfigError, match=r"data\.eod=</s> names a token, and data\.tokenizer is null"):
        validate(config, 1)
    with pytest.raises(ConfigError, match="expected integer or text or null"):
        from_dict({"data": {"eod": 1.5}})
    assert from_dict({"data": {"eod": 7, "bos": "<s>"}}).data.eod == 7
