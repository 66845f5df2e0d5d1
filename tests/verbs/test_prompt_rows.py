"""Rows of prompts: what they may say, what is wrong with others, by file and line."""

import io
import json
import sys

import pytest

from megatrain.chat.conversation import ChatMessage
from megatrain.inference.requests import Scored
from megatrain.inference.text_plans import PlannedText
from megatrain.verbs.prompt_rows import PromptRow, Wishes, output_row, read_input, rows_of_text

WISHES = Wishes(max_tokens=8, seed=1)


def rows(text, path="p.jsonl"):
    return rows_of_text(text, path, WISHES)


def test_a_text_is_one_prompt_and_rows_are_several():
    assert rows("Once\nupon\n", "a.txt") == ([PromptRow("a.txt", WISHES, "Once\nupon")], False)
    assert rows("{\n}\n", "a.c")[1] is False
    assert rows('{"a": 1}', "a.json")[1] is False
    found, are_rows = rows('\n{"prompt": "a"}\n\n{"prompt": "", "id": 7, "stop": "x", "max_tokens": 3, "top_k": null}\n', "-")
    assert are_rows
    assert found == [
        PromptRow("standard input, line 2", WISHES, "a"),
        PromptRow("standard input, line 4", Wishes(max_tokens=3, seed=1, stop=("x",)), "", id=7),
    ]
    (row,), _ = rows('{"messages": [{"role": "assistant", "content": "a"}], "continue_final_message": true}')
    assert (row.prompt, row.messages, row.continued) == (None, (ChatMessage("assistant", "a"),), True)


def test_a_row_s_own_sampling_takes_the_place_of_greedy():
    lines = '{"prompt": "a"}\n{"prompt": "a", "temperature": 0.5}'
    (plain, warm), _ = rows_of_text(lines, "r.jsonl", Wishes(greedy=True))
    assert [row.wishes.sampling().greedy for row in (plain, warm)] == [True, False]
    (plain, warm), _ = rows_of_text(lines, "r.jsonl", Wishes(beams=4, length_penalty=1.0))
    assert [(row.wishes.beams, row.wishes.length_penalty) for row in (plain, warm)] == [(4, 1.0), (None, 0.0)]


def test_a_mistake_in_the_first_row_is_told():
    with pytest.raises(ValueError, match=r"^standard input, line 1: it is not JSON"):
        rows('{"prompt": }\n{"prompt": "a"}\n', "-")
    assert rows('{"a":\n 1}\n', "-")[1] is False
    assert rows('f() {\n{"prompt": "a"}\n', "-")[1] is False


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x", 'it is not JSON (Expecting value: line 1 column 1 (char 0)). A row is {"prompt": "Once upon"}.'),
        ("[]", 'a row is an object with either "prompt" or "messages": {"prompt": "Once upon"}.'),
        ('{"prompt": "a", "messages": []}', 'a row is an object with either "prompt" or "messages": {"prompt": "Once upon"}.'),
        ('{"prompt": 3}', '"prompt" is a text, and it is gone on with anyway: {"prompt": "Once upon"}.'),
        ('{"prompt": "a", "prompt": "b"}', "it is not JSON (a key appears twice among ['prompt', 'prompt'])."),
        (
            '{"prompt": "a", "max_token": 3}',
            "'max_token' is not known. A row has prompt, messages, id, continue_final_message, max_tokens",
        ),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0. Use a whole number of 1 or more."),
        ('{"prompt": "a", "max_tokens": 2.5}', "max_tokens is 2.5. Use a whole number of 1 or more."),
        ('{"prompt": "a", "n": true}', "n is true. Use a whole number of 1 or more."),
        ('{"prompt": "a", "seed": 9223372036854775808}', "seed is 9223372036854775808. Use a whole number below 2^63."),
        ('{"prompt": "a", "temperature": "hot"}', 'temperature is "hot". Use a number.'),
        (
            '{"prompt": "a", "temperature": 0}',
            "temperature=0 cannot be: use a number above 0; greedy for the most probable token.",
        ),
        ('{"prompt": "a", "top_p": NaN}', "top_p is NaN. Use a number."),
        ('{"prompt": "a", "greedy": 1}', "greedy is 1. Use true or false."),
        ('{"prompt": "a", "stop": [""]}', 'stop is [""]. Use a text that is not empty, or a list of them: ["\\n\\n"].'),
        ('{"prompt": "\\ud800"}', "the prompt is no text of Unicode: '\\ud800' is half of a character."),
        ('{"prompt": "a", "id": ["\\udc00"]}', "id is no text of Unicode: '\\udc00' is half of a character."),
        ('{"prompt": "a", "greedy": true, "n": 2}', "greedy gives one text for a prompt, 2 times the same. Use n=1."),
        ('{"prompt": "a", "beams": 3, "n": 2}', "beams=3 gives one text for a prompt, 2 times the same. Use n=1."),
        ('{"prompt": "a", "greedy": true, "top_k": 2}', "greedy takes what is most probable, so top_k means nothing."),
        ('{"prompt": "a", "beams": 1, "top_p": 0.5}', "beams=1 takes what is most probable, so top_p means nothing."),
        ('{"prompt": "a", "beams": 3, "logprobs": 1}', "beams=3 ranks whole texts by the model's own probabilities: leave"),
        ('{"prompt": "a", "beams": 3, "presence_penalty": 1}', "beams=3 ranks whole texts by the model's own probabilities"),
        ('{"prompt": "a", "length_penalty": 5}', "length_penalty ranks texts of several beams, and there is one."),
        ('{"messages": [{"role": "bot", "content": ""}]}', "messages[0] has the role 'bot'. Roles are system"),
        ('{"messages": [], "continue_final_message": 1}', "continue_final_message is 1. Use true or false."),
    ],
)
def test_errors_name_file_and_line(line, said):
    with pytest.raises(ValueError) as error:
        rows(f'{{"prompt": "fine"}}\n{line}\n')
    assert str(error.value).startswith(f"p.jsonl, line 2: {said}")


def test_inputs_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"p\.jsonl has no rows\. Give one a line: \{\"prompt\": \"Once upon\"\}\."):
        rows("\n")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"latin cannot be read: 'utf-8' codec can't decode.*Give text in UTF-8, or rows of JSON"
    ):
        read_input(str(tmp_path / "latin"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeff你".encode())))
    assert read_input("-") == "你"


def test_rows_of_output():
    tokens = (Scored(5, -0.5, greedy=True, top=((5, -0.5), (6, -1.5))),)
    writing = PlannedText("你", tokens, "stop")
    row = PromptRow("", Wishes(logprobs=2), "a", id="q")
    assert json.loads(output_row(3, 1, row, 4, writing)) == {
        "index": 3,
        "sample": 1,
        "id": "q",
        "text": "你",
        "finish_reason": "stop",
        "prompt_tokens": 4,
        "tokens": [5],
        "logprobs": [-0.5],
        "top_logprobs": [[[5, -0.5], [6, -1.5]]],
    }
    plain = PromptRow("", Wishes(logprobs=0), "a")
    assert output_row(0, 0, plain, 1, writing).endswith('"tokens": [5], "logprobs": [-0.5]}')
    assert '"text": "你"' in output_row(0, 0, PromptRow("", Wishes(), "a"), 1, writing)
    beams = PlannedText("x", tokens, "length", (PlannedText("x", tokens, "length"),), -2.0)
    assert output_row(0, 0, plain, 1, beams).endswith('"tokens": [5], "blanks": ["x"], "log_probability": -2.0}')
