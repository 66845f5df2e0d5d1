"""tiktoken's rank files have the ids that tiktoken gives, and say what is wrong with them."""

import base64
import json
import random
import re

import pytest
import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from megatrain.data.boundaries import TokenizerError
from megatrain.data.tokenizer import JsonTokenizer, load_tokenizer
from megatrain.data.tokenizers.fast_engine import _LETTERS, FastTokenizer, hard_texts
from megatrain.data.tokenizers.rank_file import PATTERNS, byte_letters

PLAIN = {  # as tiktoken has them (tiktoken_ext/openai_public.py)
    "r50k_base": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k_base": "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
}


def trained_ranks(pattern):
    """Bytes -> rank of a BPE trained on hard texts, as tiktoken has them: bytes first, then merges."""
    library = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [*([pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []), words]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([*hard_texts(), "aaaa aaa bbbbbb   the cat's 12345 words", "好的好的好"] * 4, trainer)
    value = {letter: value for value, letter in enumerate(byte_letters())}
    vocab = sorted(library.get_vocab().items(), key=lambda item: item[1])
    return {bytes(value[letter] for letter in token): rank for token, rank in vocab}


def write(path, ranks):
    path.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()))
    return path


@pytest.fixture(scope="module", params=PLAIN)
def pair(request, tmp_path_factory):
    """A rank file as we read it, and tiktoken's own encoding of it."""
    name = request.param
    ranks = trained_ranks(PATTERNS[name])
    file = write(tmp_path_factory.mktemp("ranks") / f"{name}.tiktoken", ranks)
    return load_tokenizer(file), tiktoken.Encoding(name, pat_str=PLAIN[name], mergeable_ranks=ranks, special_tokens={})


def texts(count, seed):
    draw = random.Random(seed)
    return ["".join(draw.choice(draw.choice(_LETTERS)) for _ in range(draw.randint(0, 40))) for _ in range(count)]


def assert_same(pair, given):
    own, oracle = pair
    assert own.encode_batch(given).ids.tolist() == [i for text in given for i in oracle.encode_ordinary(text)]
    for text in given[:100]:
        assert own.decode(own.encode(text)) == text


def test_ids_are_those_of_tiktoken(pair):
    assert_same(pair, [*hard_texts(), *texts(500, 8), "a" * 50, "ab" * 30, "b " * 30])


def test_repeated_letters_merge_as_in_tiktoken(pair):
    draw = random.Random(3)
    assert_same(pair, ["".join(draw.choices("ab ", weights=(5, 3, 1), k=draw.randint(1, 60))) for _ in range(500)])


@pytest.mark.slow
def test_a_hundred_thousand_texts_have_the_ids_of_tiktoken(pair):
    assert_same(pair, texts(100_000, 9))


def test_gigatoken_encodes_it(pair):
    own, _ = pair
    assert FastTokenizer(own).encode_batch(["the cat's <|endoftext|>"]).ids.tolist() == own.encode("the cat's <|endoftext|>")


@pytest.fixture
def ranks():
    return {bytes((value,)): value for value in range(256)} | {b"th": 256, b"the": 257}


def test_special_tokens_have_their_ids_and_stay_out_of_text(tmp_path, ranks):
    tokenizer = load_tokenizer(write(tmp_path / "cl100k_base.tiktoken", ranks))
    assert isinstance(tokenizer, JsonTokenizer)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.special_id("<|fim_prefix|>")) == (100277, 100257, 100258)
    text = "the<|endoftext|> <|endofprompt|>"
    assert max(tokenizer.encode(text)) < 258 and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([257, 100257]) == "the<|endoftext|>"
    (tmp_path / "copy.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert load_tokenizer(tmp_path / "copy.json").identity == tokenizer.identity
    assert load_tokenizer(write(tmp_path / "gpt2.tiktoken", ranks)).divisible


def test_a_file_beside_it_says_what_words_are(tmp_path, ranks):
    path = write(tmp_path / "tokenizer.model", ranks)
    said = r"tokenizer\.model is a rank file of tiktoken, which does not say what words are, and its name is none of gpt2, .*Write "
    with pytest.raises(TokenizerError, match=said + r"tokenizer\.model\.json beside it: \{"):
        load_tokenizer(path)
    beside = tmp_path / "tokenizer.model.json"
    beside.write_text('{"pattern": "gpt2", "special_tokens": {"<|end_of_text|>": 300}}')
    assert (load_tokenizer(path).eod, load_tokenizer(path).encode("the thethe")) == (300, [257, 32, 257, 257])
    beside.write_text(json.dumps({"pattern": "[a-z]|[^a-z]"}))
    assert load_tokenizer(path).encode("the") == [116, 104, 101]
    for content, said in (
        ("[]", "says what words are, cannot be read"),
        ('{"pattern": 5}', "says what words are, cannot be read"),
        ('{"pattern": "gpt2", "special_tokens": {"\\ud800": 300}}', "cannot be read ('utf-8' codec can't encode"),
        ('{"pattern": "gpt2", "special_tokens": {"": 300}}', "cannot be read (pattern is a text, and special_tokens an object"),
        ('{"pattern": "gpt2", "special_tokens": {"<s>": "1"}}', "special_tokens an object of ids"),
        ('{"pattern": "("}', "its pattern is no regular expression"),
        ('{"pattern": "gpt2", "special_tokens": {"<s>": 256}}', "the special token <s> (256) is one of the ranks already"),
        ('{"pattern": "<s>|[^<]", "special_tokens": {"<s>": 300}}', "by its pattern <s> is one word, so that text could forge"),
    ):
        beside.write_text(content)
        with pytest.raises(TokenizerError, match=re.escape(said)):
            load_tokenizer(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data + b"nonsense\n", ":259: not a line of a rank file"),
        (lambda data: data + b"dGhlcmU 258\n", ":259: dGhlcmU is not base64"),
        (lambda data: data + b"dGhl 258\n", ":259: a token that was there before"),
        (lambda data: data + b"dGhlcmU= 257\n", "two tokens have the same rank"),
        (lambda data: data[data.index(b"\n") + 1 :], "the byte 0x00 is no token, and 1 are not"),
        (
            lambda data: data + base64.b64encode(b"x" * 2049) + b" 258\n",
            ":259: a token of 2,049 bytes; at most 2,097,152 tokens of 2,048",
        ),
        (
            lambda data: data + b"".join(base64.b64encode(bytes((n,)) * 2048) + f" {300 + n}\n".encode() for n in range(65)),
            "its tokens are too long to merge (272,630,029 bytes to look at, 268,435,456 at the most)",
        ),
        (lambda data: data + b"dGhlcmU= 999999999\n", "has 260 tokens, and the id 999,999,999: no model has so many rows"),
    ],
)
def test_a_damaged_rank_file_is_one_clear_error(tmp_path, ranks, change, said):
    path = write(tmp_path / "gpt2.tiktoken", ranks)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(TokenizerError, match=re.escape(said)) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
