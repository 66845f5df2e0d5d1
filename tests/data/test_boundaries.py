"""What ends and begins a document: as files beside a tokenizer say, or by name; nobody guesses."""

import json

import pytest
from tokenizer_models import byte_level, sentencepiece, wordpiece
from tokenizers import AddedToken

from megatrain.data.boundaries import TokenizerError
from megatrain.data.tokenizer import load_tokenizer


def loaded(folder, made, beside=(), **asked):
    """A tokenizer in a folder, with JSON files beside it."""
    made.save(str(folder / "tokenizer.json"))
    for name, content in dict(beside).items():
        (folder / name).write_text(json.dumps(content))
    return load_tokenizer(folder / "tokenizer.json", **asked)


def with_tokens(made, *names, special=True):
    made.add_tokens([AddedToken(name, special=special) for name in names])
    return made


CONFIG, SPECIAL, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")


@pytest.mark.parametrize("name", ["</s>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "<|endoftext|>"])
def test_makers_have_names_of_their_own(tmp_path, name):
    tokenizer = loaded(tmp_path, sentencepiece(eos=name))
    assert (tokenizer.eod, tokenizer.ending.stops, tokenizer.ending.origin) == (2, (2,), "its name")


@pytest.mark.parametrize(
    ("beside", "eod", "stops", "origin"),
    [
        ({CONFIG: {"eos_token": "a"}, GENERATION: {"eos_token_id": 2}}, "a", ("a", "</s>"), CONFIG),
        ({CONFIG: {"eos_token": {"content": "a", "special": True}}}, "a", ("a",), CONFIG),
        ({CONFIG: {"eos_token": None}, SPECIAL: {"eos_token": "a"}}, "a", ("a",), SPECIAL),
        ({GENERATION: {"eos_token_id": 1}}, "<s>", ("<s>",), GENERATION),
        ({GENERATION: {"eos_token_id": [1, 2]}}, "</s>", ("</s>", "<s>"), GENERATION),
        ({GENERATION: {"eos_token_id": [70000, 2]}}, "</s>", ("</s>",), GENERATION),
        ({GENERATION: {}, CONFIG: {}, SPECIAL: []}, "</s>", ("</s>",), "its name"),
    ],
)
def test_files_beside_a_tokenizer_say_what_ends_a_document(tmp_path, beside, eod, stops, origin):
    tokenizer = loaded(tmp_path, sentencepiece(), beside)
    assert tokenizer.name_of(tokenizer.eod) == eod and tokenizer.ending.origin == origin
    assert tuple(map(tokenizer.name_of, tokenizer.ending.stops)) == stops


def test_what_is_asked_for_wins(tmp_path):
    beside = {CONFIG: {"eos_token": "a"}, GENERATION: {"eos_token_id": [1]}}
    for asked in ("</s>", 2, "2"):
        assert loaded(tmp_path, sentencepiece(), beside, eod=asked).ending.stops == (2, 1)
    assert loaded(tmp_path, sentencepiece(), beside, eod="none").ending.stops == ()
    assert load_tokenizer("bytes", eod=10, bos="<|endoftext|>").ending.eod == 10
    assert load_tokenizer("bytes", bos="<|endoftext|>").beginning.first == 256


def test_text_that_looks_like_an_end_is_none(tmp_path):
    """A word of the vocabulary (HTML's </s>) is no special token."""
    made = with_tokens(byte_level(), "</s>", special=False)
    assert loaded(tmp_path, made).name_of(loaded(tmp_path, made).eod) == "<|endoftext|>"
    assert loaded(tmp_path, wordpiece()).eod is None


AMBIGUOUS = {
    "names": (
        with_tokens(sentencepiece(), "<eos>"),
        {},
        r"by its names it may be '</s>' \(2\), '<eos>' \(\d+\)\. Say which: data\.eod",
    ),
    "a list": (
        with_tokens(sentencepiece(eos="<x>"), *LLAMA3[2:]),
        {GENERATION: {"eos_token_id": [0, 1]}},
        r"by generation_config\.json it may be '<unk>' \(0\), '<s>' \(1\)",
    ),
    "two files": (
        sentencepiece(),
        {CONFIG: {"eos_token": "</s>"}, SPECIAL: {"eos_token": "<s>"}},
        r"by tokenizer_config\.json and special_tokens_map\.json it may be '</s>' \(2\), '<s>' \(1\)",
    ),
    "of another tokenizer": (
        sentencepiece(),
        {CONFIG: {"eos_token": "<|im_end|>"}},
        "its eos_token is '<|im_end|>', and it has no such",
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_is_not_clear_is_told_when_it_matters(tmp_path, case):
    made, beside, message = AMBIGUOUS[case]
    tokenizer = loaded(tmp_path, made, beside)
    assert tokenizer.encode("once") and tokenizer.beginning.first is None
    with pytest.raises(TokenizerError, match=message.replace("<|im_end|>", r"<\|im_end\|>")):
        _ = tokenizer.eod
    assert loaded(tmp_path, made, beside, eod=2).eod == 2


def test_a_token_that_is_not_there_is_told_at_once(tmp_path):
    message = r"eod=<end>: .*tokenizer\.json has no such token; its ids are 0\.\.\d+\. Give a name or an id that it has, or eod=none\. "
    with pytest.raises(TokenizerError, match=message + r"It has '</s>' \(2\), '<s>' \(1\)\."):
        loaded(tmp_path, sentencepiece(), eod="<end>")
    with pytest.raises(TokenizerError, match="bos=9999: "):
        loaded(tmp_path, sentencepiece(), bos=9999)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(
        TokenizerError, match=r"tokenizer_config\.json, which says what begins and ends a document, cannot be read"
    ):
        _ = load_tokenizer(tmp_path / "tokenizer.json").eod


@pytest.mark.parametrize(
    ("made", "beside", "bos", "first", "opening"),
    [
        (sentencepiece(), {}, 1, None, ()),
        (sentencepiece(template=True), {}, 1, 1, (1,)),
        (sentencepiece(template=True), {CONFIG: {"bos_token": "<s>", "add_bos_token": False}}, 1, None, ()),
        (sentencepiece(), {CONFIG: {"bos_token": "<s>", "add_bos_token": True}}, 1, 1, (1,)),
        (sentencepiece(), {CONFIG: {"bos_token": None, "add_bos_token": True}, GENERATION: {"bos_token_id": 1}}, 1, 1, (1,)),
        (byte_level(), {CONFIG: {"bos_token": "<|endoftext|>", "add_bos_token": False}}, 0, None, ()),
        (wordpiece(), {}, None, None, ()),
    ],
)
def test_what_begins_a_document(tmp_path, made, beside, bos, first, opening):
    beginning = loaded(tmp_path, made, beside).beginning
    assert (beginning.bos, beginning.first, beginning.opening) == (bos, first, opening)


def test_a_prompt_begins_with_all_that_the_file_puts_first(tmp_path):
    """GLM-4: no beginning of a document, but two tokens before a prompt."""
    from tokenizers import processors

    made = with_tokens(sentencepiece(), "[gMASK]", "<sop>")
    ids = [made.token_to_id(name) for name in ("[gMASK]", "<sop>")]
    made.post_processor = processors.TemplateProcessing(
        "[gMASK] <sop> $A", None, list(zip(("[gMASK]", "<sop>"), ids, strict=True))
    )
    beginning = loaded(tmp_path, made).beginning
    assert (beginning.first, beginning.opening) == (None, tuple(ids))


def test_the_same_tokenizer_in_another_file_has_the_same_identity(tmp_path):
    one = loaded(tmp_path, sentencepiece())
    (tmp_path / "other").mkdir()
    made = sentencepiece(template=True)
    made.enable_truncation(5)
    made.enable_padding(pad_id=0, pad_token="<unk>")
    text = json.loads(made.to_str())
    text["model"]["merges"] = [" ".join(merge) for merge in text["model"]["merges"]]  # as older releases wrote them
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(text, indent=3))
    assert load_tokenizer(tmp_path / "other/tokenizer.json").identity == one.identity
    assert loaded(tmp_path, sentencepiece("metaspace")).identity != one.identity  # another way to cut "\n"
    assert loaded(tmp_path, sentencepiece(eos="<eos>")).identity != one.identity


def test_a_mark_of_byte_order_is_passed_over_and_a_pointer_is_called_that(tmp_path):
    loaded(tmp_path, sentencepiece())
    for name in ("tokenizer.json", CONFIG):
        file = tmp_path / name
        text = file.read_text() if file.exists() else json.dumps({"eos_token": "a"})
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_tokenizer(tmp_path / "tokenizer.json").ending.origin == CONFIG
    (tmp_path / CONFIG).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json.*this is a Git LFS pointer"):
        _ = load_tokenizer(tmp_path / "tokenizer.json").ending
