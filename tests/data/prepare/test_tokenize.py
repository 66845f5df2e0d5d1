"""Tokenising: the same bytes for any number of workers, whole or nothing."""

import gzip
import json
import os
import random

import numpy as np
import pytest
import zstandard

from megatrain.cli.main import main
from megatrain.data.indexed import TokenStore
from megatrain.data.origins import FilePlace, read_origin
from megatrain.data.prepare import read, text_store
from megatrain.data.prepare.read import ReadError
from megatrain.data.prepare.text_store import TextStoreWriter
from megatrain.data.prepare.tokenize import tokenize_documents, tokenize_files
from megatrain.data.tokenizer import ByteTokenizer, TokenizerError, load_tokenizer
from megatrain.data.tokenizers.fitting import train_tokenizer
from megatrain.data.tokenizers.token_ids import EncodedTexts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A .jsonl of short, empty and long documents, also compressed, a .txt and a tokenizer; gives directory and texts."""
    directory = tmp_path_factory.mktemp("corpus")
    draw = random.Random(3)
    words = ["alpha", "beta", "Gamma", "delta,", "naïve", "日本語", "x=1;", "\n", "\n\n    ", "🙂", "<|endoftext|>"]

    def text(count):
        return " ".join(draw.choice(words) for _ in range(count))

    texts = [text(draw.choice([1, 5, 60])) for _ in range(300)] + ["", text(5000), text(3)]
    long = text(9000)
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    (directory / "a.jsonl").write_bytes(lines)
    (directory / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (directory / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    (directory / "b.txt").write_text(long, encoding="utf-8", newline="\n")
    train_tokenizer([directory / "a.jsonl"], 400, directory / "t.json")
    return directory, [*texts, long]


@pytest.fixture
def small_batches(monkeypatch):
    """Batches and pieces small enough that the corpus makes many of each."""
    monkeypatch.setattr(text_store, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(read, "PIECE_CHARACTERS", 300)


def files(directory, prefix):
    return [(directory / f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx")]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("tokenizer", ["bytes", "t.json"])
@pytest.mark.parametrize("append_eod", [False, True])
def test_the_store_holds_each_document_and_is_the_same_for_any_workers(corpus, tmp_path, tokenizer, append_eod):
    directory, texts = corpus
    name = tokenizer if tokenizer == "bytes" else directory / tokenizer
    inputs = [directory / "a.jsonl", directory / "b.txt"]
    reports = {w: tokenize_files(inputs, name, tmp_path / f"w{w}", workers=w, append_eod=append_eod) for w in (1, 2, 4)}
    assert files(tmp_path, "w1") == files(tmp_path, "w2") == files(tmp_path, "w4")
    store, encoder = TokenStore(tmp_path / "w1"), load_tokenizer(name)
    end = [encoder.eod] if append_eod else []
    expected = [encoder.encode(text) + end for text in texts if text]
    assert [store.document(i).tolist() for i in range(store.documents)] == expected
    assert (reports[2].documents, reports[2].empty, reports[2].tokens) == (len(expected), 1, store.tokens)
    assert reports[2].text_bytes == sum(len(text.encode()) for text in texts)
    assert "documents (1 empty ones left out)" in str(reports[2])


def test_piece_and_batch_sizes_do_not_show(corpus, tmp_path, monkeypatch):
    directory, _ = corpus
    inputs = [directory / "a.jsonl", directory / "b.txt"]
    tokenize_files(inputs, directory / "t.json", tmp_path / "large")
    monkeypatch.setattr(text_store, "BATCH_CHARACTERS", 11)
    monkeypatch.setattr(read, "PIECE_CHARACTERS", 50)
    tokenize_files(inputs, directory / "t.json", tmp_path / "small", workers=3)
    assert files(tmp_path, "large") == files(tmp_path, "small")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_compressed_files_give_the_same_store(corpus, tmp_path, name):
    directory, _ = corpus
    tokenize_files([directory / "a.jsonl"], "bytes", tmp_path / "plain")
    tokenize_files([directory / name], "bytes", tmp_path / "packed")
    assert files(tmp_path, "plain") == files(tmp_path, "packed")


def test_large_vocabularies_get_int32(corpus, tmp_path):
    class Wide(ByteTokenizer):
        vocab_size, divisible = 70000, False

        def encode_batch(self, texts):
            lengths = [len(text) for text in texts]
            return EncodedTexts(np.full(sum(lengths), 69999, np.int32), np.array(lengths))

    tokenize_files([corpus[0] / "b.txt"], Wide(), tmp_path / "s")
    assert TokenStore(tmp_path / "s").dtype == np.int32


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_publishes_nothing(corpus, tmp_path, workers):
    directory, _ = corpus
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes((directory / "a.jsonl").read_bytes() + b"{\n")
    with pytest.raises(ReadError, match=r"broken\.jsonl:304: not JSON"):
        tokenize_files([broken], "bytes", tmp_path / "out" / "s", workers=workers)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("small_batches")
def test_an_encoder_that_fails_ends_the_run(corpus, tmp_path):
    class Failing(ByteTokenizer):
        calls = 0

        def encode_batch(self, texts):
            self.calls += 1
            if self.calls == 5:
                raise RuntimeError("no more")
            return EncodedTexts(np.zeros(sum(map(len, texts)), np.uint16), np.array([len(text) for text in texts]))

    with pytest.raises(RuntimeError, match="no more"):
        tokenize_files([corpus[0] / "a.jsonl"], Failing(), tmp_path / "s", workers=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_batches")
def test_memory_is_bounded_by_batches_in_flight(corpus, tmp_path, monkeypatch):
    """The reader never runs further ahead of the writer than the window."""
    submitted, written, ahead = [0], [0], []
    real_submit, real_write = TextStoreWriter._submit, text_store.TokenStoreWriter.write

    def submit(writer):
        submitted[0] += 1
        ahead.append(submitted[0] - written[0])
        real_submit(writer)

    def write(writer, tokens):
        written[0] += 1
        real_write(writer, tokens)

    monkeypatch.setattr(TextStoreWriter, "_submit", submit)
    monkeypatch.setattr(text_store.TokenStoreWriter, "write", write)
    tokenize_files([corpus[0] / "a.jsonl", corpus[0] / "b.txt"], "bytes", tmp_path / "s", workers=2)
    assert written[0] > 100 and max(ahead) == 2 * text_store.BATCHES_PER_WORKER


def test_wrong_use_is_explained(corpus, tmp_path):
    directory, _ = corpus
    with pytest.raises(ValueError, match="--workers 0"):
        tokenize_files([directory / "a.jsonl"], "bytes", tmp_path / "s", workers=0)
    with pytest.raises(ValueError, match="--input"):
        tokenize_files([], "bytes", tmp_path / "s")
    with pytest.raises(ReadError, match="does not exist"):
        tokenize_files([directory / "none.txt"], "bytes", tmp_path / "s")
    description = json.loads((directory / "t.json").read_text(encoding="utf-8"))
    description["added_tokens"] = []
    del description["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "t.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(
        TokenizerError, match=r"--append-eod: no token of .*t\.json is known to end a document\. Say which: --eod TOKEN"
    ):
        tokenize_files([directory / "a.jsonl"], tmp_path / "t.json", tmp_path / "s", append_eod=True)
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_the_environment_is_left_as_it_was(corpus, tmp_path, monkeypatch):
    for before in (None, "true"):
        if before is None:
            monkeypatch.delenv(text_store.LIBRARY_THREADS, raising=False)
        else:
            monkeypatch.setenv(text_store.LIBRARY_THREADS, before)
        tokenize_files([corpus[0] / "b.txt"], "bytes", tmp_path / "s")
        assert os.environ.get(text_store.LIBRARY_THREADS) == before


def test_people_see_a_bar_and_log_files_do_not(corpus, tmp_path, monkeypatch, capsys):
    tokenize_files([corpus[0] / "b.txt"], "bytes", tmp_path / "s")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    tokenize_files([corpus[0] / "b.txt"], "bytes", tmp_path / "s")
    assert "tokenize" in capsys.readouterr().err


def test_files_without_any_text_write_no_store(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"there is no document in .*empty\.txt: no store is written"):
        tokenize_files([tmp_path / "empty.txt"], "bytes", tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_the_verb_says_what_it_has_written(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    words = [
        "data",
        "tokenize",
        "--input",
        str(tmp_path / "a.txt"),
        "--tokenizer",
        "bytes",
        "--output",
        str(tmp_path / "store"),
    ]
    assert main(words) == 0
    assert "1 documents, 9 bytes of text, 9 tokens" in capsys.readouterr().out


@pytest.mark.usefixtures("small_batches")
def test_documents_as_they_come_give_the_store_of_their_files(corpus, tmp_path):
    directory, texts = corpus
    tokenizer = load_tokenizer(directory / "t.json")
    tokenize_files([directory / "a.jsonl", directory / "b.txt"], tokenizer, tmp_path / "files", append_eod=True)
    documents = [(text, FilePlace("part.parquet", row, "row")) for row, text in enumerate(texts)]
    report = tokenize_documents(iter(documents), tokenizer, tmp_path / "given", workers=2, append_eod=True)
    assert files(tmp_path, "given") == files(tmp_path, "files")
    assert (report.documents, report.empty) == (len(texts) - 1, 1)
    store = TokenStore(tmp_path / "given")
    kept = [row for row, text in enumerate(texts) if text]
    assert [read_origin(store, i) for i in range(store.documents)] == [FilePlace("part.parquet", row, "row") for row in kept]


def test_two_stores_are_written_at_once_and_one_without_text_is_none(corpus, tmp_path):
    tokenizer = load_tokenizer("bytes")
    with TextStoreWriter(tmp_path / "a", tokenizer) as first, TextStoreWriter(tmp_path / "b", tokenizer) as second:
        first.add_document("ab", FilePlace("x.txt"))
        second.add_document("", FilePlace("x.txt"))
        first.add_document("c", FilePlace("y.txt"))
    assert TokenStore(tmp_path / "a").document(0).tolist() == [97, 98]
    assert (first.report.documents, second.report.documents, second.report.empty) == (2, 0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.documents", "a.idx", "a.meta.json"]


def test_the_store_knows_the_file_and_line_of_each_document(corpus, tmp_path):
    directory, texts = corpus
    inputs = [directory / "a.jsonl", directory / "b.txt"]
    tokenize_files(inputs, "bytes", tmp_path / "s")
    store = TokenStore(tmp_path / "s")
    lines = [line for line, text in enumerate(texts[:-1], 1) if text]
    expected = [FilePlace(str(inputs[0]), line, "line") for line in lines] + [FilePlace(str(inputs[1]))]
    assert [read_origin(store, i) for i in range(store.documents)] == expected
