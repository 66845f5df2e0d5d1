"""A conversation through a pipe and in a terminal: what the model is told, what is kept, and how an answer is interrupted."""

import io
import signal
import sys

import pytest
from tiny_checkpoint import arguments, config_of, saved

from megatrain.chat.conversation import ChatError
from megatrain.inference.requests import Scored
from megatrain.inference.text_plans import PlannedText
from megatrain.verbs.generate import main

HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Model:
    """Answers with given texts, and keeps the prompts; after `press` letters of an answer Ctrl-C is pressed."""

    def __init__(self, *answers, press=None):
        self.answers, self.press, self.prompts, self.requests = iter(answers), press, [], []

    def written(self, request, manner, _before, show):
        self.requests.append(request)
        self.prompts.append(bytes(request.tokens).decode())
        said = ""
        for letter in next(self.answers):
            if self.press == len(said):
                signal.raise_signal(signal.SIGINT)
            if manner.enough():
                break
            said += letter
            show(letter)
        return PlannedText(said, (Scored(97, 0.0, greedy=True),) * len(said), "stop" if said else "length")
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talk")
    saved(folder, config_of(seq_length=512))
    return folder


@pytest.fixture
def converse(checkpoint, monkeypatch, capsys):
    """(standard output, standard error) of a conversation of lines with a model."""

    def run(model, text, stdin=io.StringIO, **more):
        monkeypatch.setattr("megatrain.verbs.talk.written", model.written)
        monkeypatch.setattr(sys, "stdin", stdin(text))
        given = {"prompt": None, "chat": True, "chat_template": "alpaca", "max_tokens": 20, **more}
        assert main(arguments(checkpoint, **given)) == 0
        return capsys.readouterr()

    return run


def test_a_conversation_through_a_pipe(converse):
    model = Model("hi", "", "again", "new", "short")
    said = "Hello\n\nand?\nmore\n/reset\nfresh\n/system Be short.\nyes\n/exit\nnever"
    out, err = converse(model, said)
    assert (out, err) == (
        "hi\n\nagain\nnew\nshort\n",
        "megatrain: the answer has used up its 0 tokens (--max-tokens, model.max_positions)\n",
    )
    assert model.prompts[:3] == [
        f"{HEAD}### Instruction:\nHello\n\n### Response:\n",
        f"{HEAD}### Instruction:\nHello\n\n### Response:\nhi\n\n### Instruction:\nand?\n\n### Response:\n",
        f"{HEAD}### Instruction:\nHello\n\n### Response:\nhi\n\n### Instruction:\nand?\n\n### Response:\n\n\n"
        "### Instruction:\nmore\n\n### Response:\n",
    ]
    assert model.prompts[3] == f"{HEAD}### Instruction:\nfresh\n\n### Response:\n"
    assert model.prompts[4].startswith("Be short.\n\n### Instruction:\nfresh\n\n### Response:\nnew\n\n### Instruction:\nyes")
    assert [request.seed for request in model.requests] == [3, 4, 5, 6, 7]
    assert {(request.max_tokens, request.ends) for request in model.requests} == {(20, frozenset({256}))}


def test_a_system_message_from_the_command_line_and_lines_that_are_no_commands(converse):
    model = Model("a", "b")
    converse(model, "/etc/hosts?\n/system\n/resets\n", system="Be kind.")
    assert model.prompts[0].startswith("Be kind.\n\n### Instruction:\n/etc/hosts?\n\n")
    assert model.prompts[1].startswith(HEAD) and model.prompts[1].endswith("### Instruction:\n/resets\n\n### Response:\n")


def test_ctrl_c_ends_the_answer_and_not_the_program(converse):
    before = signal.getsignal(signal.SIGINT)
    model = Model("abcdef", "next", press=2)
    out, _ = converse(model, "one\ntwo\n")
    assert out == "ab\nne\n"
    assert "### Response:\nab\n\n### Instruction:\ntwo" in model.prompts[1]
    assert signal.getsignal(signal.SIGINT) is before
    nothing = Model("abcdef", "next", press=0)
    assert converse(nothing, "one\ntwo\n")[0] == "\n\n"
    assert "one" not in nothing.prompts[1]  # nothing was said to it


def test_in_a_terminal(converse, monkeypatch):
    lines = iter(["Hello", KeyboardInterrupt, "more", EOFError])

    def line(prompt):
        assert prompt == "> "
        given = next(lines)
        if not isinstance(given, str):
            raise given
        return given

    monkeypatch.setattr("builtins.input", line)
    model = Model("hi", "yes")
    out, err = converse(model, "", Terminal)
    assert (out, len(model.prompts)) == ("hi\n\nyes\n\n", 2)
    assert err == (
        "megatrain: the chat template is alpaca. /system TEXT, /reset, /exit; Ctrl-C ends an answer, Ctrl-D the conversation.\n"
    )


def test_a_conversation_that_is_too_long_loses_its_first_messages(converse):
    model = Model("b" * 150, "c" * 60, "d", "e")
    long = "a" * 100
    out, err = converse(model, f"{long}\n{long}\nx\n{'y' * 600}\nz\n")
    assert err == (
        "megatrain: the conversation is longer than model.max_positions=512: its first 2 messages are left out\n"
        "megatrain: error: this message makes a conversation of 740 tokens, and model.max_positions is 512. Say it shorter.\n"
    )
    assert [line[:1] for line in out.splitlines()] == ["b", "c", "d", "e"]
    assert [prompt.count("### Instruction:") for prompt in model.prompts] == [1, 1, 2, 3]
    assert model.prompts[3].count(long) == 1 and "y" * 9 not in model.prompts[3]


def test_a_message_that_is_no_text_is_told_and_forgotten(converse):
    model = Model("b")
    _, err = converse(model, "a\udc80\nfine\n")
    assert err == "megatrain: error: messages[0].content is no text of Unicode: '\\udc80' is half of a character.\n"
    assert len(model.prompts) == 1


def test_a_line_without_end_is_not_read_to_its_end(converse):
    class Endless(io.StringIO):
        def readline(self, size=-1):
            assert 0 < size < 1 << 21
            return "x" * size

    with pytest.raises(
        ChatError, match=r"^a line of standard input has more than 1,048,576 characters\. Break it into lines\.$"
    ):
        converse(Model(), "", Endless)


def test_a_base_model_holds_no_conversation(converse):
    with pytest.raises(ValueError, match="there is no chat template beside bytes: a base model goes on with texts"):
        converse(Model(), "a\n", chat_template=None)


def test_the_model_itself_answers(checkpoint, monkeypatch, capsys):
    """The answers of a real engine, with the conversation before them."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    given = {"prompt": None, "chat": True, "chat_template": "alpaca", "max_tokens": 6}
    assert main(arguments(checkpoint, **given)) == 0
    first = capsys.readouterr().out
    prompt = f"{HEAD}### Instruction:\na\n\n### Response:\n"
    main(arguments(checkpoint, prompt=prompt, max_tokens=6))
    assert first.startswith(capsys.readouterr().out.removeprefix(prompt))


def test_ctrl_c_between_lines_of_a_pipe(converse):
    """While a line is awaited it ends the program, as anywhere; in between it does nothing."""

    class Pressed(io.StringIO):
        def readline(self, size=-1):
            line = super().readline(size)
            if line == "c\n":
                signal.raise_signal(signal.SIGINT)
            return line

    model = Model("x", "y")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        converse(model, "a\nb\nc\nd\n", Pressed)
    assert (len(model.prompts), signal.getsignal(signal.SIGINT)) == (2, before)
