"""Clients that go away, that send nonsense, that send nothing, that read nothing: the server goes on, and nothing of theirs stays."""

import asyncio
import json
import random
import socket
import struct
import time

import pytest
import served

LETTERS = {str(byte): 30 for byte in b"abcdefgh \n"}


def posted(path, body, *headers):
    """The bytes of a request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *headers,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


def address(server):
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def free(server):
    health = server.get("/health")
    return (health["open"], health["blocks_used"]) == (0, 0)


def test_100_clients_that_go_away_leave_nothing(server):
    async def one(number, draw):
        reader, writer = await asyncio.open_connection(*address(server))
        body = {
            "prompt": "x" * draw.randint(1, 100),
            "max_tokens": 150,
            "logit_bias": LETTERS,
            "stream": number % 2 == 0,
            "n": draw.randint(1, 2),
        }
        path = "/v1/completions"
        if number % 5 == 0:
            path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": body.pop("prompt")}], **body}
        writer.write(posted(path, body))
        await writer.drain()
        if number % 2 == 0 and number % 3 == 0:
            await reader.readuntil(b"data: ")  # in the middle of the stream
        await asyncio.sleep(draw.random() * 0.2)
        if number % 4 == 0:  # a reset, where others say goodbye
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    async def everyone():
        draws = [random.Random(number) for number in range(100)]
        await asyncio.gather(*(one(number, draw) for number, draw in enumerate(draws)))

    aborted = _aborted(server)
    asyncio.run(everyone())
    began = time.monotonic()
    served.wait_until(lambda: free(server), 5, server)
    assert time.monotonic() - began < 1
    assert _aborted(server) - aborted > 50
    assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200


def _aborted(server):
    lines = server.ask("/metrics")[1].splitlines()
    return float(
        next(line for line in lines if line.startswith('vllm:request_success_total{finished_reason="abort"')).split()[1]
    )


def test_a_client_that_reads_nothing_holds_nobody_up(server):
    with socket.create_connection(address(server)) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True, "logprobs": 20, "n": 8}
        lazy.sendall(posted("/v1/completions", body))
        served.wait_until(lambda: free(server), 20, server)  # its texts are written all the same
        assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200


def test_a_request_that_is_not_finished_is_not_waited_for(model, tmp_path, monkeypatch):
    """A head that never ends, and a body that never comes, within the limits that stand in ServingLimits."""
    from megatrain.serving.connections import PatientProtocol

    class Transport(asyncio.Transport):
        aborted = False

        def abort(self):
            self.aborted = True

        def is_closing(self):
            return self.aborted

        def get_extra_info(self, name, default=None):
            return default

    async def drive():
        import uvicorn

        async def app(scope, receive, send):
            await asyncio.sleep(0.3)

        config = uvicorn.Config(app, http=PatientProtocol, log_config=None, lifespan="off", ws="none")
        config.load()
        transports = []
        for sent in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"):
            protocol = PatientProtocol(config=config, server_state=uvicorn.Server(config).server_state, app_state={})
            protocol.head_seconds = 0.1
            transports.append(Transport())
            protocol.connection_made(transports[-1])
            if sent:
                protocol.data_received(sent)
        await asyncio.sleep(0.2)
        return [transport.aborted for transport in transports]

    assert asyncio.run(drive()) == [True, True, False]


CHAT, TEXT = {"messages": [{"role": "user", "content": "Hi"}]}, {"prompt": "Hi"}
NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "n",
    "seed",
)
SWITCHES = ("stream", "ignore_eos", "return_token_ids")
WRONG = {
    **{key: ["x", [], {}, True, 1e999, float("nan"), -1e19, [1], {"a": 1}, "\ud800"] for key in NUMBERS},
    **{key: [0, 1, "true", [], {}, [True]] for key in SWITCHES},
    "stop": [5, [5], [""], ["a"] * 5, {}, "", [[]], "\ud800", True],
    "stop_token_ids": [5, ["a"], [-1], [1.5], {}, [[]], [2**31], [300]],
    "logit_bias": [5, [], {"a": 1}, {"1": "x"}, {"1": 101}, {"-1": 1}, {"1": float("nan")}, {"999": 1}, "x"],
    "stream_options": [5, {"x": 1}, {"include_usage": 1}, [], "x"],
    "user": [5, [], {}, "x" * 1001],
}


def nonsense(draw):
    """(path, body) of a request that is wrong in one way."""
    chat = draw.random() < 0.5
    path, body = ("/v1/chat/completions", dict(CHAT)) if chat else ("/v1/completions", dict(TEXT))
    kind = draw.randrange(8)
    if kind == 0:
        whole = json.dumps({**body, "max_tokens": 2}).encode()
        return path, whole[: draw.randrange(len(whole))]
    if kind == 1:
        return path, draw.randbytes(draw.randint(1, 200)).replace(b"{", b"\xff").replace(b"[", b"\xfe") + b"\xff"
    if kind == 2:
        return path, draw.choice([[], 5, "x", None, True, [body], "[" * 100_000, {}, {"model": "tiny"}])
    if kind == 3:
        name = draw.choice(list(WRONG))
        return path, {**body, name: draw.choice(WRONG[name])}
    if kind == 4:
        return path, {
            **body,
            "".join(draw.choices("abcdefg_\u4f60\ud800\n", k=draw.randint(1, 80))): draw.choice([1, "x", [], None]),
        }
    if kind == 5:
        junk = [
            5,
            [],
            "x",
            [5],
            [[]],
            [{}],
            [{"role": "user"}],
            [{"role": 5, "content": "x"}],
            [{"role": "user", "content": [5]}],
            {"a": 1},
        ]
        return "/v1/chat/completions", {
            "messages": draw.choice([*junk, [{"role": "user", "content": "\ud800"}], [{**CHAT["messages"][0], "x": 1}]])
        }
    if kind == 6:
        junk = [
            5,
            {},
            [],
            [[]],
            ["a", 5],
            [5, "a"],
            [[1], "a"],
            [-1],
            [1.5],
            [True],
            [2**40],
            "\udfff",
            ["\udfff"],
            [None],
            [261],
            "x" * 300,
        ]
        return "/v1/completions", {"prompt": draw.choice(junk)}
    whole = json.dumps(body)
    return path, f"{whole[:-1]}, {whole[1:]}".encode()  # a key twice


def test_1000_malformed_requests_are_400s(server):
    draw = random.Random(5)
    statuses = {}
    with socket.create_connection(address(server)) as connection:
        stream = connection.makefile("rb")
        for number in range(1000):
            path, body = nonsense(draw)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.sendall(posted(path, data))
            status = int(stream.readline().split()[1])
            headers = dict(line.decode().strip().split(": ", 1) for line in iter(stream.readline, b"\r\n"))
            error = json.loads(stream.read(int(headers["content-length"])))
            statuses.setdefault(status, (number, path, data[:200], error))
            if status == 400:
                assert error["error"]["message"] and error["error"]["type"] == "invalid_request_error"
    assert statuses.keys() == {400}, statuses
    assert server.get("/health")["status"] == "ok" and "Traceback" not in server.said()


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "", "[evil]"])
def test_names_that_lead_here_are_not_answered(server, host):
    status, error, _ = server.ask("/v1/models", host=host or " ")
    assert status == 403 and error["error"]["code"] == "host_not_allowed" and "--allow-host NAME" in error["error"]["message"]


def test_a_body_has_a_limit(server):
    status, error, _ = server.ask("/v1/completions", b'{"prompt": "' + b"x" * (9 << 20) + b'"}')
    assert status == 413 and "--body-bytes" in error["error"]["message"]
    chunks = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(address(server)) as connection:
        connection.sendall(head)
        for _ in range(9):
            connection.sendall(chunks)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
