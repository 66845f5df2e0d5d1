"""Tokenizers: lossless, literal about special tokens, clear about what is wrong."""

import json
import os
import re
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from megatrain.data.prepare.read import ReadError, read_pieces
from megatrain.data.tokenizer import ByteTokenizer, JsonTokenizer, TokenizerError, load_tokenizer, prompt_ids
from megatrain.data.tokenizers.fitting import train_tokenizer

TEXT = "def main():\n    return 'the quick brown fox jumps over the lazy dog'  # 42 naïve 日本語 🙂\n" * 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "a.txt").write_text(TEXT, encoding="utf-8")
    size = train_tokenizer([directory / "a.txt"], 300, directory / "tokenizer.json")
    return directory, size


@given(st.text(max_size=80) | st.sampled_from(["<|endoftext|>", "a<|endoftext|>b", "\x00\r\n\t \u2028", "  x  \n\n y", ""]))
def test_any_text_survives_the_round_trip(trained, text):
    for tokenizer in (load_tokenizer("bytes"), load_tokenizer(trained[0] / "tokenizer.json")):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eod not in ids
        together, other = tokenizer.encode_batch([text, "x"]), tokenizer.encode("x")
        assert (together.ids.tolist(), together.lengths.tolist()) == ([*ids, *other], [len(ids), len(other)])


def test_other_threads_go_on_while_a_long_text_is_encoded(trained):
    """A server answers others meanwhile."""
    tokenizer, found, ticks = load_tokenizer(trained[0] / "tokenizer.json"), [], 0
    thread = threading.Thread(target=lambda: found.append(tokenizer.encode(TEXT * 300)))
    thread.start()
    while thread.is_alive():
        time.sleep(0.002)
        ticks += 1
    assert ticks > 10 and found == [tokenizer.encode(TEXT) * 300]


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.decode([97, 195, 256, 98]) == "a�<|endoftext|>b"


def test_a_trained_tokenizer_has_the_size_asked_for_and_a_separator(trained):
    directory, size = trained
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    assert size == tokenizer.vocab_size == 300
    assert tokenizer.decode([tokenizer.eod]) == "<|endoftext|>"
    assert tokenizer.divisible
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 1.5
    assert sorted(path.name for path in directory.iterdir()) == ["a.txt", "tokenizer.json", "tokenizer.json.trained.json"]


def test_the_same_input_gives_the_same_tokenizer(trained):
    directory, _ = trained
    train_tokenizer([directory / "a.txt"], 300, directory / "again.json")
    assert (directory / "again.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_little_text_gives_a_smaller_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_text("ab ab")
    assert 257 < train_tokenizer([tmp_path / "a.txt"], 5000, tmp_path / "t.json") < 270


@pytest.mark.parametrize("size", [0, 256])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path, size):
    with pytest.raises(TokenizerError, match=f"vocab_size={size} is too small.*257"):
        train_tokenizer([], size, tmp_path / "t.json")


def test_no_text_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for inputs in ([], [tmp_path / "empty.jsonl"]):
        with pytest.raises(TokenizerError, match="no text"):
            train_tokenizer(inputs, 300, tmp_path / "t.json")
    with pytest.raises(ReadError, match=r"none\.txt cannot be read"):
        train_tokenizer([tmp_path / "none.txt"], 300, tmp_path / "t.json")
    assert [p.name for p in tmp_path.iterdir()] == ["empty.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .*No such file.*data tokenizer"),
        (b"{", "line 1 is not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a": 1}', "not a tokenizer of the"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, content, message):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(path)


def test_truncation_and_padding_of_the_file_are_ignored(trained, tmp_path):
    description = json.loads((trained[0] / "tokenizer.json").read_text(encoding="utf-8"))
    description["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "t.json").write_text(json.dumps(description), encoding="utf-8")
    assert load_tokenizer(tmp_path / "t.json").encode(TEXT) == load_tokenizer(trained[0] / "tokenizer.json").encode(TEXT)


def test_the_vocabulary_reaches_to_the_largest_id():
    tokenizer = JsonTokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 70000}, unk_token="a")))
    assert (tokenizer.vocab_size, tokenizer.eod) == (70001, None)
    assert tokenizer.encode_batch(["b"]).ids.tolist() == [70000]


def variant(change):
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    change(library)
    return JsonTokenizer(library).divisible


def test_only_words_that_end_before_white_space_are_divisible():
    assert variant(lambda t: None) and variant(lambda t: t.add_special_tokens(["<|endoftext|>"]))
    assert not variant(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)))
    assert not variant(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)))
    assert not variant(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()))
    assert not variant(lambda t: setattr(t, "normalizer", normalizers.NFC()))
    assert not variant(lambda t: t.add_tokens(["two words"]))
    assert ByteTokenizer().divisible


mixed = st.text(st.sampled_from("ab1'.é日 \n\t\r\u00a0\u2028\u0085\x1c  "), max_size=300)


@settings(max_examples=200)
@given(mixed)
def test_a_divided_text_has_the_tokens_of_the_whole(trained, tmp_path_factory, text):
    path = tmp_path_factory.mktemp("p") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatrain.data.prepare.read.PIECE_CHARACTERS", 3)
        patch.setattr("megatrain.data.prepare.read.CHUNK_BYTES", 16)
        pieces = list(read_pieces([path]))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    tokenizer = load_tokenizer(trained[0] / "tokenizer.json")
    assert [i for piece in pieces for i in tokenizer.encode(piece.text)] == tokenizer.encode(text)


PLAIN = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}
HOSTILE = {
    "deep": ("[" * 100_000, "it is nested too deep"),
    "brackets": ("[" + "[]," * 2_100_000 + "[]]", "it has 2,100,002 brackets, and 2,097,152 at the most are read"),
    "digits": (json.dumps(PLAIN).replace('"ab": 2', '"ab": ' + "9" * 10_000), "it has a number of 10,000 digits"),
    "gap": (json.dumps(PLAIN).replace('"ab": 2', '"ab": 4294967295'), "has 3 tokens, and the id 4,294,967,295: no model has"),
    "types": (json.dumps(PLAIN | {"model": {"type": "BPE", "vocab": [1], "merges": 5}}), "is JSON, but not a tokenizer of"),
    "no unknown": (json.dumps(PLAIN | {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "u",
        "continuing_subword_prefix": "#", "max_input_chars_per_word": 9}}), "Missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tokenizer_is_one_clear_error(tmp_path, case):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(PLAIN))
    assert load_tokenizer(path).vocab_size == 3
    text, said = HOSTILE[case]
    path.write_text(text)
    with pytest.raises(TokenizerError, match=re.escape(said)) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_tokenizer_is_a_plain_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer\.json: it is no plain file\."):
        load_tokenizer(path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(TokenizerError, match=r"it has 1,073,741,824 bytes, and 134,217,728 at the most are read\."):
        load_tokenizer(path)


def test_a_prompt_begins_as_a_text_does():
    library = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "[gMASK]": 3}, unk_token="a"))
    library.add_special_tokens(["<s>", "</s>"])
    plain, opened = JsonTokenizer(library), JsonTokenizer(library, bos="<s>")
    assert [prompt_ids(plain, ids) for ids in ([2], [], [0, 2])] == [[2], [1], [0, 2]]
    assert [prompt_ids(opened, ids) for ids in ([2], [], [0, 2], [0])] == [[0, 2], [0], [0, 2], [0]]
    assert prompt_ids(JsonTokenizer(library, eod="none"), []) == [0]
    assert prompt_ids(JsonTokenizer(library, eod="none", bos="none"), []) == []
