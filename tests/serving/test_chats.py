"""OpenAI's own client against a server: conversations."""

import openai
import pytest
from openai import OpenAI

HELLO = [{"role": "user", "content": "Hello"}]
LETTERS = {str(byte): 30 for byte in b"abcdefgh \n"}


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat(client, messages=HELLO, **more):
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 12, "seed": 5, **more})


def test_an_answer_is_the_completion_of_what_the_template_writes(client):
    messages = [{"role": "system", "content": "Be kind."}, *HELLO]
    reply = chat(client, messages, extra_body={"return_token_ids": True})
    prompt = "s:Be kind.\nu:Hello\na:"
    assert bytes(reply.prompt_token_ids).decode() == prompt
    same = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, seed=5)
    assert reply.choices[0].message.content == same.choices[0].text
    assert (reply.choices[0].message.role, reply.object) == ("assistant", "chat.completion")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), 12) and reply.id.startswith("chatcmpl-")


def test_an_answer_may_take_what_is_left_of_the_context(client):
    reply = client.chat.completions.create(model="tiny", messages=HELLO, logit_bias=LETTERS)
    assert (reply.usage.total_tokens, reply.choices[0].finish_reason) == (256, "length")


def test_both_names_of_the_limit(client):
    assert chat(client, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError, match="say the same thing differently"):
        chat(client, max_completion_tokens=3)


def test_a_stream_begins_with_the_role_and_ends_with_usage(client):
    whole = chat(client, logit_bias=LETTERS, n=2)
    parts = list(chat(client, logit_bias=LETTERS, n=2, stream=True, stream_options={"include_usage": True}))
    assert [part.choices[0].delta.role for part in parts[:2]] == ["assistant", "assistant"]
    assert [part.choices[0].delta.content for part in parts[:2]] == ["", ""]
    assert all(part.object == "chat.completion.chunk" for part in parts)
    for index in (0, 1):
        mine = [part.choices[0] for part in parts[:-1] if part.choices[0].index == index]
        assert "".join(each.delta.content or "" for each in mine) == whole.choices[index].message.content
        assert [each.finish_reason for each in mine].count("length") == 1 and mine[-1].finish_reason == "length"
    assert parts[-1].usage == whole.usage.model_copy(update={"prompt_tokens_details": parts[-1].usage.prompt_tokens_details})


def test_log_probabilities_without_others_have_empty_lists(client):
    """As vLLM once did not, and clients' types want."""
    content = chat(client, logprobs=True).choices[0].logprobs.content
    assert len(content) == 12 and all(each.top_logprobs == [] for each in content)
    assert chat(client).choices[0].logprobs is None


def test_log_probabilities_with_others(client):
    content = chat(client, logprobs=True, top_logprobs=4, temperature=0).choices[0].logprobs.content
    for each in content:
        assert len(each.top_logprobs) == 4 and each.top_logprobs[0].token == each.token
        assert each.top_logprobs[0].logprob == each.logprob == max(top.logprob for top in each.top_logprobs)


def test_the_bytes_of_all_tokens_are_the_text(client):
    choice = chat(client, logprobs=True, logit_bias={str(byte): 40 for byte in "你".encode()}, max_tokens=60).choices[0]
    raw = b"".join(bytes(each.bytes) for each in choice.logprobs.content)
    assert raw.decode(errors="replace") == choice.message.content
    assert {each.token for each in choice.logprobs.content} <= {"bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0"}


def test_log_probabilities_of_a_stream_are_those_of_the_whole(client):
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    parts = [part.choices[0] for part in chat(client, logprobs=True, top_logprobs=2, stream=True)]
    streamed = [each for part in parts if part.logprobs for each in part.logprobs.content]
    assert [each.token for each in streamed] == [each.token for each in whole]
    assert [each.logprob for each in streamed] == pytest.approx([each.logprob for each in whole], abs=1e-5)


def test_a_final_message_is_gone_on_with(client):
    messages = [*HELLO, {"role": "assistant", "content": "Once upon"}]
    reply = chat(client, messages, extra_body={"continue_final_message": True, "return_token_ids": True})
    assert bytes(reply.prompt_token_ids).decode() == "u:Hello\na:Once upon"
    with pytest.raises(openai.BadRequestError, match="continue_final_message"):
        chat(client, messages)
    with pytest.raises(openai.BadRequestError, match="the last message is of role user"):
        chat(client, extra_body={"continue_final_message": True})


def test_a_template_has_variables(client):
    reply = chat(client, extra_body={"chat_template_kwargs": {"opening": "b:"}, "return_token_ids": True})
    assert bytes(reply.prompt_token_ids).decode() == "u:Hello\nb:"


def test_contents_may_be_lists_of_texts(client):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    asked = chat(client, [{"role": "user", "content": parts}], extra_body={"return_token_ids": True})
    assert bytes(asked.prompt_token_ids).decode() in ("u:Hello\na:", "u:Hel\nlo\na:")


def test_tokenize_and_detokenize_write_conversations(server):
    found = server.ask("/tokenize", {"messages": HELLO})[1]
    assert server.ask("/detokenize", {"tokens": found["tokens"]})[1] == {"prompt": "u:Hello\na:"}


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "tools",
            "tools is not supported: the model's text is all there is",
        ),
        ({"functions": [{"name": "f"}]}, "functions", "functions is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "'json_object' is not 'text'"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs. Add logprobs: true."),
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages", "has the role 'judge'"),
        ({"messages": [{"role": "tool", "content": "x"}, *HELLO]}, "messages", "no such role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "only texts",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 300}]},
            "messages",
            "the prompt has 305 tokens, and the model's context has room for 256",
        ),
        ({"extra_body": {"echo": True}}, "echo", "echo is not supported: use /v1/completions."),
        ({"extra_body": {"messags": 1}}, "messags", "The nearest known one is messages."),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: 0 is not a whole number from 1 on"),
    ],
    ids=str,
)
def test_what_is_wrong_is_a_400_that_names_it(client, more, param, said):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **more)
    assert caught.value.param == param and said in caught.value.message, caught.value.message


def test_what_asks_for_nothing_is_taken(client):
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "stop": None}
    assert chat(client, **neutral, extra_body={"best_of": 1, "functions": None}).choices[0].message.content
