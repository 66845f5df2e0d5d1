"""Where a context ends and its continuation begins, in token ids, for tokenizers of every kind."""

import pytest
from tokenizer_models import bilingual, sentencepiece, wordpiece

from megatrain.data.boundaries import Beginning
from megatrain.data.tokenizer import ByteTokenizer, JsonTokenizer
from megatrain.evaluation.joins import joined, start_of_text

CODECS = {
    "bytes": ByteTokenizer(),
    "bytes_bos": ByteTokenizer(bos="<|endoftext|>"),
    "bpe": JsonTokenizer(bilingual()),
    "bpe_bos": JsonTokenizer(bilingual(True)),
    "llama": JsonTokenizer(sentencepiece()),
    "llama_bos": JsonTokenizer(sentencepiece(template=True)),
    "mistral": JsonTokenizer(sentencepiece("metaspace")),
    "bert": JsonTokenizer(wordpiece(), bos="[CLS]"),
}

# Tokens by name, of bytes by id; the last column: whether a token of the whole text spans the join.
CASES = [
    # bytes
    ("bytes", "ab", "c", "97 98", "99", False),
    ("bytes", "a ", "b", "97", "32 98", False),
    ("bytes", "a", "é", "97", "195 169", False),
    ("bytes", "中", "国", "228 184 173", "229 155 189", False),
    ("bytes", "", "a", "256", "97", False),
    ("bytes", "  ", "a", "256", "32 32 97", False),
    ("bytes", "a\n", "b", "97", "10 98", False),
    ("bytes", "a\u3000", "b", "97", "227 128 128 98", False),
    # bytes_bos
    ("bytes_bos", "ab", "c", "256 97 98", "99", False),
    ("bytes_bos", "", "a", "256", "97", False),
    ("bytes_bos", "<|endoftext|>a", "b", "256 60 124 101 110 100 111 102 116 101 120 116 124 62 97", "98", False),
    # bpe
    ("bpe", "Ans", "wer", "Ans", "wer", True),
    ("bpe", "Ans", " Paris", "Ans", "ĠParis", False),
    ("bpe", "Ans ", "Paris", "Ans", "ĠParis", False),
    ("bpe", "Ans", "wer Paris", "Ans", "wer|ĠParis", True),
    ("bpe", "Answer", " Paris", "Answer", "ĠParis", False),
    ("bpe", "中", "国", "ä¸Ń", "åĽ½", True),
    ("bpe", "中国", "川", "ä¸ŃåĽ½", "å|·|Ŀ", True),
    ("bpe", "国", "川", "åĽ½", "å|·|Ŀ", True),
    ("bpe", "国", "国", "åĽ½", "åĽ½", True),
    ("bpe", "巴黎是", "中国", "å|·|´|é|»|İ|æ|ĺ|¯", "ä¸ŃåĽ½", False),
    ("bpe", "中 ", "国", "ä¸Ń", "Ġ|åĽ½", False),
    ("bpe", "", "Answer", "<|endoftext|>", "Answer", False),
    ("bpe", " ", "Paris", "<|endoftext|>", "ĠParis", False),
    ("bpe", "", "<|endoftext|>", "<|endoftext|>", "<|||e|n|d|o|f|t|e|x|t|||>", False),
    ("bpe", "a\n\n", "b", "a", "Ċ|Ċ|b", False),
    ("bpe", "a\n", "\nb", "a", "Ċ|Ċ|b", False),
    ("bpe", "a.", "\nb", "a|.", "Ċ|b", False),
    ("bpe", "a  ", "Paris", "a", "Ġ|ĠParis", False),
    ("bpe", "a", " ", "a", "Ġ", False),
    ("bpe", "Ans  ", "wer", "Ans", "Ġ|Ġ|wer", False),
    ("bpe", "😀", "😀", "ð|Ł|ĺ|Ģ", "ð|Ł|ĺ|Ģ", False),
    ("bpe", "中", "中国", "ä¸Ń", "ä¸ŃåĽ½", False),
    ("bpe", "a\t", "b", "a", "ĉ|b", False),
    # bpe_bos
    ("bpe_bos", "Ans", "wer", "<s>|Ans", "wer", True),
    ("bpe_bos", "Ans", " Paris", "<s>|Ans", "ĠParis", False),
    ("bpe_bos", "", "Paris", "<s>", "P|ar|is", False),
    ("bpe_bos", "<s>Ans", "wer", "<s>|<|s|>|Ans", "wer", True),
    ("bpe_bos", "中", "国", "<s>|ä¸Ń", "åĽ½", True),
    ("bpe_bos", "\n", "a", "<s>", "Ċ|a", False),
    ("bpe_bos", "\n\n", "Paris", "<s>", "Ċ|Ċ|P|ar|is", False),
    # llama
    ("llama", "once upon", " a time", "▁once|▁upon", "▁a|▁time", False),
    ("llama", "once upon ", "a time", "▁once|▁upon", "▁a|▁time", False),
    ("llama", "on", "ce", "▁on", "c|e", True),
    ("llama", "on", "ce a cat", "▁on", "c|e|▁a|▁cat", True),
    ("llama", "the cat", "s", "▁the|▁cat", "<0x73>", False),
    ("llama", "", "the cat", "</s>", "▁the|▁cat", False),
    ("llama", " ", "the cat", "</s>", "▁|▁the|▁cat", False),
    ("llama", "the", "中国", "▁the", "<0xE4>|<0xB8>|<0xAD>|<0xE5>|<0x9B>|<0xBD>", False),
    ("llama", "中", "国", "▁|<0xE4>|<0xB8>|<0xAD>", "<0xE5>|<0x9B>|<0xBD>", False),
    ("llama", "the\n", "cat", "▁the", "<0x0A>|c|a|t", False),
    ("llama", "a", "cat", "▁a", "c|a|t", False),
    # llama_bos
    ("llama_bos", "once", " upon", "<s>|▁once", "▁upon", False),
    ("llama_bos", "once ", "upon", "<s>|▁once", "▁upon", False),
    ("llama_bos", "on", "ce", "<s>|▁on", "c|e", True),
    ("llama_bos", "", "the cat", "<s>", "▁the|▁cat", False),
    ("llama_bos", "<s>the", " cat", "<s>|▁|<0x3C>|<0x73>|<0x3E>|t|h|e", "▁cat", False),
    # mistral
    ("mistral", "once upon", " a time", "▁once|▁upon", "▁a|▁time", False),
    ("mistral", "on", "ce", "▁on", "c|e", True),
    ("mistral", "", "the cat", "</s>", "▁the|▁cat", False),
    ("mistral", "the ", "cat", "▁the", "▁cat", False),
    # bert
    ("bert", "once upon", " a time", "[CLS]|once|upon", "a|time", False),
    ("bert", "once ", "upon", "[CLS]|once", "upon", False),
    ("bert", "the cat", "s", "[CLS]|the|cat", "##s", False),
    ("bert", "the c", "at", "[CLS]|the|[UNK]", "[UNK]", True),
    ("bert", "the c", "up", "[CLS]|the|[UNK]", "[UNK]", True),
    ("bert", "", "The CAT", "[CLS]", "the|cat", False),
    ("bert", "the", "中国", "[CLS]|the", "[UNK]|[UNK]", False),
    ("bert", "中", "国", "[CLS]|[UNK]", "[UNK]", False),
    ("bert", "the\n", "cat.", "[CLS]|the", "cat|.", False),
    ("bert", "cat", ".", "[CLS]|cat", ".", False),
]


def shown(codec, ids):
    return " ".join(map(str, ids)) if isinstance(codec, ByteTokenizer) else "|".join(map(codec.name_of, ids))


@pytest.mark.parametrize(("kind", "context", "continuation", "before", "after", "spanned"), CASES)
def test_a_join(kind, context, continuation, before, after, spanned):
    (join,) = joined(CODECS[kind], [(context, continuation)])
    assert (shown(CODECS[kind], join.context), shown(CODECS[kind], join.continuation)) == (before, after)
    assert join.spanned == spanned


def test_there_are_sixty_of_them_and_their_tokens_are_the_whole_text():
    assert len(CASES) >= 60 and sum(case[-1] for case in CASES) >= 10
    for kind, context, continuation, *_ in CASES:
        if kind in {"bytes", "bpe"}:
            (join,) = joined(CODECS[kind], [(context, continuation)])
            ids = [*(join.context if context.strip() else ()), *join.continuation]
            assert CODECS[kind].decode(ids) == context + continuation


@pytest.mark.parametrize(
    ("opening", "ids", "whole"),
    [
        ((), [5], [5]),
        ((1,), [5], [1, 5]),
        ((1,), [1, 5], [1, 5]),
        ((1,), [1], [1]),
        ((1,), [], [1]),
        ((1,), [5, 1], [1, 5, 1]),
        ((8, 9), [5], [8, 9, 5]),
        ((8, 9), [8, 9, 5], [8, 9, 5]),
        ((8, 9), [9, 5], [8, 9, 5]),
        ((8, 9), [8, 5], [8, 5]),
    ],
)
def test_what_opens_a_text_is_put_once(opening, ids, whole):
    assert Beginning(None, opening=opening).before(ids) == whole


def test_a_template_that_puts_the_first_token_itself_is_followed():
    codec = CODECS["bpe_bos"]

    def encode(text):
        return [1, *codec.encode(text[3:])] if text.startswith("<s>") else codec.encode(text)

    (join,) = joined(codec, [("<s>Ans", " Paris")], encode)
    assert (shown(codec, join.context), shown(codec, join.continuation)) == ("<s>|Ans", "ĠParis")


def test_a_context_that_choices_share_is_encoded_once():
    texts = []

    def encode(text):
        texts.append(text)
        return CODECS["bytes"].encode(text)

    joined(CODECS["bytes"], [("a ", "b"), ("a ", "c"), ("d", "b"), ("a", " e")], encode)
    assert texts == ["a", "a b", "a c", "d", "db", "a e"]


def test_what_has_no_token_to_score_is_refused():
    with pytest.raises(ValueError, match=r"the continuation of 'Q:' is empty, .* at least one character"):
        joined(CODECS["bytes"], [("Q:", "")])
    with pytest.raises(ValueError, match=r"makes no token of the continuation ' ' of 'the', .* with a visible character"):
        joined(CODECS["bert"], [("the", " ")])
    codec = JsonTokenizer(wordpiece(), label="words.json")
    with pytest.raises(
        ValueError, match=r"no token of words\.json is known to begin or end a text\. .* --bos NAME or --eod NAME"
    ):
        joined(codec, [("", "the cat")])
    assert start_of_text(JsonTokenizer(wordpiece(), eod="[SEP]")) == [2]
