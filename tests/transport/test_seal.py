"""A text opens where it was closed, under the same key, and nowhere else."""

import hashlib
import hmac

import pytest

from megatrain.transport.seal import Seal, derived


def test_the_seal_is_an_hmac_of_place_and_text():
    closed = Seal(b"key").close("wake/1", "alarm")
    assert closed == hmac.new(b"key", b"wake/1\0alarm", hashlib.sha256).hexdigest() + "alarm"
    assert Seal(b"key").open("wake/1", closed.encode()) == "alarm"


@pytest.mark.parametrize("data", [b"", b"alarm", b"0" * 64 + b"alarm", b"\xff" * 70])
def test_what_has_no_seal_does_not_open(data):
    assert Seal(b"key").open("wake/1", data) is None


def test_another_place_or_key_does_not_open():
    closed = Seal(b"key").close("wake/1", "alarm").encode()
    assert Seal(b"key").open("wake/2", closed) is None and Seal(b"yek").open("wake/1", closed) is None


def test_what_is_derived_from_a_secret_differs_by_use_and_is_empty_without_one():
    assert len(derived("secret", "a", 1)) == 64 and derived("", "a", 1) == ""
    assert len({derived("secret", "a", 1), derived("secret", "a", 2), derived("secret", "a1"), derived("secrets", "a", 1)}) == 4
