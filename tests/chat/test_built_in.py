"""Built-in templates, letter by letter and id by id."""

import pytest
from chat_templates import SPECIAL
from tokenizer_models import KINDS
from tokenizers import AddedToken

from megatrain.chat.conversation import ChatError, ChatMessage
from megatrain.chat.templates import open_chat
from megatrain.data.tokenizer import ByteTokenizer, JsonTokenizer

Q1, A1, Q2 = ChatMessage("user", "你好"), ChatMessage("assistant", "hi <|user|>"), ChatMessage("user", "q")
SYSTEM = ChatMessage("system", "be <sop> short")


@pytest.fixture(scope="module")
def codec():
    made = KINDS["gpt2"]()
    made.add_special_tokens([AddedToken(name, special=True) for name in (*SPECIAL, "sop")])
    return JsonTokenizer(made, eod="</s>")


def written(codec, name, *messages, **how):
    """(the text, the tokens with the letters of each run of text together)."""
    prompt = open_chat(codec, choice=name).prompt(messages, **how)
    names = {token.token: token.name for token in codec.named_tokens}
    parts, run = [], []
    for token in [*prompt.tokens, None]:
        if token is not None and token not in names:
            run.append(token)
            continue
        parts += [codec.decode(run)] if run else []
        parts += [] if token is None else [names[token]]
        run = []
    return prompt.text, parts


CASES = [
    ("chatglm", (Q1,), "你好[gMASK]<sop>", ["你好", "[gMASK]", "<sop>"]),
    (
        "chatglm",
        (Q1, A1, Q2),
        "[Round 0]\n问：你好\n答：hi <|user|>\n[Round 1]\n问：q\n答：[gMASK]<sop>",
        ["[Round 0]\n问：你好\n答：hi <|user|>\n[Round 1]\n问：q\n答：", "[gMASK]", "<sop>"],
    ),
    ("chatglm2", (Q1,), "[gMASK]<sop>[Round 1]\n\n问：你好\n\n答：", ["[gMASK]", "<sop>", "[Round 1]\n\n问：你好\n\n答："]),
    (
        "chatglm2",
        (Q1, A1, Q2),
        "[gMASK]<sop>[Round 1]\n\n问：你好\n\n答：hi <|user|>\n\n[Round 2]\n\n问：q\n\n答：",
        ["[gMASK]", "<sop>", "[Round 1]\n\n问：你好\n\n答：hi <|user|>\n\n[Round 2]\n\n问：q\n\n答："],
    ),
    (
        "chatglm3",
        (SYSTEM, Q1, A1, Q2),
        "[gMASK]<sop><|system|>\nbe <sop> short<|user|>\n你好<|assistant|>\nhi <|user|><|user|>\nq<|assistant|>",
        [
            "[gMASK]",
            "<sop>",
            "<|system|>",
            "\nbe <sop> short",
            "<|user|>",
            "\n你好",
            "<|assistant|>",
            "\nhi <|user|>",
            "<|user|>",
            "\nq",
            "<|assistant|>",
        ],
    ),
    (
        "glm4",
        (Q1, A1, ChatMessage("observation", "42")),
        "[gMASK]<sop><|user|>\n你好<|assistant|>\nhi <|user|><|observation|>\n42<|assistant|>",
        [
            "[gMASK]",
            "<sop>",
            "<|user|>",
            "\n你好",
            "<|assistant|>",
            "\nhi <|user|>",
            "<|observation|>",
            "\n42",
            "<|assistant|>",
        ],
    ),
    (
        "chatml",
        (SYSTEM, Q1),
        "<|im_start|>system\nbe <sop> short<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n",
        [
            "<|im_start|>",
            "system\nbe <sop> short",
            "<|im_end|>",
            "\n",
            "<|im_start|>",
            "user\n你好",
            "<|im_end|>",
            "\n",
            "<|im_start|>",
            "assistant\n",
        ],
    ),
    (
        "alpaca",
        (Q1,),
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n你好\n\n### Response:\n",
        [
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n你好\n\n### Response:\n"
        ],
    ),
    (
        "alpaca",
        (SYSTEM, Q1, A1, Q2),
        "be <sop> short\n\n### Instruction:\n你好\n\n### Response:\nhi <|user|>\n\n### Instruction:\nq\n\n### Response:\n",
        ["be <sop> short\n\n### Instruction:\n你好\n\n### Response:\nhi <|user|>\n\n### Instruction:\nq\n\n### Response:\n"],
    ),
]


@pytest.mark.parametrize(("name", "messages", "text", "parts"), CASES, ids=lambda it: it if isinstance(it, str) else "")
def test_text_and_tokens(codec, name, messages, text, parts):
    assert written(codec, name, *messages) == (text, parts)


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("chatglm", ["[gMASK]", "<sop>", "hi <|user|>"]),
        ("chatglm2", ["[Round 1]\n\n问：你好\n\n答：hi <|user|>"]),
        ("chatglm3", ["<|assistant|>", "\nhi <|user|>"]),
        ("chatml", ["<|im_start|>", "assistant\nhi <|user|>"]),
        ("alpaca", ["### Response:\nhi <|user|>"]),
    ],
)
def test_an_answer_that_is_gone_on_with_is_left_open(codec, name, ending):
    text, parts = written(codec, name, Q1, A1, continue_final_message=True)
    assert text.endswith("hi <|user|>")
    assert parts[1 - len(ending) or len(parts) :] == ending[1:]
    assert parts[-len(ending)].endswith(ending[0])


def test_what_ends_an_answer(codec):
    ids = {name: codec.special_id(name) for name in (*SPECIAL, "</s>")}
    ends = {
        name: open_chat(codec, choice=name).ends for name in ("chatglm", "chatglm2", "chatglm3", "glm4", "chatml", "alpaca")
    }
    end = ids["</s>"]
    assert ends == {
        "chatglm": {end, ids["<eop>"]},
        "chatglm2": {end},
        "chatglm3": {end, ids["<|user|>"], ids["<|observation|>"]},
        "glm4": {end, ids["<|user|>"], ids["<|observation|>"]},
        "chatml": {end, ids["<|im_end|>"]},
        "alpaca": {end},
    }
    assert open_chat(codec, choice="alpaca").stops == ("\n\n### Instruction:",)
    assert (open_chat(codec, choice="glm4").leading, open_chat(codec, choice="chatml").leading) == ("\n", "")


def test_what_opens_a_text_is_there_once():
    made = KINDS["gpt2"]()
    made.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    codec = JsonTokenizer(made, bos="<s>")
    begin = codec.special_id("<s>")
    for name in ("alpaca", "chatml"):
        tokens = open_chat(codec, choice=name).prompt([ChatMessage("user", "<s> a")]).tokens
        assert (tokens[0], tokens.count(begin)) == (begin, 1)


def test_ids_that_the_tokenizer_does_not_know():
    bytes_chat = open_chat(ByteTokenizer(), choice="chatglm", tokens={"[gMASK]": 257, "<sop>": 258, "<eop>": 259})
    assert bytes_chat.prompt([ChatMessage("user", "a[gMASK]")]).tokens == (*b"a[gMASK]", 257, 258)
    assert bytes_chat.ends == {256, 259}

    class ChatGlm3Pieces(ByteTokenizer):
        """The vocabulary's size of ChatGLM2 and 3, whose special tokens are numbered behind it."""

        vocab_size = 64789

    tokens = open_chat(ChatGlm3Pieces(), choice="chatglm3").prompt([ChatMessage("user", "a")]).tokens
    assert tokens == (64790, 64792, 64795, 10, 97, 64796)
    assert open_chat(ChatGlm3Pieces(), choice="chatglm3").ends == {256, 64795, 64797}
    assert open_chat(ChatGlm3Pieces(), choice="chatglm2").prompt([ChatMessage("user", "a")]).tokens[:2] == (64790, 64792)


def test_conversations_that_a_template_cannot_write(codec):
    def said(name, *messages):
        with pytest.raises(ChatError) as error:
            open_chat(codec, choice=name).prompt(messages)
        return str(error.value)

    assert said("chatglm2", SYSTEM, Q1) == (
        "messages[0] is of role system, and the chat template chatglm2 has only user, assistant. Put its text into a message of role user."
    )
    assert said("chatml", Q1, SYSTEM, Q1) == "messages[1] is of role system, which is only the first of a conversation."
    assert said("alpaca", Q1, Q1) == (
        "messages[1] is of role user, where assistant is expected: user and assistant take turns, and the user begins."
    )
    assert said("chatml", SYSTEM) == "the chat template chatml: the conversation has no message of role user."
    with pytest.raises(ChatError, match="the chat template chatml has no variable 'enable_thinking'"):
        open_chat(codec, choice="chatml").prompt([Q1], variables={"enable_thinking": False})
    with pytest.raises(
        ChatError, match=r"chatml needs the special token <\|im_start\|>, and bytes has none of that name\. Choose"
    ):
        open_chat(ByteTokenizer(), choice="chatml")
