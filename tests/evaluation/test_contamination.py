import json
import time

import numpy as np
import pytest

from megatrain.data.indexed import TokenStore, TokenStoreError
from megatrain.data.prepare.tokenize import tokenize_files
from megatrain.data.tokenizer import load_tokenizer
from megatrain.evaluation import contamination
from megatrain.evaluation.contamination import ItemOverlap, codec_of_store, overlaps, text_to_look_for, texts_of_store, words_of
from megatrain.evaluation.items import Item
from megatrain.evaluation.questions import Question
from megatrain.evaluation.task_keys import TaskKeys

TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
WORDS = TEXT.split()


def test_words():
    assert words_of("It's 5ｋｍ, NOT_far: 中国。ひら x") == ["it", "s", "5km", "not", "far", "中", "国", "ひ", "ら", "x"]


def test_thirteen_words_in_a_row():
    text = " ".join(WORDS)
    assert overlaps([text], [f"before {text.upper()}! after"]) == [ItemOverlap(14, 2, 2)]
    assert overlaps([text], [f"before {', '.join(WORDS[:13])} after"]) == [ItemOverlap(14, 2, 1)]
    assert overlaps([text], [" ".join(WORDS[:12]), " ".join(WORDS[2:])]) == [ItemOverlap(14, 2, 0)]
    assert overlaps([text], [" ".join([*WORDS[:6], "new", *WORDS[6:]])]) == [ItemOverlap(14, 2, 0)]
    assert overlaps([text], [" ".join(reversed(WORDS))])[0].dirty is False


def test_short_items_and_chinese():
    eight, seven, chinese = " ".join(WORDS[:8]), " ".join(WORDS[:7]), "法国的首都是哪座城市？巴黎。"
    found = overlaps([eight, seven, chinese], [" ".join(WORDS), "我问：法国的首都是，哪座城市？巴黎"])
    assert found == [ItemOverlap(8, 1, 1), ItemOverlap(7, 0, 0), ItemOverlap(12, 1, 1)]
    assert [one.dirty for one in found] == [True, False, True]


def test_as_python_sets_find_it():
    rng = np.random.default_rng(0)
    corpus = [" ".join(f"w{n}" for n in rng.integers(0, 3, 4000)) for _ in range(3)]
    items = [" ".join(f"w{n}" for n in rng.integers(0, 3, size)) for size in range(5, 40)]
    items += [" ".join(corpus[1].split()[n : n + 20]) for n in (0, 777, 3980)]

    def grams(text, length):
        words = text.split()
        return {tuple(words[n : n + length]) for n in range(len(words) - length + 1)}

    for item, found in zip(items, overlaps(items, corpus), strict=True):
        length = min(13, len(item.split()))
        own = grams(item, length) if length >= 8 else set()
        have = set().union(*(grams(text, length) for text in corpus))
        assert found == ItemOverlap(len(item.split()), len(own), len(own & have))


def test_what_is_looked_for():
    question = Question(Item("f", 1, {"q": "Where?"}), "Question: Where?", ("x", "Paris"), (1,), ("Paris",))
    assert text_to_look_for(TaskKeys(), question) == "Question: Where? Paris "
    assert text_to_look_for(TaskKeys(doc_to_decontamination_query="{{q}}"), question) == "Where?"
    blank = Question(Item("f", 1, {}), "The [MASK] barked.", targets=("big \\1 dog",))
    assert text_to_look_for(TaskKeys(output_type="infilling"), blank) == "The big \\1 dog barked."


@pytest.fixture
def store(tmp_path):
    lines = [" ".join(f"n{n % 97}x{n % 89}" for n in range(start, start + 300)) for start in range(0, 3000, 300)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenize_files([tmp_path / "text.jsonl"], "bytes", tmp_path / "store", append_eod=True)
    return TokenStore(tmp_path / "store"), lines


def test_a_store_is_read_in_pieces_and_no_gram_is_cut(store, monkeypatch):
    tokens, lines = store
    monkeypatch.setattr(contamination, "PIECE", 4096)
    told = []
    pieces = list(texts_of_store(tokens, load_tokenizer("bytes"), told.append))
    assert sum(told) == tokens.tokens and max(map(len, pieces)) < 4300 and len(pieces) > 5
    items = [" ".join(line.split()[at : at + 13]) for line in lines for at in range(0, 287, 5)]
    assert all(one.dirty for one in overlaps(items, pieces))
    assert not any(one.dirty for one in overlaps([item + "y" for item in items[:50]], pieces))


def test_a_store_of_another_tokenizer(store, tmp_path):
    tokens, _ = store
    codec = load_tokenizer("bytes")
    assert codec_of_store(tokens, codec) is codec
    record = tmp_path / "store.meta.json"
    found = json.loads(record.read_text())
    record.write_text(json.dumps({**found, "tokenizer": str(tmp_path / "gone.json"), "identity": "other"}))
    with pytest.raises(
        TokenStoreError, match=r"store was made with .*gone\.json, which is not the model's tokenizer \(bytes\)"
    ):
        codec_of_store(tokens, codec)
    record.unlink()
    assert codec_of_store(tokens, codec) is codec


@pytest.mark.alone
def test_speed():
    """Some 1.5 million words a second of a core are cut, hashed and compared; a tenth of that is allowed."""
    text = " ".join(f"word{n % 9973}" for n in range(200_000))
    items = [" ".join(f"word{(n * 31 + k) % 9973}" for k in range(30)) for n in range(200)]
    began = time.process_time()
    found = overlaps(items, [text])
    assert time.process_time() - began < 2.0
    assert sum(one.dirty for one in found) == 200
