"""Trained tokenizers: any text survives, the same text gives the same file, and the file says what it was trained on."""

import gzip
import json
import random

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.cli.main import main
from megatrain.data.boundaries import TokenizerError
from megatrain.data.origins import FilePlace
from megatrain.data.prepare.read import TextPiece
from megatrain.data.prepare.tokenize import tokenize_files
from megatrain.data.tokenizer import load_tokenizer
from megatrain.data.tokenizers.fitting import in_words, sampled_pieces, train_tokenizer, trained_on

_DRAW = random.Random(2)
_WORDS = ["".join(_DRAW.choices("abdegiklmnorstu", k=_DRAW.randint(2, 8))) for _ in range(200)]
TEXTS = [
    " ".join(_WORDS[int(200 * _DRAW.random() ** 3)] for _ in range(800)),
    "".join(_DRAW.choices("今天气很好我们去公园散步学习中文，。", k=1500)),
    "def main():\n    return 0\n" * 20,
    "x",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, and a tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("training")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for kind in ("bpe", "unigram"):
        assert train_tokenizer([folder / "a.jsonl"], 340, folder / f"{kind}.json", kind=kind) == 340
    return folder


@settings(max_examples=50)
@given(
    st.text(max_size=60)
    | st.sampled_from(["<|endoftext|>", "我们<|endoftext|>", "\x00\r\n\t \u2028", "  x  \n\n y", "繁體字🙂"])
)
def test_any_text_survives_the_round_trip(folder, text):
    for kind in ("bpe", "unigram"):
        tokenizer = load_tokenizer(folder / f"{kind}.json")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eod not in ids


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_what_it_has_learned_pays(folder, kind):
    tokenizer = load_tokenizer(folder / f"{kind}.json")
    assert tokenizer.divisible and tokenizer.name_of(tokenizer.eod) == "<|endoftext|>"
    for text in TEXTS[:2]:
        assert len(tokenizer.encode(text)) < len(text.encode()) / 1.5


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_same_text_gives_the_same_file(folder, tmp_path, kind):
    for name in ("a.jsonl", "a.jsonl.gz"):
        train_tokenizer([folder / name], 340, tmp_path / "again.json", kind=kind)
        assert (tmp_path / "again.json").read_bytes() == (folder / f"{kind}.json").read_bytes()


def test_bytes_that_a_unigram_has_not_met_have_the_lowest_score(folder):
    vocab = json.loads((folder / "unigram.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert vocab[0] == ["<|endoftext|>", 0.0]
    assert vocab[1:] == sorted(vocab[1:], key=lambda row: (-row[1], row[0]))
    assert [round(score, 5) for _, score in vocab] == [score for _, score in vocab]
    lowest = [piece for piece, score in vocab if score == vocab[-1][1]]
    assert len(lowest) > 150 and lowest == sorted(lowest)


def test_the_tokenizer_says_what_it_was_trained_on(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    digest = xxhash.xxh3_128_hexdigest(b"".join(text.encode() + b"\xff" for text in TEXTS))
    size = sum(len(text.encode()) for text in TEXTS)
    said = f"unigram, trained on 4 documents, {size:,} bytes (hash {digest})"
    assert main(["data", "inspect", "unigram.json"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "tokenizer unigram.json",
        "  vocabulary 340",
        f"  identity   {load_tokenizer('unigram.json').identity}",
        "  a document ends in '<|endoftext|>' (0), by its name",
        f"  {said}",
    ]
    tokenize_files(["a.jsonl"], "unigram.json", "s")
    assert main(["data", "inspect", "s"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"  tokenizer: {said}"


def test_a_file_of_another_tokenizer_is_not_believed(folder, tmp_path):
    (tmp_path / "t.json").write_bytes((folder / "bpe.json").read_bytes())
    identity = load_tokenizer(tmp_path / "t.json").identity
    assert trained_on(tmp_path / "t.json", identity) is None
    (tmp_path / "t.json.trained.json").write_bytes((folder / "unigram.json.trained.json").read_bytes())
    assert trained_on(tmp_path / "t.json", identity) is None
    (tmp_path / "t.json.trained.json").write_bytes((folder / "bpe.json.trained.json").read_bytes())
    assert trained_on(tmp_path / "t.json", identity).documents == 4
    for damaged in (
        "",
        "[]",
        "{}",
        (folder / "bpe.json.trained.json").read_text().replace('"documents": 4', '"documents": "4"'),
    ):
        (tmp_path / "t.json.trained.json").write_text(damaged)
        with pytest.raises(
            TokenizerError, match=r"t\.json\.trained\.json, which says what the tokenizer was trained on, cannot be"
        ):
            trained_on(tmp_path / "t.json", identity)


def test_a_sample_is_of_the_size_asked_for_and_always_the_same():
    pieces = [TextPiece(f"text number {number:03}", True, FilePlace("a")) for number in range(400)]
    sample = list(sampled_pieces(iter(pieces), 15 * 100 + 14))
    assert len(sample) == 100 and sample == sorted(sample, key=lambda piece: piece.text)
    assert sample == list(sampled_pieces(iter(pieces), 15 * 100 + 14))
    numbers = [int(piece.text[-3:]) for piece in sample]
    assert numbers[:4] == [0, 1, 5, 7] and 150 < sum(numbers) / 100 < 250
    assert set(sampled_pieces(pieces, 15 * 50)) < set(sample)
    assert list(sampled_pieces(pieces, 14)) == []


def test_a_sample_is_what_is_trained_on(folder, tmp_path):
    train_tokenizer([folder / "a.jsonl"], 300, tmp_path / "t.json", sample=1000)
    found = trained_on(tmp_path / "t.json", load_tokenizer(tmp_path / "t.json").identity)
    assert (found.sample, found.documents) == (1000, 3) or found.text_bytes <= 1000
    assert str(found).endswith(", a sample)")
    with pytest.raises(TokenizerError, match=r"a\.jsonl: no text to train a tokenizer on within --sample 0; give more\."):
        train_tokenizer([folder / "a.jsonl"], 300, tmp_path / "t.json", sample=0)
    with pytest.raises(TokenizerError, match="--kind words: use one of bpe, unigram"):
        train_tokenizer([folder / "a.jsonl"], 300, tmp_path / "t.json", kind="words")


def test_a_word_without_end_is_trained_on_in_parts(tmp_path):
    assert in_words("") == [""] and in_words("of words " * 500) == ["of words " * 500]
    assert [len(part) for part in in_words("a " + "b7" * 1500 + "\u0301" * 1025 + "c")] == [2 + 1024, 1024, 952 + 1024, 2]
    (tmp_path / "a.txt").write_text("a" * 100_000 + "\u4e00" * 100_000 + "!" * 100_000)  # whole: a minute
    assert train_tokenizer([tmp_path / "a.txt"], 272, tmp_path / "bpe.json") == 272
    assert len(load_tokenizer(tmp_path / "bpe.json").encode("a" * 1024)) == 64
