"""Ports that are in use, by whom, and one that is not."""

import os
import socket
import subprocess
import sys

import pytest

from megatrain.runtime import ports


@pytest.fixture(params=["127.0.0.1", "0.0.0.0", "::1"])
def held(request):
    """A port that this process listens on, at one address or all."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    try:
        server = socket.create_server((request.param, 0), family=family)
    except OSError as error:
        pytest.skip(f"no {request.param} here: {error}")
    with server:
        yield server.getsockname()[1]


def test_a_port_in_use_is_told_with_its_process_and_another(held):
    assert not ports.is_free(held)
    said = ports.trouble(held)
    assert f"is in use by process {os.getpid()} (" in said
    other = int(said.removesuffix(".").rpartition(" ")[2])
    assert other > held and ports.is_free(other) and ports.trouble(other) == ""
    with socket.create_server(("", other)):
        assert not ports.is_free(other)


def test_the_process_is_another_one():
    program = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert f"process {process.pid} (" in ports.trouble(int(process.stdout.readline()))
        finally:
            process.kill()


def test_looking_is_not_listening():
    """Nobody can connect while a port is looked at, and it is free afterwards."""
    port = ports.free_port_near(30000)
    assert ports.is_free(port) and ports.is_free(port)
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_process_that_cannot_be_seen(monkeypatch, held):
    def refuse(_kind):
        raise ports.psutil.AccessDenied

    monkeypatch.setattr(ports.psutil, "net_connections", refuse)
    assert "in use by a process that this user may not see" in ports.trouble(held)


def test_a_port_that_is_forbidden(monkeypatch):
    class Forbidden(socket.socket):
        def bind(self, address):
            if address[1] == 80:
                raise PermissionError(13, "Permission denied")
            super().bind(address)

    monkeypatch.setattr(ports.socket, "socket", Forbidden)
    said = ports.trouble(80)
    assert said.startswith("cannot be listened at (Permission denied)") and "example 10" in said
