"""OpenAI's own client against a server: completions, streams, log-probabilities, errors.

Over HTTP it tests megatrain.serving.answering and megatrain.serving.bodies.
"""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from openai import OpenAI

LETTERS = {str(byte): 30 for byte in b"abcdefgh \n"}
"""A bias for texts of letters."""


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def complete(client, prompt="abc", **more):
    return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 12, "seed": 5, **more})


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert client.models.retrieve("tiny") == model
    assert (model.id, model.owned_by, model.max_model_len, model.chat_template) == ("tiny", "megatrain", 256, True)


def test_a_completion_counts_its_tokens_and_repeats_with_its_seed(client):
    first, again, other = complete(client), complete(client), complete(client, seed=6)
    assert first.choices[0].text == again.choices[0].text != other.choices[0].text
    assert first.choices[0].finish_reason == "length"
    assert (first.usage.prompt_tokens, first.usage.completion_tokens, first.usage.total_tokens) == (3, 12, 15)
    assert first.object == "text_completion" and first.model == "tiny" and first.id.startswith("cmpl-")


def test_max_tokens_is_16_where_nothing_is_said(client):
    assert client.completions.create(model="tiny", prompt="a").usage.completion_tokens <= 16


def test_what_is_effective_is_told(client):
    reply = client.completions.with_raw_response.create(model="tiny", prompt="a", temperature=0.5, max_tokens=3, seed=-1)
    effective = json.loads(reply.headers["x-megatrain-sampling"])
    assert effective["temperature"] == 0.5 and effective["max_tokens"] == 3 and effective["seed"] == 2**63 - 1
    assert reply.headers["x-request-id"] == reply.parse().id


def test_an_unseeded_request_tells_the_seed_that_repeats_it(client):
    reply = client.completions.with_raw_response.create(model="tiny", prompt="a", max_tokens=8)
    seed = json.loads(reply.headers["x-megatrain-sampling"])["seed"]
    assert complete(client, "a", max_tokens=8, seed=seed).choices[0].text == reply.parse().choices[0].text


def test_temperature_0_is_greedy(client):
    texts = {complete(client, temperature=0, seed=seed).choices[0].text for seed in range(3)}
    scored = complete(client, temperature=0, logprobs=1).choices[0].logprobs
    assert len(texts) == 1
    assert [next(iter(top)) for top in scored.top_logprobs] == scored.tokens


def test_four_choices_differ_and_the_first_is_that_of_one(client):
    four = complete(client, n=4)
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in four.choices}) == 4
    assert four.choices[0].text == complete(client).choices[0].text
    assert four.usage.completion_tokens == 48 and four.usage.prompt_tokens == 3


def test_prompts_are_texts_ids_or_lists_of_either(client):
    text = complete(client, "abc").choices[0].text
    assert complete(client, [97, 98, 99]).choices[0].text == text
    several = complete(client, ["xyz", "abc"])
    assert several.choices[1].text == text and several.usage.prompt_tokens == 6
    assert [c.text for c in complete(client, [[120, 121, 122], [97, 98, 99]]).choices] == [c.text for c in several.choices]


def test_two_choices_of_two_prompts_come_prompt_by_prompt(client):
    choices = complete(client, ["xyz", "abc"], n=2).choices
    assert [c.index for c in choices] == [0, 1, 2, 3]
    assert choices[2].text == complete(client, "abc").choices[0].text


def test_a_stop_string_across_tokens_is_cut_and_its_tokens_count(client):
    text = complete(client, logit_bias=LETTERS, max_tokens=40).choices[0].text
    stop = text[10:13]
    assert len(stop) == 3
    cut = complete(client, logit_bias=LETTERS, max_tokens=40, stop=stop)
    assert cut.choices[0].text == text[: text.index(stop)]
    assert (cut.choices[0].finish_reason, cut.choices[0].stop_reason) == ("stop", stop)
    assert cut.usage.completion_tokens == text.index(stop) + 3  # a token is a byte


def test_the_earliest_of_several_stop_strings_ends_the_text(client):
    text = complete(client, logit_bias=LETTERS, max_tokens=40).choices[0].text
    stops = ["nowhere", text[20:23], text[9:12], text[30:33]]
    cut = complete(client, logit_bias=LETTERS, max_tokens=40, stop=stops).choices[0]
    assert cut.text == text[: min(text.find(stop) for stop in stops[1:])]


def test_a_stop_string_in_a_stream_is_never_shown(client):
    text = complete(client, logit_bias=LETTERS, max_tokens=40).choices[0].text
    stop = text[10:13]
    parts = list(complete(client, logit_bias=LETTERS, max_tokens=40, stop=stop, stream=True))
    assert "".join(part.choices[0].text for part in parts) == text[: text.index(stop)]
    assert parts[-1].choices[0].finish_reason == "stop"


def test_a_stop_token_ends_the_text_and_is_none_of_it(client):
    text = complete(client, logit_bias=LETTERS, max_tokens=40).choices[0].text
    byte = text.encode()[8]
    cut = complete(client, logit_bias=LETTERS, max_tokens=40, extra_body={"stop_token_ids": [byte]}).choices[0]
    assert cut.text == text[: text.index(chr(byte))] and cut.finish_reason == "stop" and cut.stop_reason == byte


def test_the_end_of_a_document_ends_the_text_unless_it_is_ignored(client):
    ended = complete(client, logit_bias={"256": 100})
    assert (ended.choices[0].text, ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("", "stop", 0)
    ignored = complete(client, logit_bias={"256": 100}, extra_body={"ignore_eos": True})
    assert ignored.usage.completion_tokens == 12 and ignored.choices[0].finish_reason == "length"


def test_log_probabilities_of_completions(client):
    scored = complete(client, logprobs=3).choices[0].logprobs
    assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.top_logprobs) == 12
    assert all(len(top) == 3 and all(value <= 0 for value in top.values()) for top in scored.top_logprobs)
    for token, value, top in zip(scored.tokens, scored.token_logprobs, scored.top_logprobs, strict=True):
        assert value <= max(top.values()) + 1e-6
        assert top.get(token, value) == value


def test_logprobs_0_tells_the_chosen_tokens_alone(client):
    scored = complete(client, logprobs=0).choices[0].logprobs
    assert len(scored.token_logprobs) == 12 and scored.top_logprobs is None
    assert complete(client).choices[0].logprobs is None


def test_echo_scores_the_prompt_and_its_first_token_has_none(client):
    choice = complete(client, "hello", echo=True, logprobs=1, max_tokens=4).choices[0]
    assert choice.text.startswith("hello")
    assert choice.logprobs.tokens[:5] == list("hello") and choice.logprobs.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:]) and len(choice.logprobs.tokens) == 9


def test_a_prompt_alone_is_scored_as_it_is_when_written(client):
    """The log-probabilities of an answer are those of the same tokens as a prompt."""
    answer = complete(client, [1, 2, 3], logprobs=0, max_tokens=6, extra_body={"return_token_ids": True}).choices[0]
    alone = complete(client, [1, 2, 3, *answer.token_ids], echo=True, logprobs=0, max_tokens=0)
    assert alone.usage.completion_tokens == 0 and alone.choices[0].finish_reason == "length"
    assert alone.choices[0].logprobs.token_logprobs[3:] == pytest.approx(answer.logprobs.token_logprobs, abs=1e-5)


def test_an_echo_of_one_token_has_nothing_to_score(client):
    choice = complete(client, "h", echo=True, logprobs=1, max_tokens=0).choices[0]
    assert choice.text == "h" and choice.finish_reason == "length"
    parts = list(complete(client, "h", echo=True, logprobs=1, max_tokens=0, stream=True))
    assert "".join(part.choices[0].text for part in parts) == "h" and parts[0].choices[0].logprobs.token_logprobs == [None]


def test_a_stream_of_echo_with_log_probabilities(client):
    whole = complete(client, "hello", echo=True, logprobs=2, max_tokens=6).choices[0]
    parts = [part.choices[0] for part in complete(client, "hello", echo=True, logprobs=2, max_tokens=6, stream=True)]
    assert "".join(part.text for part in parts) == whole.text
    tokens, offsets, values = (
        [value for part in parts for value in getattr(part.logprobs, name)]
        for name in ("tokens", "text_offset", "token_logprobs")
    )
    assert tokens == whole.logprobs.tokens and offsets == whole.logprobs.text_offset
    assert values[0] is None and values[1:] == pytest.approx(whole.logprobs.token_logprobs[1:], abs=1e-5)


def test_a_stream_is_the_whole(client):
    whole = complete(client, logit_bias=LETTERS, max_tokens=30)
    parts = list(complete(client, logit_bias=LETTERS, max_tokens=30, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert [part.choices[0].finish_reason for part in parts][-1] == "length"
    assert {part.choices[0].finish_reason for part in parts[:-1]} <= {None}
    assert all(part.usage is None for part in parts) and len({part.id for part in parts}) == 1


def test_a_stream_counts_its_tokens_where_it_is_asked_to(client):
    parts = list(complete(client, n=2, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].choices == [] and parts[-1].usage.completion_tokens == 24 and parts[-1].usage.prompt_tokens == 3
    assert all(part.usage is None for part in parts[:-1])
    for index in (0, 1):
        mine = [part.choices[0] for part in parts[:-1] if part.choices[0].index == index]
        assert mine[-1].finish_reason == "length"


def test_events_are_as_the_protocol_has_them(server):
    body = {"prompt": "abc", "max_tokens": 4, "seed": 5, "stream": True, "stream_options": {"include_usage": True}}
    status, text, headers = server.ask("/v1/completions", body)
    events = text.split("\n\n")
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert events[-1] == "" and events[-2] == "data: [DONE]" and all(event.startswith("data: {") for event in events[:-2])
    chunks = [json.loads(event[6:]) for event in events[:-2]]
    assert all(chunk["usage"] is None for chunk in chunks[:-1]) and chunks[-1]["choices"] == []


def test_characters_are_never_split_in_a_stream(client):
    chinese = {str(byte): 40 for byte in "你".encode()}
    parts = list(complete(client, "你", logit_bias=chinese, max_tokens=60, stream=True))
    whole = complete(client, "你", logit_bias=chinese, max_tokens=60).choices[0].text
    assert "".join(part.choices[0].text for part in parts) == whole


def test_tokens_of_a_character_are_told_as_bytes(client):
    scored = complete(client, "你", echo=True, logprobs=0, max_tokens=0).choices[0].logprobs
    assert scored.tokens == ["bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0"]
    assert scored.text_offset == [0, 0, 0]


def test_penalties_and_bias_change_the_text(client):
    plain = complete(client, temperature=0, max_tokens=40).choices[0].text
    for more in (
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"extra_body": {"repetition_penalty": 3}},
        {"logit_bias": {"120": 100}},
    ):
        assert complete(client, temperature=0, max_tokens=40, **more).choices[0].text != plain
    assert complete(client, temperature=0, max_tokens=5, logit_bias={"120": 100}).choices[0].text == "xxxxx"


def test_cuts_of_the_distribution(client):
    greedy = complete(client, temperature=0).choices[0].text
    for more in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1}}, {"temperature": 1e-6}):
        assert complete(client, seed=9, **more).choices[0].text == greedy
    for more in ({"top_p": 1}, {"extra_body": {"top_k": 0}}, {"extra_body": {"top_k": -1}}, {"extra_body": {"min_p": 0}}):
        assert complete(client, **more).choices[0].text == complete(client).choices[0].text


def test_neighbours_change_nothing(client):
    alone = complete(client, "abc", seed=3, max_tokens=30).choices[0].text
    beside = complete(client, ["zz", "abc", "a" * 100], seed=3, n=3, max_tokens=30)
    assert beside.choices[3].text == alone

    def text(number):
        return complete(client, "abc" if number % 2 else "q" * number, seed=3, max_tokens=30).choices[0].text

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(text, range(1, 13)))
    assert set(texts[::2]) == {alone}


def test_token_ids_are_told_where_they_are_asked_for(client):
    choice = complete(client, "ab", max_tokens=3, extra_body={"return_token_ids": True}).choices[0]
    assert choice.prompt_token_ids == [97, 98] and len(choice.token_ids) == 3


def test_tokens_there_and_back(server):
    status, tokens, _ = server.ask("/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert (status, tokens["tokens"], tokens["count"], tokens["max_model_len"]) == (200, [104, 195, 169], 3, 256)
    assert tokens["token_strs"] == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert server.ask("/detokenize", {"tokens": [104, 195, 169]})[1] == {"prompt": "hé"}


def error_of(client, kind, **more):
    with pytest.raises(kind) as caught:
        complete(client, **more)
    return caught.value


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"extra_body": {"temprature": 1}}, "temprature", "The nearest known one is temperature."),
        ({"extra_body": {"best_of": 3}}, "best_of", "best_of is not supported: ask for n choices"),
        ({"temperature": 3}, "temperature", "temperature: 3 is not a number from 0 to 2. Try 0.7."),
        ({"top_p": 0}, "top_p", "top_p: 0 is not a number above 0 and at most 1. Try 0.9."),
        ({"n": 0}, "n", "n: 0 is not a whole number from 1 to 64. Try 1."),
        ({"extra_body": {"n": "two"}}, "n", "n: 'two' is not a whole number from 1 to 64. Try 1."),
        ({"stop": ["a"] * 5}, "stop", "is not a text or a list of up to four texts"),
        ({"stop": ""}, "stop", "stop has 0 characters"),
        ({"logprobs": 21}, "logprobs", "logprobs: 21 is not a whole number from 0 to 20."),
        ({"logit_bias": {"x": 1}}, "logit_bias", "which is no token id"),
        ({"logit_bias": {"261": 1}}, "logit_bias", "names the token 261, and the model's vocabulary has 261 tokens"),
        ({"prompt": [261]}, "prompt", "has the token 261, and the model's vocabulary has 261 tokens"),
        (
            {"prompt": "x" * 256},
            "prompt",
            "the prompt has 256 tokens, and the model's context has room for 256, the answer included",
        ),
        ({"prompt": "x" * 250}, "max_tokens", "makes 262; the model's context has room for 256. Use max_tokens=6 or fewer."),
        ({"max_tokens": 0}, "max_tokens", "nothing is asked for"),
        ({"suffix": "x"}, "suffix", "tiny continues texts, and only a GLM fills blanks"),
        ({"stream_options": {"include_usages": True}}, "stream_options", "stream_options has no field 'include_usages'"),
        ({"n": 64, "prompt": ["a"] * 4}, "n", "256 texts are asked for at once, and there is room for 224"),
    ],
    ids=str,
)
def test_what_is_wrong_is_a_400_that_names_it(client, more, param, said):
    error = error_of(client, openai.BadRequestError, **more)
    assert error.param == param and said in error.message, error.message
    assert error.type == "invalid_request_error"


def test_other_errors_have_their_status(client, server):
    with pytest.raises(openai.NotFoundError, match="there is no model 'x/gpt-4' here"):
        client.models.retrieve("x/gpt-4")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here; this server has 'tiny'"):
        client.completions.create(model="gpt-4", prompt="a")
    assert server.ask("/v1/nothing")[0] == 404
    assert server.ask("/v1/completions")[0] == 405
    assert server.ask("/v1/completions", b"{}", **{"content-type": "text/plain"})[0] == 415


def test_log_probabilities_are_natural_logarithms(client):
    """All 261 next tokens would sum to 1; the 20 that are told sum to less."""
    top = complete(client, logprobs=20, max_tokens=1).choices[0].logprobs.top_logprobs[0]
    assert 0.3 < sum(map(math.exp, top.values())) < 1


def test_a_prompt_of_one_token_is_scored(client):
    for more in ({}, {"stream": True}):
        reply = complete(client, "a", echo=True, logprobs=1, max_tokens=0, **more)
        choices = [part.choices[0] for part in reply] if more else reply.choices
        assert "".join(choice.text for choice in choices) == "a" and choices[-1].finish_reason == "length"
        assert choices[0].logprobs.tokens == ["a"] and choices[0].logprobs.token_logprobs == [None]


def odd(draw):
    """A request that is right, though nobody may have thought of it."""
    prompts = ["", "a", "x" * 255, "你好\n" * 9, "\x00", "<|endoftext|>", [256], [0], [260] * 7, ["", "b"], [[1], [2] * 200]]
    prompt = draw.choice(prompts)
    body = {
        "prompt": prompt,
        "max_tokens": draw.choice([0, 1, 2, 30]),
        "echo": draw.random() < 0.3,
        "n": draw.choice([1, 1, 3]),
    }
    body["max_tokens"] = min(body["max_tokens"], 1) if prompt == "x" * 255 else body["max_tokens"]
    body["max_tokens"] = body["max_tokens"] if body["echo"] else max(1, body["max_tokens"])
    choices = {
        "logprobs": [None, 0, 1, 20],
        "temperature": [0, 1e-9, 0.5, 2],
        "top_p": [1e-9, 0.5, 1],
        "top_k": [-1, 0, 1, 1000],
        "min_p": [0, 0.5, 1],
        "repetition_penalty": [1e-3, 1, 10],
        "presence_penalty": [-2, 0, 2],
        "frequency_penalty": [-2, 0, 2],
        "stop": [None, [], "a", ["\x00", "ab", "aba"], ["你"]],
        "stop_token_ids": [None, [], [97], [256, 0]],
        "logit_bias": [None, {}, {"97": -100, "98": 100}, {str(token): -100 for token in range(261)}],
        "ignore_eos": [True, False],
        "stream": [True, False],
        "seed": [None, 0, -1, -(2**63), 2**63 - 1],
        "return_token_ids": [True, False],
        "stream_options": [None, {}, {"include_usage": True}],
        "user": [None, "me"],
    }
    return body | {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.5}


def test_200_odd_requests_are_answered(server):
    draw = random.Random(3)
    bodies = [odd(draw) for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda body: server.ask("/v1/completions", body), bodies))
    wrong = [
        (body, reply[:2]) for body, reply in zip(bodies, replies, strict=True) if reply[0] != 200 or '"error"' in str(reply[1])
    ]
    assert wrong == []
    assert server.get("/health")["open"] == server.get("/health")["blocks_used"] == 0
