"""The connection to JAX's coordination service stays open for a while when the service dies."""

import contextlib
import os
import socket
import subprocess
import sys

import pytest

from phi3_jax.sharding.meeting import split_address
from phi3_jax.sharding.relay import start_relay
from tests.conftest import ROOT


@pytest.fixture
def service():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def connected(service: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection through a relay."""
    client = socket.create_connection(split_address(start_relay(*service.getsockname())))
    return client, service.accept()[0]


def test_carries_both_directions(service):
    client, server = connected(service)
    with client, server:
        sent = os.urandom(1 << 20)
        for source, sink in ((client, server), (server, client)):
            source.settimeout(20)
            source.sendall(sent[: 1 << 16])
            received = b""
            while len(received) < 1 << 16:
                received += sink.recv(1 << 16)
            assert received == sent[: 1 << 16]


def test_a_service_that_dies_leaves_the_connection_open(service):
    client, server = connected(service)
    with client:
        server.close()
        client.settimeout(1)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_a_client_that_leaves_is_known_at_once(service):
    client, server = connected(service)
    with server:
        client.close()
        server.settimeout(10)
        assert server.recv(1) == b""


def test_no_service(service):
    address = split_address(start_relay(*service.getsockname()))
    service.close()
    with socket.create_connection(address) as client:
        client.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


def test_cannot_be_started(service, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert start_relay(*service.getsockname()) == ""


def test_ends_with_the_process_that_started_it(service):
    script = (
        "import sys; from phi3_jax.sharding.relay import start_relay;"
        "print(start_relay(*eval(sys.argv[1])), flush=True); import os; os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", script, repr(service.getsockname())]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    with pytest.raises(ConnectionRefusedError):
        for _ in range(1000):
            socket.create_connection(split_address(run.stdout.strip())).close()
