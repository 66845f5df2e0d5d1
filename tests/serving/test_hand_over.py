"""`megatrain export --serve-check`: our own engine against our own server, and against one that answers wrongly.

Over the command it tests megatrain.verbs.serve_check.
"""

import json
import math
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jobs
import pytest

from megatrain.data.tokenizer import ByteTokenizer
from megatrain.inference.opening import opened
from megatrain.inference.requests import Scored
from megatrain.serving import hand_over
from megatrain.serving.hand_over import NEW_TOKENS, TEXTS, Agreement, HandOverError, OtherServer, Said, agreement, said
from megatrain.serving.token_texts import TokenTexts
from megatrain.verbs.serve_check import answers, prompts_of

BYTES = TokenTexts(ByteTokenizer())


@pytest.fixture(scope="module")
def own(model):
    """{prompt: our tokens}, as a faithful server would answer."""
    with opened(model) as found:
        prompts = prompts_of(found)
        return dict(zip(prompts, (answer.tokens for answer in answers(found, prompts)), strict=True))


class StandIn:
    """A server that answers as ours would, but for what a test changes."""

    def __init__(self, own, change=lambda choice: choice, strict=False, ids=True):
        self.own, self.change, self.strict, self.ids, self.asked = own, change, strict, ids, []

    def answer(self, path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "theirs"}]}
        self.asked.append(body)
        if self.strict and body.keys() - {"model", "prompt", "max_tokens", "temperature", "logprobs"}:
            return 400, {"error": {"message": "extra fields"}}
        scored = self.own[tuple(body["prompt"])]
        names = [BYTES.name(each.token) for each in scored]
        choice = {"logprobs": {"tokens": names, "token_logprobs": [each.logprob for each in scored]}}
        if self.ids:
            choice["token_ids"] = [each.token for each in scored]
        return 200, {"choices": [self.change(choice)]}


@pytest.fixture
def serve():
    """A function that puts a stand-in behind a port and gives its address."""
    servers = []

    def start(stand_in):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._reply(None)

            def do_POST(self):
                self._reply(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def _reply(self, body):
                status, value = stand_in.answer(self.path, body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(value).encode())

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def check(model, url, *words):
    return jobs.here(str(model), "--serve-check", url, *words, verb="export")


def test_our_own_server_says_the_same(model, server):
    ended = check(model, server.url, "--serve-tolerance", "0.0001")
    assert ended.code == 0, ended.out + ended.err
    assert f"the servers agree on 20 prompts: {20 * NEW_TOKENS} tokens compared, max |dlogp| 0.000" in ended.out
    assert ended.out.count("none") == 20 and check(model, server.url + "/v1").code == 0


@pytest.mark.parametrize("stand_in", [{"strict": True}, {"ids": False}, {"strict": True, "ids": False}], ids=str)
def test_servers_that_know_less_are_compared_by_what_they_say(model, own, serve, stand_in):
    server = StandIn(own, **stand_in)
    ended = check(model, serve(server))
    assert ended.code == 0 and "the servers agree on 20 prompts" in ended.out, ended.out + ended.err
    assert server.asked[0]["model"] == "theirs" and len(server.asked) == (40 if server.strict else 20)


def test_another_token_is_told_with_its_place(model, own, serve):
    def change(choice):
        choice["token_ids"][4] = (choice["token_ids"][4] + 1) % 256
        return choice

    ended = check(model, serve(StandIn(own, change)))
    assert ended.code == 1 and "the servers differ on" in ended.out
    assert ended.out.count("token 5: ours ") == 20


def test_other_log_probabilities_are_told(model, own, serve):
    def change(choice):
        choice["logprobs"]["token_logprobs"][7] -= 0.5
        return choice

    url = serve(StandIn(own, change))
    ended = check(model, url)
    assert ended.code == 1 and "the servers differ on 20 of 20 prompts" in ended.out and "max |dlogp| 0.5" in ended.out
    assert check(model, url, "--serve-tolerance", "0.6").code == 0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {"choices": []}), "no completion with log-probabilities is in the answer"),
        ((200, []), "no completion with log-probabilities is in the answer"),
        ((200, {"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [math.nan]}}]}), "no completion with log-prob"),
        ((200, {"choices": [{"logprobs": {"tokens": [["a"]], "token_logprobs": [-1]}}]}), "no completion with log-prob"),
        ((500, {"error": "x"}), 'answers with status 500: {"error": "x"}'),
        ((400, {"error": "x"}), 'answers with status 400: {"error": "x"}'),
    ],
    ids=str,
)
def test_a_server_that_cannot_answer_is_an_error(serve, answer, said):
    stand_in = StandIn({})
    stand_in.answer = lambda path, body: (200, {"data": [{"id": "theirs"}]}) if path == "/v1/models" else answer
    server = OtherServer(serve(stand_in), None, None).named()
    assert server.model == "theirs"
    with pytest.raises(HandOverError, match=re.escape(said)):
        server.complete([1, 2], 3)


@pytest.mark.parametrize("models", [[], {"data": "x"}, {"data": [1]}, {"data": []}, None], ids=str)
def test_a_list_of_models_that_is_none(serve, models):
    stand_in = StandIn({})
    stand_in.answer = lambda path, body: (200, models)
    with pytest.raises(HandOverError, match="lists no models at /v1/models"):
        OtherServer(serve(stand_in), None, None).named()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"nonsense\r\n\r\n", "cannot be asked (nonsense"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n[1, ", "cannot be asked (Expecting value"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 5000, "cannot be asked (it is nested too deep)"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 2000, "the answer has more than 1,000 bytes"),
    ],
    ids=["no HTTP", "cut off", "deep", "endless"],
)
def test_what_is_no_answer_is_an_error(monkeypatch, answer, said):
    monkeypatch.setattr(hand_over, "LARGEST_REPLY", 1000 if "bytes" in said else 1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def reply():
            with listening.accept()[0] as connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        threading.Thread(target=reply, daemon=True).start()
        with pytest.raises(HandOverError, match=re.escape(said)):
            OtherServer(f"http://127.0.0.1:{listening.getsockname()[1]}", None, None).named()
    with pytest.raises(HandOverError, match=r"file:///etc is no address of a server\. Try http://"):
        OtherServer("file:///etc", None, None).named()


def test_nobody_there_and_nothing_to_do():
    ended = check("nowhere", f"http://127.0.0.1:{jobs.free_port()}")
    assert ended.code == 1 and "cannot be asked (" in ended.err and "--serve-check URL" in ended.err
    for words in ((), ("out", "--serve-check", "http://x")):
        ended = jobs.here("nowhere", *words, verb="export")
        assert ended.code == 2 and "give HF_DIR to write it, or --serve-check URL" in ended.err


def scored(*tokens):
    return [Scored(token, -1.0, True, ((token, -1.0), (120, -1.05), (121, -3.0))) for token in tokens]


def test_a_tie_is_no_difference():
    tie = agreement(scored(97, 98), Said((97, 120), (-1.1, -1.0)), BYTES)
    assert tie == Agreement(1, True, pytest.approx(0.05), "b", "x", pytest.approx(0.1), pytest.approx(0.1))
    assert not tie.wrong(0.2) and tie.wrong(0.01)
    assert agreement(scored(97, 98), Said(("a", "y"), (-1.0, -1.0)), BYTES).wrong(0.2)
    assert agreement(scored(97), Said((99,), (-1.0,)), BYTES).margin is None
    assert agreement(scored(97), Said((), ()), BYTES).wrong(9)
    assert agreement(scored(97), Said((1 << 40,), (-1.0,)), BYTES).theirs == "id 1099511627776"


def test_a_text_may_end_where_ours_does_and_nowhere_else():
    ended = Said((97,), (-1.0,))
    assert agreement(scored(97, 98), ended, BYTES, {98}) == Agreement(1, False, None)
    assert agreement(scored(97, 98), ended, BYTES, {99}) == Agreement(1, True, None, "b", "(the end)")
    assert agreement(scored(97, 98), ended, BYTES, {120}) == Agreement(1, True, pytest.approx(0.05), "b", "(the end)")


def test_ids_may_be_written_as_texts():
    choice = {"logprobs": {"tokens": ["token_id:5", "token_id:7"], "token_logprobs": [-1, -2]}}
    assert said({"choices": [choice]}) == Said((5, 7), (-1.0, -2.0))
    with pytest.raises(HandOverError):
        said({"choices": [{"logprobs": None}]})
    assert len(TEXTS) == 20
