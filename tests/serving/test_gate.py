"""Who is let through: keys, hosts, kinds of bodies."""

import asyncio
import base64

import httpx
import pytest

from megatrain.serving.desk import Desk
from megatrain.serving.endpoints import Endpoints
from megatrain.serving.gate import host_name, is_address, require_key
from megatrain.serving.mail import Mailbox
from megatrain.serving.refusal import Refusal
from megatrain.serving.serving_limits import ServingLimits, names_of_machine


def basic(text):
    return f"Basic {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize("header", ["Bearer sésame", "bearer sésame", basic(":sésame"), basic("me:sésame")])
def test_a_key_opens(header):
    require_key(header, "sésame")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("", "an API key is needed"),
        ("Bearer", "an API key is needed"),
        ("Bearer sesame", "the API key is wrong"),
        ("Bearer sésam", "the API key is wrong"),
        ("Digest sésame", "the API key is wrong"),
        (basic("sésame"), "an API key is needed"),
        (basic("sésame:"), "an API key is needed"),
        ("Basic ###", "an API key is needed"),
        ("Basic /////w==", "an API key is needed"),
    ],
)
def test_another_does_not(header, said):
    with pytest.raises(Refusal, match=said) as caught:
        require_key(header, "sésame")
    assert caught.value.status == 401 and caught.value.headers()["www-authenticate"].startswith("Basic")
    assert caught.value.body()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("host", "name", "address"),
    [
        ("127.0.0.1:8000", "127.0.0.1", True),
        ("[::1]:8000", "::1", True),
        ("LocalHost:8000", "localhost", False),
        ("example.org.", "example.org", False),
        ("10.0.0.5", "10.0.0.5", True),
        ("127.0.0.1.evil.example:80", "127.0.0.1.evil.example", False),
        ("2130706433", "2130706433", False),
        ("", "", False),
    ],
)
def test_the_name_in_a_host_header(host, name, address):
    assert (host_name(host), is_address(host_name(host))) == (name, address)


def test_a_key_guards_all_but_health():
    desk = Desk(Mailbox(), 1, 1)
    limits = ServingLimits(key="sesame", hosts=names_of_machine() | {"proxy.example"})
    app = Endpoints(desk, limits, None, None).app()

    async def drive():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy.example") as client:
            paths = ("/", "/v1/models", "/v1/completions", "/metrics", "/feedback", "/nothing")
            shut = {path: (await client.get(path)).status_code for path in paths}
            health = (await client.get("/health")).json()
            key = {"authorization": "Bearer sesame"}
            opened = {path: (await client.get(path, headers=key)).status_code for path in paths}
            browser = await client.get("/", auth=("anybody", "sesame"))
            posted = await client.post("/v1/completions", json={"prompt": "x"}, headers=key)
            thumb = {"messages": [{"role": "user", "content": "q"}], "answer": "a", "rating": "up"}
            feedback = await client.post("/feedback", json=thumb, headers=key)
        return shut, health, opened, browser, posted, feedback

    shut, health, opened, browser, posted, feedback = asyncio.run(drive())
    assert set(shut.values()) == {401} and health == {"status": "loading", "message": "the model is being loaded."}
    assert opened == {"/": 200, "/v1/models": 503, "/v1/completions": 405, "/metrics": 200, "/feedback": 405, "/nothing": 404}
    assert browser.status_code == 200 and "<title>megatrain</title>" in browser.text
    assert posted.status_code == 503 and posted.headers["retry-after"] == "5" and posted.json()["error"]["code"] == "loading"
    assert feedback.status_code == 404 and "--feedback none" in feedback.json()["error"]["message"]
    assert desk.meters.refused[401] == 6
