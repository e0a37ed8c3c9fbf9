"""Processes that meet before JAX starts; here threads and small processes without JAX."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from phi3_jax import UserError
from phi3_jax.sharding import meeting
from phi3_jax.sharding.meeting import PeerError, Peers
from tests.conftest import ROOT

MEMBER = """
import sys, time
from phi3_jax.sharding import meeting
meeting.GRACE_SECONDS = 0.2
address, count, number, ending = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
peers = meeting.Peers(address, count, number, lambda line: print(line, flush=True))
peers.meet(20)
with peers.together(3):
    print("met", flush=True)
    time.sleep(0.5 if ending == "first" else 60 if ending == "killed" else 1.5)
    if ending == "broken":
        raise RuntimeError("the disk broke")
print("end", flush=True)
"""


@pytest.fixture
def address():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return f"127.0.0.1:{port}"


def meet(address: str, count: int, number: int, timeout: float = 10) -> list[str]:
    """What a process said until all were there, or why not, as its last line."""
    said: list[str] = []
    try:
        with contextlib.closing(Peers(address, count, number, said.append)) as peers:
            peers.meet(timeout)
    except (PeerError, UserError) as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def test_all_come_in_any_order(address, monkeypatch):
    monkeypatch.setattr(meeting, "NOTICE_SECONDS", 60)
    with ThreadPoolExecutor() as pool:
        coming = []
        for number in (2, 0, 1):
            coming.append(pool.submit(meet, address, 3, number))
            time.sleep(0.2)
        assert [one.result() for one in coming] == [[], [], []]
    assert meet(address, 1, 0) == []
    # JAX can listen at the same address afterwards.
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass


def test_who_is_missing_is_said_again_and_again(address, monkeypatch):
    monkeypatch.setattr(meeting, "NOTICE_SECONDS", 0.3)
    with ThreadPoolExecutor() as pool:
        host, guest = (pool.submit(meet, address, 4, number, 1.0) for number in (0, 2))
        for said in (host.result(), guest.result()):
            assert len(said) >= 3
            assert "2 of 4 processes are there after" in said[1]
            assert "missing: 1, 3. Start the same command on every host" in said[1]
            assert said[-1].startswith("PeerError: 2 of 4 processes are there after 1 s")


def test_a_host_that_does_not_answer(address):
    (said,) = meet(address, 2, 1, timeout=1)
    assert (
        f"PeerError: 1 of 2 processes are there after 1 s; no answer from process 0 at {address}"
        in said
    )


def test_a_host_that_is_started_again(address):
    with ThreadPoolExecutor() as pool:
        guest = pool.submit(meet, address, 2, 1)
        with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))) as first:
            first.accept()[0].close()
        assert meet(address, 2, 0) == [] and guest.result() == []


@pytest.mark.parametrize(
    ("count", "number", "said"), [(3, 1, "came to a run of 2"), (2, 1, "have the number 1")]
)
def test_wrong_numbers_are_refused(address, count, number, said):
    with ThreadPoolExecutor() as pool:
        host = pool.submit(meet, address, 2 if count == 3 else 3, 0, 4)
        time.sleep(0.3)
        right = pool.submit(meet, address, 3, 1, 4) if count == 2 else None
        time.sleep(1.2)  # it tries twice a second
        (refused,) = meet(address, 3 if right else count, number, 4)
        assert refused.startswith("UserError") and said in refused
        assert said in host.result()[0]


def test_strangers_do_no_harm(address):
    port = int(address.rpartition(":")[2])
    with ThreadPoolExecutor() as pool:
        host = pool.submit(meet, address, 2, 0)
        time.sleep(0.2)
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"x" * 10_000, b'{"phi3-jax": "1"}\n'):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(data)
        assert meet(address, 2, 1) == []
        assert all("came to a run" in line for line in host.result())


@pytest.fixture
def start(popen):
    """Starts processes that meet, each with its ending."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(address: str, *endings: str) -> list[subprocess.Popen]:
        return [
            popen(
                [sys.executable, "-c", MEMBER, address, str(len(endings)), str(number), ending],
                stdout=subprocess.PIPE, text=True, env=environment, stderr=subprocess.DEVNULL,
            )
            for number, ending in enumerate(endings)
        ]  # fmt: skip

    return start


def test_ends_in_any_order(address, start):
    processes = start(address, "first", "last", "last")
    assert [process.wait(30) for process in processes] == [0, 0, 0]
    assert {process.stdout.read() for process in processes} == {"met\nend\n"}


@pytest.mark.parametrize("number", [0, 2])
def test_one_that_is_killed_ends_the_others(address, number, start):
    processes = start(address, "killed", "killed", "killed")
    for process in processes:
        assert process.stdout.readline() == "met\n"
    processes[number].kill()
    for other in (process for process in processes if process is not processes[number]):
        assert other.wait(20) == 3
        assert f"process {number} of 3 has ended before the others" in other.stdout.read()


def test_one_that_fails_says_why(address, start):
    broken, other = start(address, "broken", "killed")
    assert broken.wait(20) == 1 and other.wait(20) == 3
    assert "process 0 of 2 has ended before the others (the disk broke)" in other.stdout.read()


@pytest.mark.parametrize("address", ["host", "host:", ":1", "host:port", "host:0", "host:65536"])
def test_addresses(address):
    with pytest.raises(UserError, match="must be HOST:PORT"):
        Peers(address, 2, 1, print).meet(1)


def test_a_port_in_use(address):
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        os.environ["JAX_COORDINATOR_BIND_ADDRESS"] = address
        try:
            with pytest.raises(UserError, match="cannot listen on port .*is another run using it"):
                Peers(address, 2, 0, print).meet(1)
        finally:
            del os.environ["JAX_COORDINATOR_BIND_ADDRESS"]
