"""gigatoken serves where it gives the ids of `tokenizers`, and only there."""

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from real_text import real_texts
from tokenizer_models import byte_level, sentencepiece, wordpiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatrain.cli.main import main
from megatrain.data.prepare.tokenize import tokenize_files
from megatrain.data.tokenizer import ByteTokenizer, JsonTokenizer
from megatrain.data.tokenizers import fast_engine
from megatrain.data.tokenizers.fast_engine import EngineDiffersError, FastTokenizer, encode_with, hard_texts, sample_of

pytest.importorskip("gigatoken", reason="Python 3.10 has no gigatoken")

GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""OpenAI's cl100k_base, also GLM-4's; Qwen's with single digits."""
QWEN = GPT4.replace("{1,3}", "")
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
O200K = _CASED % ("*", "+") + _CASED % ("+", "*") + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ODD = r"\w+|\W+"


def trained(pattern=None, normalizer=None):
    """A byte-level BPE of 1,000 tokens, trained on hard texts; without a pattern, GPT-2's kind."""
    made = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([*hard_texts(), "the cat's 12345 words  and\n\n more"] * 3, trainer)
    return JsonTokenizer(made)


KINDS = {"gpt2": (), "gpt4": (GPT4,), "qwen": (QWEN, normalizers.NFC()), "o200k": (O200K,)}


def random_texts(count, seed):
    draw = random.Random(seed)
    return ["".join(draw.choice(draw.choice(fast_engine._LETTERS)) for _ in range(draw.randint(0, 40))) for _ in range(count)]


def assert_same(own, texts):
    fast, slow = FastTokenizer(own).encode_plainly(texts), own.encode_batch(texts)
    assert fast.ids.tolist() == slow.ids.tolist() and fast.lengths.tolist() == slow.lengths.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_random_texts_have_the_ids_of_the_library(kind):
    own = trained(*KINDS[kind])
    texts = random_texts(1000, 3)
    assert_same(own, texts)
    assert_same(own, ["".join(texts)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_thousand_random_texts_have_the_ids_of_the_library(kind):
    assert_same(trained(*KINDS[kind]), random_texts(100_000, 4))


@pytest.mark.slow
def test_real_text_has_the_ids_of_the_library():
    own = trained()
    fast, size = FastTokenizer(own), 0
    for text in real_texts(200_000_000):
        assert np.array_equal(fast.encode_plainly([text]).ids, own.encode_batch([text]).ids)
        size += len(text)
    assert size > 30_000_000


def test_sentencepiece_with_bytes_for_unknown_characters():
    own = JsonTokenizer(sentencepiece())
    assert_same(own, [*random_texts(300, 5), "once upon a time"])


def test_special_tokens_in_text_stay_text():
    own = JsonTokenizer(byte_level())
    text = "once<|endoftext|><|endoftext|> upon"
    ids = FastTokenizer(own).encode_batch([text, text])
    assert ids.ids.tolist() == own.encode(text) * 2 and own.eod not in ids.ids
    assert own.decode(ids.ids[: ids.lengths[0]].tolist()) == text


def test_other_added_tokens_are_found_as_before():
    library = byte_level()
    library.add_tokens(["<tool>", "two words"])
    own = JsonTokenizer(library)
    assert FastTokenizer(own).encode_batch(["a <tool>two words b"]).ids.tolist() == own.encode("a <tool>two words b")


def unigram():
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A .jsonl, a .txt and a tokenizer; batches are small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatrain.data.prepare.text_store.BATCH_CHARACTERS", 500)
    monkeypatch.setattr("megatrain.data.prepare.read.PIECE_CHARACTERS", 200)
    rows = [*random_texts(200, 1), "", "<|endoftext|>", "word " * 500]
    lines = [json.dumps({"text": row}) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("many words of a text\n" * 200)
    trained()._library.save("t.json")
    return ["a.jsonl", "b.txt"]


def files(prefix):
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx", "documents")]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_store_is_the_same_for_both_engines(corpus, workers):
    slow = tokenize_files(corpus, "t.json", "slow", append_eod=True, engine="tokenizers")
    fast = tokenize_files(corpus, "t.json", "fast", workers, append_eod=True, engine="gigatoken")
    assert files("slow") == files("fast")
    assert (slow.engine, fast.engine) == ("", "by gigatoken")
    assert str(fast).endswith("; encoded by gigatoken")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: trained(ODD)._library, "gigatoken cannot load t.json: Unknown pre_tokenizer Split"),
        (unigram, "gigatoken cannot load t.json"),
        (wordpiece, "gigatoken cannot load t.json"),
    ],
)
def test_what_gigatoken_does_not_know_is_encoded_by_the_library(corpus, make, said):
    make().save("t.json")
    slow = tokenize_files(corpus, "t.json", "slow", engine="tokenizers")
    report = tokenize_files(corpus, "t.json", "auto")
    assert report.engine.startswith(f"by tokenizers, since {said}") and "\n" not in report.engine
    assert (files("slow"), slow.tokens) == (files("auto"), report.tokens)
    with pytest.raises(EngineDiffersError, match=r"Use --engine tokenizers\."):
        tokenize_files(corpus, "t.json", "none", engine="gigatoken")


class Faulty:
    """A backend whose ids are one too large in texts with a certain word."""

    def __init__(self, backend, word):
        self._backend, self._word = backend, word

    def encode(self, text):
        return self._backend.encode(text) + (self._word in text)

    def encode_batch(self, texts, parallel):
        return self._backend.encode_batch([text.replace(self._word, "") for text in texts], parallel=parallel)


def test_a_difference_on_the_way_begins_again_with_the_library(corpus, monkeypatch, capsys):
    tokenize_files(corpus, "t.json", "slow", engine="tokenizers")
    real = FastTokenizer._loaded
    monkeypatch.setattr(FastTokenizer, "_loaded", lambda self: Faulty(real(self), "many"))
    report = tokenize_files(corpus, "t.json", "auto", workers=2)
    assert files("slow") == files("auto")
    said = r"by tokenizers, since gigatoken gives \[.*\] for '.*', and tokenizers \[.*\], in b\.txt"
    assert re.fullmatch(said, report.engine)
    assert capsys.readouterr().err == f"tokenize: again from the beginning, {report.engine}\n"
    with pytest.raises(EngineDiffersError, match=r"in b\.txt\. Use --engine tokenizers\."):
        tokenize_files(corpus, "t.json", "none", engine="gigatoken")


def test_a_difference_says_where_it_begins():
    own = JsonTokenizer(byte_level())
    ids = own.encode("once upon a time")
    said = fast_engine.difference(own, "once upon a time", [*ids[:2], 7, 8])
    assert said == f"[7, 8] for '{own.decode(ids[2:])}', and tokenizers {ids[2:6]}"


def test_a_backend_that_panics_is_left(corpus, monkeypatch):
    class Panic(BaseException):
        pass

    class Broken:
        def encode(self, text):
            raise Panic("index out of bounds\nat line 7")

    monkeypatch.setattr(FastTokenizer, "_loaded", lambda self: Broken())
    assert tokenize_files(corpus, "t.json", "s").engine == (
        "by tokenizers, since gigatoken cannot encode a text: index out of bounds"
    )


def test_without_gigatoken_the_library_serves(corpus, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    words = ["data", "tokenize", "--input", *corpus, "--tokenizer", "t.json", "--output", "s"]
    assert main(words) == 0
    out = capsys.readouterr()
    assert "encoded by tokenizers, since gigatoken is not installed (pip install 'megatrain[data]')" in out.out and not out.err
    assert main([*words, "--engine", "gigatoken"]) == 1
    assert "gigatoken is not installed (pip install 'megatrain[data]'). Use --engine tokenizers." in capsys.readouterr().err


def test_bytes_need_no_engine():
    tokenizer = ByteTokenizer()
    assert encode_with(tokenizer, "auto", lambda given: given) == (tokenizer, "")
    with pytest.raises(EngineDiffersError, match=r"--engine gigatoken: bytes is no tokenizer\.json, leave the option out"):
        encode_with(tokenizer, "gigatoken", lambda given: given)
    with pytest.raises(ValueError, match="--engine fast: use one of auto, gigatoken, tokenizers"):
        encode_with(tokenizer, "fast", lambda given: given)


def test_the_words_that_gigatoken_keeps_are_left_behind(corpus, monkeypatch):
    loads = []
    real = FastTokenizer._loaded
    monkeypatch.setattr(FastTokenizer, "_loaded", lambda self: loads.append(1) or real(self))
    monkeypatch.setattr(fast_engine, "CHECK_CHARACTERS", 600)
    monkeypatch.setattr(fast_engine, "CACHE_BYTES", -(1 << 40))
    tokenize_files(corpus, "t.json", "small", workers=2, engine="gigatoken")
    assert len(loads) > 5
    tokenize_files(corpus, "t.json", "slow", engine="tokenizers")
    assert files("slow") == files("small")


def test_the_sample_is_a_part_of_each_file_and_of_each_batch():
    texts = ["a" * 50, "b" * 40_000, "c" * 10, "d" * 100_000]
    sample = sample_of(texts, files=[0, 2])
    assert {part: number for part, number in sample.items() if len(part) <= 32} == {"a" * 32: 0, "c" * 10: 2}
    words = " ".join(f"word{n}" for n in range(600_000))
    parts = sample_of([words])
    assert 1 / 2200 < sum(map(len, parts)) / len(words) < 1 / 1800
    assert len({words.index(part) * 10 // len(words) for part in parts}) == 10  # from everywhere
    assert sample_of([words]) == parts


def test_a_part_of_every_file_is_compared(corpus, monkeypatch):
    names = [f"file{number:02}.txt" for number in range(40)]
    for name in names:
        Path(name).write_text(f"this is {name}")
    compared = []
    real = FastTokenizer._compare
    monkeypatch.setattr(FastTokenizer, "_compare", lambda self, texts: compared.extend(texts) or real(self, texts))
    tokenize_files(names, "t.json", "s", engine="gigatoken")
    assert [name for name in names if f"this is {name}" not in compared] == []
