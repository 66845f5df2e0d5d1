"""Who is let through: keys, hosts, kinds of bodies."""

import base64

import pytest

from megatrain.serving.gate import host_name, is_address, require_key
from megatrain.serving.refusal import Refusal


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
